"""What a row of results holds: the fields that a benchmark measures, and those that are stamped on all rows.

Most benchmarks time something beside an anchor (`TIMES`). The zoo's rows say of one model in one mode whether it is
right, what became of its sites, and what compiling cost (`ZOO`); they are kept for each card.
"""

from __future__ import annotations

from dataclasses import dataclass

_TEXT, _NUMBER, _COUNT = (str,), (int, float), (int,)

# Stamped on every row by `results.stamp`.
ABOUT: dict[str, tuple[type, ...]] = dict.fromkeys(("card", "torch", "triton", "commit", "date"), _TEXT)


@dataclass(frozen=True)
class Schema:
    """The rows of one kind of benchmark.

    measured: fields that the benchmark gives, with their types. key: fields that together occur once in a file. times:
    fields that must be positive where they are not None. merges: writing replaces rows of the same key alone.
    """

    measured: dict[str, tuple[type, ...]]
    key: tuple[str, ...]
    times: tuple[str, ...]
    merges: bool = False

    @property
    def fields(self) -> dict[str, tuple[type, ...]]:
        return {"bench": _TEXT, **self.measured, **ABOUT}


TIMES = Schema(
    measured={
        "case": _TEXT,  # shapes and dtype, readable
        "us": _NUMBER,  # ours, median microseconds
        "anchor": (str, type(None)),  # what stands beside it, and whether timed in the same run or taken from a table
        "anchor_us": (int, float, type(None)),
    },
    key=("case", "anchor"),
    times=("us", "anchor_us"),
)

_MAYBE = (int, float, type(None))
ZOO = Schema(
    measured={
        "model": _TEXT,
        "version": _TEXT,  # of the library that the model is from
        "mode": _TEXT,
        "failure": (str, type(None)),  # what was wrong; None where every check held
        "lowered": _COUNT,  # sites over all graphs
        "refused": (dict,),  # number of sites by kind and class of the refusal
        "error": _MAYBE,  # relative, against float32
        "eager_error": _MAYBE,
        "graphs": _COUNT,
        "breaks": _COUNT,
        "compile_s": _MAYBE,  # first call from empty caches; None where code generation was left out
        "inductor_s": _MAYBE,
        "warm_s": _MAYBE,  # first call of a second process
    },
    key=("card", "model", "version", "mode"),
    times=("compile_s", "inductor_s", "warm_s"),
    merges=True,
)


def of(name: str) -> Schema:
    """The schema of the benchmark of that name."""
    return ZOO if name == "zoo" else TIMES
