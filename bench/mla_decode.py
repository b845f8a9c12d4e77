"""MLA decode, the whole operator (kernel and combine of splits), beside FlashMLA's kernel and combine.

The 36 cases of the anchor table: bfloat16, paged cache, uniform lengths, once as a caller has it who knows that they
are (a cache of transformers), once with the lengths weighed on the device; and a few of them over two plain tensors.
The anchor's times were taken before, on the card that the anchor's name says: the ratio holds on that card only. Each
case is compared with a float64 reference before it is timed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench import mla_side
from bench.mla_side import values
from bench.timing import buffer_sets, graph_us, warm_up
from dscompile.kernels.mla_decode import PAGE, mla_decode
from tests.kernels.mla_decode_cases import SCALE

GPUS = 1
EQUAL, PAGED, PLAIN = "paged and equally long", "paged", "two plain tensors"
_ANCHORS = Path(__file__).parent / "anchors" / "mla_decode.json"
_PLAIN = {(128, 128, 1, 4096), (128, 64, 1, 4096), (64, 16, 1, 4096), (128, 16, 2, 8192)}  # batch, heads, s_q, seqlen
_QUICK = {(128, heads, s_q, 4096) for heads in (16, 64, 128) for s_q in (1, 2)}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every anchored case; quick keeps batch 128 at length 4096."""
    anchors = json.loads(_ANCHORS.read_text())
    name = f"{anchors['source']}, kernel + combine, from bench/anchors/mla_decode.json"
    chosen = [row for row in anchors["rows"] if not quick or _shape(row) in _QUICK]
    largest = max(row["batch"] * row["seqlen"] for row in chosen)
    cache = values(largest // PAGE, PAGE, 576)
    warm_up()
    cases = [(row, layout) for layout in (EQUAL, PAGED) for row in chosen]
    cases += [(row, PLAIN) for row in chosen if _shape(row) in _PLAIN]
    return [
        {
            "case": _case(*_shape(row), layout),
            "us": round(_time(*_shape(row), layout, cache), 2),
            "anchor": name,
            "anchor_us": round(row["kernel_us"] + row["combine_us"], 2),
        }
        for row, layout in cases
    ]


def _shape(row: dict[str, Any]) -> tuple[int, int, int, int]:
    return row["batch"], row["heads"], row["s_q"], row["seqlen"]


def _case(batch: int, heads: int, s_q: int, seqlen: int, layout: str) -> str:
    return f"batch {batch}, heads {heads}, s_q {s_q}, length {seqlen}, bf16, {layout}"


def _time(batch: int, heads: int, s_q: int, seqlen: int, layout: str, cache: torch.Tensor) -> float:
    """Median microseconds of one call, after a check of the first and the last request of each set of buffers.

    Every set's pages are drawn from the one pool at random; its rows, when plain, are consecutive.
    """
    what = _case(batch, heads, s_q, seqlen, layout)
    pages = seqlen // PAGE
    calls = []
    for _ in range(buffer_sets(batch * seqlen * 576 * cache.element_size())):
        q_latent, q_rope = values(batch, s_q, heads, 512), values(batch, s_q, heads, 64)
        seqlens = torch.full((batch,), seqlen, device="cuda", dtype=torch.int32)
        if layout != PLAIN:
            latent, k_rope = cache[..., :512], cache[..., 512:]
            page_table = torch.randperm(len(cache), device="cuda")[: batch * pages].view(batch, pages).int()
        else:
            rows = cache[: batch * pages].view(batch, seqlen, 576)
            latent, k_rope, page_table = rows[..., :512].contiguous(), rows[..., 512:].contiguous(), None
        args = (q_latent, q_rope, latent, k_rope, seqlens, None, page_table, SCALE, True)
        options = {"impl": "gluon", "equal_lengths": layout == EQUAL}
        mla_side.check(args, what, (0, batch - 1), **options)
        calls.append(lambda args=args, options=options: mla_decode(*args, **options))
    return graph_us(calls)


def _group(row: Mapping[str, Any]) -> str:
    _, heads, s_q, _, _, layout = row["case"].split(", ")
    return f"{heads}, {s_q}, {layout}"


if __name__ == "__main__":
    mla_side.command("mla_decode", __doc__, run, _group)
