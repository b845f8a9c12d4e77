"""Seconds of a model's first call in a second process that finds the caches of a first: ours and Inductor's.

The speed-up of a row is cold over warm of one compiler; Inductor's own stands under ours. What a warm start still does
is Dynamo's trace, our passes (they run before the caches are asked) and loading the compiled code.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from typing import Any

from bench import compiled
from bench.first_call import Case, check_same, clock, measure
from bench.results import check

GPUS = 0

CASES = (Case("deepseek_v3"), Case("deepseek_v3", "decode"))


def run(
    quick: bool = False, cases: tuple[Case, ...] = CASES, repeats: int = 3, dry: bool = False
) -> list[dict[str, Any]]:
    """Two rows a case, ours and Inductor's: medians of pairs of processes that share one cache folder."""
    rows = []
    for case in cases:
        cold: dict[str, list[dict[str, Any]]] = {"dsinfra": [], "inductor": []}
        warm: dict[str, list[dict[str, Any]]] = {"dsinfra": [], "inductor": []}
        for _ in range(1 if quick else repeats):
            for variant in compiled.variants(None, dry):
                with tempfile.TemporaryDirectory() as folder:
                    cold[variant.name].append(measure(variant, case, folder))
                    warm[variant.name].append(measure(variant, case, folder))
        for name in cold:
            what = f"{case.title}, {name}"
            check_same(what, *cold[name], *warm[name])
            check(all(one["cache_hits"] == 0 for one in cold[name]), f"{what}: a first process found full caches")
            check(dry or all(one["cache_hits"] > 0 for one in warm[name]), f"{what}: a second process compiled again")
            before, after = (statistics.median(one["seconds"] for one in runs[name]) for runs in (cold, warm))
            passes = statistics.median(one["analysis"] for one in warm[name])
            print(f"{what}: cold {before:.1f} s, warm {after:.1f} s of which {passes:.1f} s are our passes", flush=True)
            anchor = f"its first process, {clock()}, same run"
            rows.append({"case": what, "us": after * 1e6, "anchor": anchor, "anchor_us": before * 1e6})
    return rows


if __name__ == "__main__":
    dry_run = partial(run, cases=CASES[:1], repeats=1, dry=True)
    compiled.command("warm_start", run, dry_run)
