"""A `torch.compile` backend that recognises DeepSeek-style layers in unmodified models and lowers them to own kernels.

Importing the package is cheap: nothing of torch is loaded until a name below is first used, because torch loads the
entry point of every installed backend's distribution while it resolves a name.

The code lives in the folders `passes`, `lowering`, `kernels` and `runtime` of the repository's root and is imported as
`dscompile.passes` and so on. The same file imported under its bare name as well would exist twice and register every
operator twice, so that is refused here with an `ImportError`.
"""

import importlib
import os
import sys
from typing import Any

__version__ = "0.1.0"

_FOLDERS = ("kernels", "lowering", "passes", "runtime")

# Public name -> the module that defines it, loaded at first use.
_LAZY = {
    "explain": "dscompile.report",
    "pipeline_stages": "dscompile.pipeline",
    "register_fp8_pair": "dscompile.passes.fp8_pairs",
}

__all__ = ["__version__", "explain", "pipeline_stages", "refuse_bare_names", "register_fp8_pair"]


def refuse_bare_names() -> None:
    """Raise if one of our folders was imported under its bare name: `import passes`, with the root on `sys.path`.

    Called when the package is imported, and by the folders' own `__init__.py`, so that the order of the imports does
    not matter. `kernels` alone is let through: it has no `__init__.py`, and transformers imports that name to look for
    the package of the same name on PyPI; a module inside it is not.

    Raises:
        ImportError: names the module found, where it came from, and what to write instead.
    """
    ours = {name: os.path.realpath(os.path.join(__path__[0], name)) for name in _FOLDERS}
    for name, module in list(sys.modules.items()):
        folder, _, rest = name.partition(".")
        file = getattr(module, "__file__", None)
        if folder not in ours or file is None or (folder == "kernels" and not rest):
            continue
        if os.path.realpath(file).startswith(ours[folder] + os.sep):
            raise ImportError(
                f"the module {name!r} was imported from {file}, which is part of dscompile: a second copy under a bare "
                f"name would register every operator twice. Import it as 'dscompile.{name}', and keep the repository's "
                "root off sys.path (run `pytest`, not `python -m pytest`, or set PYTHONSAFEPATH=1)."
            )


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dscompile' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


refuse_bare_names()
