"""MLA decode of ragged batches: dealt by lengths, beside our uniform splits and beside a uniform batch as large.

Lengths are lognormal (sigma 1) around a mean, batches of 1 to 128 requests, bfloat16, paged. Two anchors stand beside
each case, both timed in the same run: the launch that cuts every request into as many parts (`splits`, chosen from the
capacity as a launch without lengths must), and the same kernel over a batch of equal lengths with as many keys in all.
Each case is compared with a float64 reference before it is timed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench import mla_side
from bench.mla_side import values
from bench.timing import buffer_sets, graph_us, warm_up
from dscompile.kernels.mla_decode import MAX_SPLITS, PAGE, PART_ROWS, mla_decode, pick_splits
from tests.kernels.mla_decode_cases import SCALE

GPUS = 1
_SPLITS = "equal splits of every request, same kernel, same run"
_UNIFORM = "uniform batch of as many keys, same kernel, same run"


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every case; quick keeps batches 16 and 128 at means 1024 and 4096."""
    means, batches = ((1024, 4096), (16, 128)) if quick else ((1024, 2048, 4096, 8192), (1, 4, 16, 64, 128))
    cases = [(batch, heads, mean) for heads in (16, 128) for mean in means for batch in batches]
    drawn = {case: lengths_of(case[0], case[2]) for case in cases}
    cache = values(2 * max(sum(-(-n // PAGE) for n in lengths) for lengths in drawn.values()), PAGE, 576)
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


def _time(what: str, lengths: Sequence[int], heads: int, cache: torch.Tensor, splits: int | None) -> float:
    """Median microseconds of one call, after a check of the shortest, the longest and the last request."""
    batch, pages = len(lengths), [-(-n // PAGE) for n in lengths]
    calls = []
    for _ in range(buffer_sets(sum(pages) * PAGE * 576 * 2)):
        q_latent, q_rope = values(batch, 1, heads, 512), values(batch, 1, heads, 64)
        seqlens = torch.tensor(lengths, device="cuda", dtype=torch.int32)
        owned = torch.randperm(len(cache), device="cuda")[: sum(pages)].int().split(pages)
        page_table = torch.nn.utils.rnn.pad_sequence(list(owned), batch_first=True, padding_value=1 << 30)
        args = (q_latent, q_rope, cache[..., :512], cache[..., 512:], seqlens, None, page_table, SCALE, True)
        if not calls:
            some = int(seqlens.argmin()), int(seqlens.argmax()), batch - 1
            mla_side.check(args, what, some, impl="gluon", splits=splits)
        calls.append(lambda args=args: mla_decode(*args, impl="gluon", splits=splits))
    return graph_us(calls, budget_ms=30.0)


def _group(row: Mapping[str, Any]) -> str:
    return f"{row['case'].split(', ')[1]}, against {row['anchor'].split(' of ')[0]}"


if __name__ == "__main__":
    mla_side.command("mla_decode_ragged", __doc__, run, _group)
