"""Grouped bfloat16 products of few rows an expert, 1.5 to 128, beside torch._grouped_mm."""

from __future__ import annotations

from typing import Any

from bench.grouped_gemm import measure
from bench.timing import warm_up

# experts, rows, n, k
CASES = (
    (64, 96, 2816, 2048),
    (64, 1024, 4096, 7168),
    (64, 1024, 7168, 2048),
    (64, 4096, 2816, 2048),
    (64, 8192, 4096, 7168),
    (64, 8192, 7168, 2048),
)


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every case; quick keeps the first two."""
    warm_up()
    return [measure(*case) for case in CASES[: 2 if quick else None]]
