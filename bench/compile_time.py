"""Seconds of a model's first call from empty caches: dsinfra beside Inductor, and the share of our passes.

Both variants run in turn, each time in a new process with an empty cache folder; rows are medians. `analysis` stands
beside what Inductor takes for the whole call: it is what a model pays in which nothing is found.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from typing import Any

import torch

from bench import compiled
from bench.first_call import MICRO, Case, check_same, clock, measure
from bench.results import check

GPUS = 0

ZOO = (*map(Case, MICRO), Case("deepseek_v3", "decode"), Case("deepseek_v3", "train"))
LARGE = (Case("micro61"), Case("v2lite"))


def run(
    quick: bool = False, cases: tuple[Case, ...] | None = None, repeats: int = 3, dry: bool = False
) -> list[dict[str, Any]]:
    """Two rows a model: the whole first call, and our passes alone; large models only on a card, quick leaves them."""
    large = () if quick or not torch.cuda.is_available() else LARGE
    rows = []
    for case in cases or (*ZOO, *large):
        found: dict[str, list[dict[str, Any]]] = {"inductor": [], "dsinfra": []}
        for _ in range(1 if quick else repeats):
            for variant in compiled.variants(None, dry):
                with tempfile.TemporaryDirectory() as folder:
                    found[variant.name].append(measure(variant, case, folder))
        check_same(case.title, *found["inductor"], *found["dsinfra"])
        for one in (*found["inductor"], *found["dsinfra"]):
            check(one["cache_hits"] == 0, f"{case.title}: a first process found full caches")
        lowered = {one["matched"] for one in found["dsinfra"]}
        check(len(lowered) == 1 and lowered != {0}, f"{case.title}: {lowered} sites lowered")
        rows += _rows(case, found)
    return rows


def _rows(case: Case, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    ours, anchor = (statistics.median(one["seconds"] for one in found[name]) for name in ("dsinfra", "inductor"))
    passes = statistics.median(one["analysis"] for one in found["dsinfra"])
    named = f"inductor, {clock()}, same run"
    print(f"{case.title}: dsinfra {ours:.1f} s, inductor {anchor:.1f} s, ratio {ours / anchor:.2f}")
    shares = found["dsinfra"][-1]["passes"]
    print("  passes: " + ", ".join(f"{key} {value:.2f} s" for key, value in shares.items()), flush=True)
    return [
        {"case": case.title, "us": ours * 1e6, "anchor": named, "anchor_us": anchor * 1e6},
        {"case": f"{case.title}: analysis", "us": passes * 1e6, "anchor": named, "anchor_us": anchor * 1e6},
    ]


if __name__ == "__main__":
    dry_run = partial(run, cases=(Case("deepseek_v3"),), repeats=1, dry=True)
    compiled.command("compile_time", run, dry_run)
