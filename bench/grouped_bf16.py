"""Grouped bfloat16 products of prefill, hundreds of rows an expert, beside torch._grouped_mm; with SwiGLU too."""

from __future__ import annotations

from typing import Any

from bench.grouped_gemm import measure
from bench.timing import warm_up

# experts, rows, n, k, fused SwiGLU
CASES = (
    (64, 24576, 2816, 2048, False),
    (64, 24576, 2816, 2048, True),
    (64, 24576, 2048, 1408, False),
    (64, 32768, 4096, 7168, True),
    (64, 32768, 7168, 2048, False),
)


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every case; quick keeps the first two."""
    warm_up()
    return [measure(*case) for case in CASES[: 2 if quick else None]]
