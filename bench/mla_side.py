"""What the benchmarks of MLA decode share: values, the check of a call before it is timed, and a command line.

`python -m bench.mla_decode` (or `_ragged`, `_fp8`) prints a benchmark's table without keeping it, for work on the
kernels: `--quick` for fewer cases, `--json FILE` for the rows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import results, table
from dscompile.kernels.mla_decode import PAGE, mla_decode
from tests.kernels.mla_decode_cases import expected, problems


def values(*shape: int) -> torch.Tensor:
    """bfloat16 on the GPU, as the tests draw them."""
    return (torch.randn(shape, device="cuda", dtype=torch.bfloat16) / 10).clamp_(-1, 1)


def check(args: tuple, what: str, requests: Iterable[int], **options: Any) -> None:
    """Compare some requests of a call with a float64 reference over their own rows; `options` are the kernel's.

    Raises:
        bench.results.CheckFailed: an output is not finite, or outside of the tests' bars.
    """
    q_latent, q_rope, latent, k_rope, seqlens, mask, page_table, scale, causal, *scales = args
    o, lse = mla_decode(*args, **options)
    results.check(bool(o.isfinite().all() and not lse.isnan().any()), f"{what}: finite outputs")
    for b in dict.fromkeys(requests):
        one = slice(b, b + 1)
        if page_table is None:
            own, table_b = one, None
        else:
            own = page_table[b, : -(-int(seqlens[b]) // PAGE)].long()  # only these pages go through float64
            table_b = torch.arange(len(own), device=own.device, dtype=torch.int32)[None]
        wide = latent[own].double()
        if scales and scales[0] is not None:
            wide = wide * scales[0][own].double().repeat_interleave(wide.shape[-1] // scales[0].shape[-1], -1)
        part = q_latent[one], q_rope[one], wide, k_rope[own], seqlens[one], mask, table_b, scale, causal
        wrong = problems((o[one], lse[one]), expected(part))
        results.check(not wrong, f"{what}, request {b}: {'; '.join(wrong)}")


def means(rows: Sequence[Mapping[str, Any]], group: Callable[[Mapping[str, Any]], str]) -> dict[str, float]:
    """Geometric means of the speed-up over the rows that `group` gives one name."""
    ratios = defaultdict(list)
    for row in rows:
        ratios[group(row)].append(row["anchor_us"] / row["us"])
    return {name: math.prod(found) ** (1 / len(found)) for name, found in ratios.items()}


def command(
    name: str,
    description: str | None,
    run: Callable[[bool], list[dict[str, Any]]],
    group: Callable[[Mapping[str, Any]], str],
) -> None:
    """The command line of the benchmark `name`: its table, the geometric means of its groups, and the rows in a file.

    Raises:
        bench.results.CheckFailed: its outputs were wrong, or it compared none.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    with results.checked(name):
        rows = results.stamp(name, run(arguments.quick))
    print(f"{rows[0]['card']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}, commit {rows[0]['commit']}")
    print(table.plain(rows))
    print("\ngeometric means of the speed-up")
    for what, mean in means(rows, group).items():
        print(f"{mean:6.2f}  {what}")
    if arguments.json:
        arguments.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
