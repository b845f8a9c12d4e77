"""Settings of one compilation: a frozen dataclass, filled by ``options={...}`` and ``DSINFRA_*`` variables.

``torch.compile(model, backend="dsinfra", options={"strict": True})``; an option given there wins over its variable.
Names that are not ours are Inductor's settings and passed on; unknown ones raise :class:`OptionError`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dscompile.errors import OptionError

INNER = ("inductor", "aot_eager", "eager")
FP8 = ("block",)
_FLAGS = ("strict", "enable", "fp8_head", "fp8_free")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Config:
    """One sentence a field."""

    mode: str | None = None  #: Inductor's mode; here because torch.compile takes mode or options, never both.
    inner: str = "inductor"  #: What compiles the rewritten graph: inductor, aot_eager (no code generation), eager.
    strict: bool = False  #: Raise where a recognised site would be left to Inductor or the analysis fails.
    dump: str | None = None  #: Directory for graphs before and after each pass, differences and the record as JSON.
    enable: bool = True  #: False compiles with Inductor alone, to compare.
    fp8: str | None = None  #: "block" computes 16-bit linear layers and experts in block-scaled FP8 (inference only).
    fp8_head: bool = False  #: Under fp8, quantise also the layer whose result leaves the graph: the vocabulary's head.
    fp8_free: bool = False  #: Under fp8, give back the memory of quantised weights: compiled calls alone remain.
    inductor: Mapping[str, Any] = field(default_factory=dict)  #: Settings passed on to Inductor.

    @classmethod
    def of(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Config:
        """Settings from torch.compile's ``mode`` and ``options`` and from the environment; raises OptionError."""
        values = _from_environment()
        own = {f.name: f.type for f in fields(cls) if f.name != "inductor"}
        passed: dict[str, Any] = {}
        for name, value in (options or {}).items():
            if name in own:
                values[name] = _checked(name, value, f"options[{name!r}]")
            elif _is_inductor(name):
                passed[name] = value
            else:
                raise OptionError(
                    f"options[{name!r}] is neither an option of dsinfra nor a setting of Inductor. Options of dsinfra "
                    f"are {', '.join(sorted(own))}; Inductor's are listed by torch._inductor.list_options()."
                )
        if mode is not None:
            values["mode"] = _checked("mode", mode, "mode")
        return cls(**values, inductor=passed)

    def key(self) -> str:
        """What of the settings changes generated code, for the caches' keys."""
        return f"enable={self.enable}"


def _is_inductor(name: str) -> bool:
    from dscompile.lowering.inductor import is_option

    return is_option(name)


def _from_environment() -> dict[str, Any]:
    names = {f"DSINFRA_{f.name.upper()}": f.name for f in fields(Config) if f.name not in ("inductor", "mode")}
    found = {}
    for variable, text in os.environ.items():
        if variable in names and text != "":
            name = names[variable]
            value: Any = text
            if name in _FLAGS:
                value = {"0": False, "1": True, "false": False, "true": True}.get(text.lower(), text)
            found[name] = _checked(name, value, variable)
    return found


def _checked(name: str, value: Any, where: str) -> Any:
    if name == "inner" and value not in INNER:
        raise OptionError(f"{where} is {value!r}; allowed are {', '.join(INNER)}.")
    if name == "mode" and value is not None and value not in MODES:
        raise OptionError(f"{where} is {value!r}; allowed are {', '.join(MODES)}.")
    if name == "fp8" and value is not None and value not in FP8:
        raise OptionError(f"{where} is {value!r}; allowed are {', '.join(FP8)}, or None.")
    if name in _FLAGS and not isinstance(value, bool):
        raise OptionError(f"{where} is {value!r}; it must be True or False.")
    if name == "dump" and value is not None and not isinstance(value, (str, os.PathLike)):
        raise OptionError(f"{where} is {value!r}; it must be the path of a directory, or None.")
    return value
