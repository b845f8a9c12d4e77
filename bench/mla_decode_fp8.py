"""MLA decode over a float8 latent cache (656-byte rows), beside the same kernel family over a bfloat16 cache.

Uniform lengths, paged, whole operator; both timed in the same run. Each case is compared with a float64 reference of
the dequantised cache before it is timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bench import mla_side
from bench.mla_side import values
from bench.timing import buffer_sets, graph_us, warm_up
from dscompile.kernels.mla_cache import append_fp8_plain, views
from dscompile.kernels.mla_decode import PAGE, mla_decode
from tests.kernels.mla_decode_cases import SCALE

GPUS = 1
_ANCHOR = "bfloat16 cache, same run"
_CASES = [(b, h, 1, n) for h in (16, 64, 128) for b in (16, 64, 128) for n in (4096, 8192) if b * n <= 128 * 4096]


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every case; quick keeps batch 128 at length 4096."""
    cases = [case for case in _CASES if not quick or (case[0], case[3]) == (128, 4096)]
    pages = max(b * n for b, _, _, n in cases) // PAGE
    cache = values(pages, PAGE, 576)
    pool = torch.empty(pages, PAGE, 656, device="cuda", dtype=torch.uint8)
    for some in torch.arange(pages * PAGE, device="cuda").split(1 << 18):
        rows = cache.flatten(0, 1)[some]
        append_fp8_plain(pool, rows[:, :512], rows[:, 512:].contiguous(), some)
    wide = cache[..., :512], cache[..., 512:], None
    narrow = views(pool, 512, 64, torch.bfloat16)
    warm_up()
    return [
        {
            "case": f"batch {b}, heads {h}, s_q {s}, length {n}, e4m3 with bf16 rope, paged",
            "us": round(_time((b, h, s, n), narrow), 2),
            "anchor": _ANCHOR,
            "anchor_us": round(_time((b, h, s, n), wide), 2),
        }
        for b, h, s, n in cases
    ]


def _time(case: tuple[int, int, int, int], cache: tuple) -> float:
    """Median microseconds of one call, after a check of the first and the last request."""
    batch, heads, s_q, seqlen = case
    latent, k_rope, scales = cache
    pages, calls = seqlen // PAGE, []
    for _ in range(buffer_sets(batch * seqlen * 656)):
        q_latent, q_rope = values(batch, s_q, heads, 512), values(batch, s_q, heads, 64)
        seqlens = torch.full((batch,), seqlen, device="cuda", dtype=torch.int32)
        page_table = torch.randperm(len(latent), device="cuda")[: batch * pages].view(batch, pages).int()
        args = (q_latent, q_rope, latent, k_rope, seqlens, None, page_table, SCALE, True, scales)
        if not calls:
            mla_side.check(args, str(case), (0, batch - 1), impl=_impl(scales))
        calls.append(lambda args=args: mla_decode(*args, impl=_impl(scales)))
    return graph_us(calls, budget_ms=30.0)


def _impl(scales: torch.Tensor | None) -> str:
    """The best kernel that takes the cache."""
    return "gluon" if scales is None else "triton"


def _group(row: Mapping[str, Any]) -> str:
    return str(row["case"].split(", ")[1])


if __name__ == "__main__":
    mla_side.command("mla_decode_fp8", __doc__, run, _group)
