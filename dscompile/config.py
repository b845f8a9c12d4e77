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
_FLAGS = ("strict", "enable", "fp8_head", "fp8_free", "verify", "batch_invariant")


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
    fuel: int | None = None  #: Apply only the first n rewrites of the process, to find a wrong one; None: all.
    #: Spread experts over the ranks of this group: a ProcessGroup, DeviceMesh of one dimension, "world"; here its name.
    ep_group: str | None = None
    ep_capacity: int | None = None  #: Under ep_group, the most tokens of a rank in one call; None: the graph's own.
    #: Under ep_group, 2 runs half of the requests while the other half's tokens travel, where that is predicted to pay.
    microbatches: int | None = None
    placement: Any = None  #: Experts of these layers lie in slots and may move: a ``dscompile.passes.placement.Book``.
    batch_invariant: bool = False  #: Attention over a cache gives a request the same bits beside any other requests.
    verify: bool = False  #: At its compilation, run each rewritten region beside the original and compare.
    inductor: Mapping[str, Any] = field(default_factory=dict)  #: Settings passed on to Inductor.

    @classmethod
    def of(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Config:
        """Settings from torch.compile's ``mode`` and ``options`` and from the environment; raises OptionError."""
        from dscompile import options as options_
        from dscompile.lowering import inductor

        values = _from_environment()
        own = {f.name: f.type for f in fields(cls) if f.name != "inductor"}
        passed: dict[str, Any] = {}
        for name, value in (options or {}).items():
            if name in own:
                values[name] = _checked(name, value, f"options[{name!r}]")
            elif inductor.is_option(name):
                options_.check_inductor(name, value, (options or {}).get("enable") is not False)
                passed[name] = value
            else:
                raise options_.unknown(name, own)
        if values.get("ep_group") is not None:
            values["ep_group"] = options_.joined(values["ep_group"])
        if mode is not None:
            values["mode"] = _checked("mode", mode, "mode")
        options_.check_together(mode, options or {}, passed, values.get("fp8"))
        options_.check_spread(values)
        if values.get("microbatches") is not None:
            passed = options_.in_order(passed)
        return cls(**values, inductor=passed)

    def split(self) -> Any:
        """What the pass that makes micro-batches is asked for, or None."""
        if self.microbatches is None:
            return None
        from dscompile.passes.microbatch import Asked
        from dscompile.runtime.cost import COMM_SMS, Table

        return Asked(Table(), COMM_SMS)

    def key(self) -> str:
        """What of the settings changes generated code, for the caches' keys."""
        return f"enable={self.enable}" + ("" if self.fuel is None else f",fuel={self.fuel}")


def _from_environment() -> dict[str, Any]:
    objects = ("inductor", "mode", "placement")
    names = {f"DSINFRA_{f.name.upper()}": f.name for f in fields(Config) if f.name not in objects}
    found = {}
    for variable, text in os.environ.items():
        if variable in names and text != "":
            name = names[variable]
            value: Any = text
            if name in _FLAGS:
                value = {"0": False, "1": True, "false": False, "true": True}.get(text.lower(), text)
            elif name in ("fuel", "ep_capacity", "microbatches"):
                value = int(text) if text.isdecimal() else text
            found[name] = _checked(name, value, variable)
    return found


def _checked(name: str, value: Any, where: str) -> Any:
    if name == "inner" and value not in INNER:
        raise OptionError(f"{where} is {value!r}; allowed are {', '.join(INNER)}.")
    if name == "mode" and value is not None:
        from dscompile.lowering.inductor import modes

        if value not in modes():
            raise OptionError(f"{where} is {value!r}; allowed are {', '.join(modes())}.")
    if name == "fp8" and value is not None and value not in FP8:
        raise OptionError(f"{where} is {value!r}; allowed are {', '.join(FP8)}, or None.")
    if name in _FLAGS and not isinstance(value, bool):
        raise OptionError(f"{where} is {value!r}; it must be True or False.")
    if name == "fuel" and value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise OptionError(f"{where} is {value!r}; it must be a number of rewrites, 0 or more, or None for all.")
    if name == "ep_capacity" and value is not None and (type(value) is not int or value < 1):
        raise OptionError(f"{where} is {value!r}; it must be a number of tokens, 1 or more, or None.")
    if name == "microbatches" and value is not None and (type(value) is not int or value != 2):
        raise OptionError(f"{where} is {value!r}; it must be 2, or None for one: two are what hides an exchange.")
    if name == "placement" and value is not None:
        from dscompile.passes.placement import Book

        if not isinstance(value, Book):
            raise OptionError(f"{where} is a {type(value).__name__}; it must be a passes.placement.Book, or None.")
    if name == "dump" and value is not None and not isinstance(value, (str, os.PathLike)):
        raise OptionError(f"{where} is {value!r}; it must be the path of a directory, or None.")
    return value
