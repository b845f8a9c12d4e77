"""Combine of expert parallelism: sending back, waiting and the sum together, beside NCCL and DeepEP.

4096 tokens a rank of width 7168, top 8 of 256 experts, bfloat16, by the number of multiprocessors that send.
"""

from __future__ import annotations

from typing import Any

from bench.exchange_side import run_part

GPUS = 2


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every case; bench/exchange_side.py checks and times them in a process a GPU."""
    return run_part("combine", quick)
