"""Block-scaled FP8 GEMM of 4096 rows beside DeepGEMM's kernel."""

from __future__ import annotations

from typing import Any

from bench.fp8_gemm import ANCHOR, rows_of, time_dense
from bench.timing import warm_up


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every anchored shape of more than 128 rows; quick keeps every third."""
    warm_up()
    shapes = [row for row in rows_of("dense") if row["m"] > 128][:: 3 if quick else 1]
    return [
        {
            "case": f"m {row['m']}, n {row['n']}, k {row['k']}, e4m3 to bf16",
            "us": round(time_dense(row["m"], row["n"], row["k"]), 2),
            "anchor": ANCHOR,
            "anchor_us": row["kernel_us"],
        }
        for row in shapes
    ]
