"""Block-scaled FP8 products of groups with room for 4096 rows, few of them filled, beside DeepGEMM's masked layout."""

from __future__ import annotations

from typing import Any

from bench.fp8_gemm import ANCHOR, rows_of, spread, time_groups
from bench.timing import warm_up


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every anchored shape; quick keeps every third."""
    warm_up()
    rows = []
    for row in rows_of("masked")[:: 3 if quick else 1]:
        groups, n, k = row["groups"], row["n"], row["k"]
        sizes = spread(groups, row["rows"])
        rows.append(
            {
                "case": f"groups {groups}, rows {row['rows']} of {row['room']} each, n {n}, k {k}, e4m3 to bf16",
                "us": round(time_groups("masked", sizes, n, k, row["room"], row["expected"]), 2),
                "anchor": ANCHOR,
                "anchor_us": row["kernel_us"],
            }
        )
    return rows
