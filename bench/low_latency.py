"""Dispatch in FP8 and combine in bfloat16 of few tokens, one after the other in a CUDA graph, beside NCCL and DeepEP.

1 to 256 tokens a rank of width 7168, top 8 of 256 experts; the combine sends rows that were made before.
"""

from __future__ import annotations

from typing import Any

from bench.exchange_side import run_part

GPUS = 2


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every case; bench/exchange_side.py checks and times them in a process a GPU."""
    return run_part("low_latency", quick)
