"""MLA decode, the whole operator (kernel and combine of splits), beside FlashMLA's kernel and combine.

The 36 cases of the anchor table: bfloat16, paged cache, uniform lengths, and a few of them over two plain tensors. The
anchor's times were taken before, on the card that the anchor's name says: the ratio holds on that card only. Each case
is compared with a float64 reference before it is timed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import results, table
from bench.timing import buffer_sets, graph_us, warm_up
from dscompile.kernels.mla_decode import PAGE, mla_decode
from tests.kernels.mla_decode_cases import SCALE, expected, problems

GPUS = 1
_ANCHORS = Path(__file__).parent / "anchors" / "mla_decode.json"
_PLAIN = {(128, 128, 1, 4096), (128, 64, 1, 4096), (64, 16, 1, 4096), (128, 16, 2, 8192)}  # batch, heads, s_q, seqlen
_QUICK = {(128, heads, s_q, 4096) for heads in (16, 64, 128) for s_q in (1, 2)}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every anchored case; quick keeps batch 128 at length 4096."""
    anchors = json.loads(_ANCHORS.read_text())
    name = f"{anchors['source']}, kernel + combine, from bench/anchors/mla_decode.json"
    chosen = [row for row in anchors["rows"] if not quick or _shape(row) in _QUICK]
    largest = max(row["batch"] * row["seqlen"] for row in chosen)
    cache = _values(largest // PAGE, PAGE, 576)
    warm_up()
    cases = [(row, True) for row in chosen] + [(row, False) for row in chosen if _shape(row) in _PLAIN]
    return [
        {
            "case": _case(*_shape(row), paged),
            "us": round(_time(*_shape(row), paged, cache), 2),
            "anchor": name,
            "anchor_us": round(row["kernel_us"] + row["combine_us"], 2),
        }
        for row, paged in cases
    ]


def _shape(row: dict[str, Any]) -> tuple[int, int, int, int]:
    return row["batch"], row["heads"], row["s_q"], row["seqlen"]


def _case(batch: int, heads: int, s_q: int, seqlen: int, paged: bool) -> str:
    layout = "paged" if paged else "two plain tensors"
    return f"batch {batch}, heads {heads}, s_q {s_q}, length {seqlen}, bf16, {layout}"


def _values(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, device="cuda", dtype=torch.bfloat16) / 10).clamp_(-1, 1)


def _time(batch: int, heads: int, s_q: int, seqlen: int, paged: bool, cache: torch.Tensor) -> float:
    """Median microseconds of one call, after a check of the first and the last request of each set of buffers.

    Every set's pages are drawn from the one pool at random; its rows, when plain, are consecutive.
    """
    what = _case(batch, heads, s_q, seqlen, paged)
    pages = seqlen // PAGE
    calls = []
    for _ in range(buffer_sets(batch * seqlen * 576 * cache.element_size())):
        q_latent, q_rope = _values(batch, s_q, heads, 512), _values(batch, s_q, heads, 64)
        seqlens = torch.full((batch,), seqlen, device="cuda", dtype=torch.int32)
        if paged:
            latent, k_rope = cache[..., :512], cache[..., 512:]
            page_table = torch.randperm(len(cache), device="cuda")[: batch * pages].view(batch, pages).int()
        else:
            rows = cache[: batch * pages].view(batch, seqlen, 576)
            latent, k_rope, page_table = rows[..., :512].contiguous(), rows[..., 512:].contiguous(), None
        args = (q_latent, q_rope, latent, k_rope, seqlens, None, page_table, SCALE, True)
        _check(args, what)
        calls.append(lambda args=args: mla_decode(*args, impl="gluon"))
    return graph_us(calls)


def _check(args: tuple, what: str) -> None:
    q_latent, q_rope, latent, k_rope, seqlens, mask, page_table, scale, causal = args
    o, lse = mla_decode(*args, impl="gluon")
    results.check(bool(o.isfinite().all() and lse.isfinite().all()), f"{what}: finite outputs")
    some = torch.tensor([0, len(seqlens) - 1], device="cuda")
    if page_table is None:
        latent, k_rope = latent[some], k_rope[some]
    else:
        page_table = page_table[some]
        # Only the pages of these requests go through float64.
        latent, k_rope = latent[page_table.flatten().long()], k_rope[page_table.flatten().long()]
        page_table = torch.arange(page_table.numel(), device="cuda", dtype=torch.int32).view(page_table.shape)
    want = expected((q_latent[some], q_rope[some], latent, k_rope, seqlens[some], mask, page_table, scale, causal))
    wrong = problems((o[some], lse[some]), want)
    results.check(not wrong, f"{what}: {'; '.join(wrong)}")


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Geometric means of the speed-up by heads, s_q and layout."""
    groups = defaultdict(list)
    for row in rows:
        _, heads, s_q, _, _, layout = row["case"].split(", ")
        groups[f"{heads}, {s_q}, {layout}"].append(row["anchor_us"] / row["us"])
    return {group: math.prod(ratios) ** (1 / len(ratios)) for group, ratios in groups.items()}


def main() -> None:
    """`python -m bench.mla_decode`: the table and its geometric means, and with `--json` the rows in a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.mla_decode", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="batch 128 at length 4096 only")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    with results.checked("mla_decode"):
        rows = results.stamp("mla_decode", run(quick=arguments.quick))
    print(f"{rows[0]['card']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}, commit {rows[0]['commit']}")
    print(table.plain(rows))
    print("\ngeometric means of the speed-up")
    for group, mean in means(rows).items():
        print(f"{mean:6.2f}  {group}")
    if arguments.json:
        arguments.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
