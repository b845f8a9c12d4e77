"""Options that are Inductor's, misspelt, or contradict each other: said before anything is compiled.

Inductor checks names and types of its settings only where `torch.compile` hands them to Inductor itself; here they come
through another backend, so the same mistakes would otherwise show as an assertion deep inside a compilation, or not at
all. An explicit setting of Inductor wins over what the mode sets; variables may switch parts off to compare or debug,
so contradictions are looked for among the options of one call.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from dscompile.errors import OptionError
from dscompile.lowering import inductor

_ANALYSES = (
    "strict",
    "verify",
    "fuel",
    "fp8",
    "fp8_head",
    "fp8_free",
    "ep_group",
    "batch_invariant",
    "microbatches",
)  # what `enable=False` leaves without effect
_NEED_FP8 = ("fp8_head", "fp8_free")


def unknown(name: str, own: Iterable[str]) -> OptionError:
    """The error for an option that neither we nor Inductor have: the near names of both, and all of ours."""
    own = sorted(own)
    near = {"dsinfra": own, "Inductor": sorted(inductor.option_names())}
    found = [
        f"{', '.join(map(repr, names))} of {owner}"
        for owner, known in near.items()
        if (names := difflib.get_close_matches(name, known, n=2, cutoff=0.7))
    ]
    return OptionError(
        f"options[{name!r}] is neither an option of dsinfra nor a setting of Inductor. "
        + (f"Did you mean {' or '.join(found)}? " if found else "")
        + f"Options of dsinfra are {', '.join(own)}; Inductor's are listed by torch._inductor.list_options()."
    )


def check_inductor(name: str, value: Any, enabled: bool) -> None:
    """Raises OptionError for a value that Inductor's setting can't hold, or, `enabled`, that our operators can't live
    with."""
    wanted = inductor.wanted_type(name, value)
    if wanted:
        raise OptionError(
            f"options[{name!r}] is {value!r}, a {type(value).__name__}; this setting of Inductor must be a {wanted}."
        )
    if not enabled:
        return
    if name.replace("-", "_") in inductor.APART and value:
        raise OptionError(
            f"options[{name!r}] is True: Inductor's kernels then wait only for the kernel right ahead of them, and "
            "dsinfra's kernels begin before that one has ended. Leave it out, or give enable=False to compile with "
            "Inductor alone."
        )
    if name.replace("-", "_") == "implicit_fallbacks" and not value:
        raise OptionError(
            "options['implicit_fallbacks'] is False, and Inductor calls dsinfra's operators as such fallbacks: no "
            "rewritten graph could be compiled. Leave it out, or give enable=False to compile with Inductor alone."
        )


def check_together(mode: str | None, options: Mapping[str, Any], passed: Mapping[str, Any], fp8: str | None) -> None:
    """Raises OptionError where options of one call contradict each other.

    Args:
        mode: `torch.compile`'s mode.
        options: all options of the call.
        passed: those of them that are Inductor's.
        fp8: the setting that is in force, from wherever it came.
    """
    if mode is not None and options.get("mode", mode) != mode:
        raise OptionError(f"mode is {mode!r} and options['mode'] is {options['mode']!r}: give one of them.")
    inner = options.get("inner", "inductor")
    if passed and inner != "inductor":
        raise OptionError(
            f"options[{next(iter(passed))!r}] is a setting of Inductor, and options['inner'] is {inner!r}: Inductor "
            "generates no code then, so the setting would do nothing. Leave one of the two out."
        )
    idle = [name for name in _ANALYSES if options.get(name) not in (None, False)]
    if options.get("enable") is False and idle:
        raise OptionError(
            f"options['enable'] is False and options[{idle[0]!r}] is {options[idle[0]]!r}: without analysis nothing of "
            "it can happen. Leave one of the two out."
        )
    for name in _NEED_FP8:
        if options.get(name) and fp8 is None:
            raise OptionError(
                f"options[{name!r}] is True and fp8 is None: it says what becomes of weights that fp8 quantises. Give "
                "fp8='block' too, or leave it out."
            )


def joined(group: Any) -> str:
    """The name of a group of ranks, made known to this process; raises OptionError if it is none."""
    from dscompile.runtime import groups

    try:
        return groups.join(group).name
    except groups.GroupError as error:
        raise OptionError(f"options['ep_group']: {error}") from None


def check_spread(values: Mapping[str, Any]) -> None:
    """Raises OptionError where settings that are in force don't go with expert parallelism or placement.

    Args:
        values: the settings by name, those that were given.
    """
    if values.get("ep_capacity") is not None and values.get("ep_group") is None:
        raise OptionError(
            f"options['ep_capacity'] is {values['ep_capacity']} and ep_group is None: it is room for tokens of other "
            "ranks. Give ep_group too, or leave it out."
        )
    if values.get("microbatches") is not None and values.get("ep_group") is None:
        raise OptionError(
            f"options['microbatches'] is {values['microbatches']} and ep_group is None: without ranks that exchange "
            "tokens there is nothing to hide. Give ep_group too, or leave it out."
        )
    if values.get("placement") is not None and (values.get("verify") or not values.get("enable", True)):
        other = "verify" if values.get("verify") else "enable"
        raise OptionError(
            f"options[{other!r}] is {values[other]} and placement is given: its counters would count a check's tokens, "
            "and without analysis no layer would read its slots. Leave one of the two out."
        )
    if values.get("ep_group") is not None and values.get("verify"):
        raise OptionError(
            "options['verify'] is True and ep_group is given: a check of a layer would need every rank to check the "
            "same one at once. Verify the model without ep_group first."
        )


def in_order(passed: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's settings and those under which it keeps a schedule's order; raises OptionError where they differ."""
    from dscompile.passes.microbatch import INDUCTOR

    for name, value in passed.items():
        if INDUCTOR.get(name.replace("-", "_"), value) != value:
            raise OptionError(
                f"options[{name!r}] is {value!r} and microbatches is given: Inductor would move the start of an "
                "exchange down to its end. Leave one of the two out."
            )
    return {**passed, **INDUCTOR}
