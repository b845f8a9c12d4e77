"""MLA decode of ragged batches: dealt by lengths, beside our uniform splits and beside a uniform batch as large.

Lengths are lognormal (sigma 1) around a mean, batches of 1 to 128 requests, bfloat16, paged. Two anchors stand beside
each case, both timed in the same run: the launch that cuts every request into as many parts (`splits`, chosen from the
capacity as a launch without lengths must), and the same kernel over a batch of equal lengths with as many keys in all.
Each case is compared with a float64 reference before it is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import results, table
from bench.timing import buffer_sets, graph_us, warm_up
from dscompile.kernels.mla_decode import MAX_SPLITS, PAGE, PART_ROWS, mla_decode, pick_splits
from tests.kernels.mla_decode_cases import SCALE, expected, problems

GPUS = 1
_SPLITS = "equal splits of every request, same kernel, same run"
_UNIFORM = "uniform batch of as many keys, same kernel, same run"


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every case; quick keeps batches 16 and 128 at means 1024 and 4096."""
    means, batches = ((1024, 4096), (16, 128)) if quick else ((1024, 2048, 4096, 8192), (1, 4, 16, 64, 128))
    cases = [(batch, heads, mean) for heads in (16, 128) for mean in means for batch in batches]
    drawn = {case: lengths_of(case[0], case[2]) for case in cases}
    cache = _values(2 * max(sum(-(-n // PAGE) for n in lengths) for lengths in drawn.values()), PAGE, 576)
    warm_up()
    rows = []
    for (batch, heads, mean), lengths in drawn.items():
        case = f"batch {batch}, heads {heads}, mean length {mean}, longest {max(lengths)}, bf16, paged"
        us = _time(case, lengths, heads, cache, None)
        splits = _uniform_splits(lengths, heads)
        equal = [-(-sum(lengths) // batch)] * batch
        for anchor, anchor_us in (
            (_SPLITS, _time(f"{case}, {splits} splits", lengths, heads, cache, splits)),
            (_UNIFORM, _time(f"{case}, uniform", equal, heads, cache, None)),
        ):
            rows.append({"case": case, "us": round(us, 2), "anchor": anchor, "anchor_us": round(anchor_us, 2)})
    return rows


def lengths_of(batch: int, mean: int) -> list[int]:
    """Lognormal with that mean, sigma 1, the same on every machine."""
    draw = random.Random(batch * 100003 + mean)
    return [max(1, round(draw.lognormvariate(-0.5, 1.0) * mean)) for _ in range(batch)]


def _uniform_splits(lengths: Sequence[int], heads: int) -> int:
    """As a launch that knows the capacity alone: the table is as wide as the longest request."""
    programs = len(lengths) * -(-heads // 64)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    most = max(4, PART_ROWS // (len(lengths) * heads))
    return pick_splits(programs, -(-max(lengths) // PAGE), sms, min(most, MAX_SPLITS))


def _values(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, device="cuda", dtype=torch.bfloat16) / 10).clamp_(-1, 1)


def _time(what: str, lengths: Sequence[int], heads: int, cache: torch.Tensor, splits: int | None) -> float:
    """Median microseconds of one call, after a check of the shortest, the longest and the last request."""
    batch, pages = len(lengths), [-(-n // PAGE) for n in lengths]
    calls = []
    for _ in range(buffer_sets(sum(pages) * PAGE * 576 * 2)):
        q_latent, q_rope = _values(batch, 1, heads, 512), _values(batch, 1, heads, 64)
        seqlens = torch.tensor(lengths, device="cuda", dtype=torch.int32)
        owned = torch.randperm(len(cache), device="cuda")[: sum(pages)].int().split(pages)
        page_table = torch.nn.utils.rnn.pad_sequence(list(owned), batch_first=True, padding_value=1 << 30)
        args = (q_latent, q_rope, cache[..., :512], cache[..., 512:], seqlens, None, page_table, SCALE, True)
        if not calls:
            _check(args, what, splits)
        calls.append(lambda args=args: mla_decode(*args, impl="gluon", splits=splits))
    return graph_us(calls, budget_ms=30.0)


def _check(args: tuple, what: str, splits: int | None) -> None:
    q_latent, q_rope, latent, k_rope, seqlens, mask, page_table, scale, causal = args
    o, lse = mla_decode(*args, impl="gluon", splits=splits)
    results.check(bool(o.isfinite().all() and lse.isfinite().all()), f"{what}: finite outputs")
    for b in {int(seqlens.argmin()), int(seqlens.argmax()), len(seqlens) - 1}:
        one = slice(b, b + 1)
        pages = page_table[b, : -(-int(seqlens[b]) // PAGE)].long()  # only these go through float64
        table_b = torch.arange(len(pages), device="cuda", dtype=torch.int32)[None]
        part = q_latent[one], q_rope[one], latent[pages], k_rope[pages], seqlens[one], mask, table_b, scale, causal
        wrong = problems((o[one], lse[one]), expected(part))
        results.check(not wrong, f"{what}: {'; '.join(wrong)}")


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Geometric means of the speed-up by heads and anchor."""
    groups = defaultdict(list)
    for row in rows:
        groups[f"{row['case'].split(', ')[1]}, against {row['anchor'].split(' of ')[0]}"].append(
            row["anchor_us"] / row["us"]
        )
    return {group: math.prod(ratios) ** (1 / len(ratios)) for group, ratios in groups.items()}


def main() -> None:
    """`python -m bench.mla_decode_ragged`: the table and its geometric means, and with `--json` the rows in a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.mla_decode_ragged", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two batch sizes and two means")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    with results.checked("mla_decode_ragged"):
        rows = results.stamp("mla_decode_ragged", run(quick=arguments.quick))
    print(f"{rows[0]['card']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}, commit {rows[0]['commit']}")
    print(table.plain(rows))
    print("\ngeometric means of the speed-up")
    for group, mean in means(rows).items():
        print(f"{mean:6.2f}  {group}")
    if arguments.json:
        arguments.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
