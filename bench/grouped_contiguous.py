"""Block-scaled FP8 products by groups of consecutive rows, unpadded, beside DeepGEMM's contiguous layout.

The anchor's groups are padded to 128 rows each, on the host; ours are as long as they are, their ends read on the
device. Both have the same number of valid rows, in sizes uneven by up to 30 %.
"""

from __future__ import annotations

from typing import Any

from bench.fp8_gemm import ANCHOR, rows_of, spread, time_groups
from bench.timing import warm_up


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every anchored shape; quick keeps every third."""
    warm_up()
    return [
        {
            "case": f"groups {row['groups']}, rows {row['rows']}, n {row['n']}, k {row['k']}, e4m3 to bf16",
            "us": round(time_groups("ends", spread(row["groups"], row["rows"]), row["n"], row["k"]), 2),
            "anchor": ANCHOR,
            "anchor_us": row["kernel_us"],
        }
        for row in rows_of("contiguous")[:: 3 if quick else 1]
    ]
