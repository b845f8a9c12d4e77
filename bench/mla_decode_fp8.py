"""MLA decode over a float8 latent cache (656-byte rows), beside the same kernel family over a bfloat16 cache.

Uniform lengths, paged, whole operator; both timed in the same run. Each case is compared with a float64 reference of
the dequantised cache before it is timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench import results, table
from bench.timing import buffer_sets, graph_us, warm_up
from dscompile.kernels.mla_cache import append_fp8_plain, views
from dscompile.kernels.mla_decode import PAGE, mla_decode
from tests.kernels.mla_decode_cases import SCALE, expected, problems

GPUS = 1
_ANCHOR = "bfloat16 cache, same run"
_CASES = [(b, h, 1, n) for h in (16, 64, 128) for b in (16, 64, 128) for n in (4096, 8192) if b * n <= 128 * 4096]


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every case; quick keeps batch 128 at length 4096."""
    cases = [case for case in _CASES if not quick or (case[0], case[3]) == (128, 4096)]
    pages = max(b * n for b, _, _, n in cases) // PAGE
    cache = (torch.randn(pages, PAGE, 576, device="cuda", dtype=torch.bfloat16) / 10).clamp_(-1, 1)
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
        q_latent, q_rope = (torch.randn(batch, s_q, heads, w, device="cuda").bfloat16() / 10 for w in (512, 64))
        seqlens = torch.full((batch,), seqlen, device="cuda", dtype=torch.int32)
        page_table = torch.randperm(len(latent), device="cuda")[: batch * pages].view(batch, pages).int()
        args = (q_latent, q_rope, latent, k_rope, seqlens, None, page_table, SCALE, True, scales)
        if not calls:
            _check(args, str(case))
        calls.append(lambda args=args: mla_decode(*args, impl=_impl(scales)))
    return graph_us(calls, budget_ms=30.0)


def _impl(scales: torch.Tensor | None) -> str:
    """The best kernel that takes the cache."""
    return "gluon" if scales is None else "triton"


def _check(args: tuple, what: str) -> None:
    q_latent, q_rope, latent, k_rope, seqlens, _, page_table, scale, causal, scales = args
    o, lse = mla_decode(*args, impl=_impl(scales))
    results.check(bool(o.isfinite().all() and lse.isfinite().all()), f"{what}: finite outputs")
    for b in (0, len(seqlens) - 1):
        one, pages = slice(b, b + 1), page_table[b].long()
        wide = latent[pages].double()
        if scales is not None:
            wide = wide * scales[pages].double().repeat_interleave(128, -1)
        table_b = torch.arange(len(pages), device="cuda", dtype=torch.int32)[None]
        part = q_latent[one], q_rope[one], wide, k_rope[pages], seqlens[one], None, table_b, scale, causal
        wrong = problems((o[one], lse[one]), expected(part))
        results.check(not wrong, f"{what}: {'; '.join(wrong)}")


def main() -> None:
    """`python -m bench.mla_decode_fp8`: the table, and with `--json` the rows in a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.mla_decode_fp8", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="batch 128 at length 4096 only")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    with results.checked("mla_decode_fp8"):
        rows = results.stamp("mla_decode_fp8", run(quick=arguments.quick))
    print(f"{rows[0]['card']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}, commit {rows[0]['commit']}")
    print(table.plain(rows))
    if arguments.json:
        arguments.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
