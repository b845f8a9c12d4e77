"""Shared by the benchmarks of 16-bit grouped products: problems, checks, and torch's own operators beside ours.

`python -m bench.grouped_gemm` measures each kernel at the sizes of grouped_bf16 and says what gemm_plan.LARGE_GROUPS
should be; it exits with 0 when that is "gluon".

Rows are routed at random, as a router without preferences would, so that groups are uneven. Both sides run in the same
process on the same tensors, each captured in a CUDA graph. With SwiGLU the anchor is torch's product followed by what
Inductor fuses into one kernel: silu(gate) * up, read from and written to memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench import results
from bench.timing import buffer_sets, graph_us, warm_up
from dscompile.kernels import gemm
from dscompile.kernels.gemm_plan import GemmPlan, gluon_plan

BF16 = torch.bfloat16


def measure(experts: int, rows: int, n: int, k: int, swiglu: bool = False) -> dict[str, Any]:
    """A row: bfloat16, `rows` of them over `experts` experts, w [experts, n, k]."""
    case = f"experts {experts}, rows {rows}, n {n}, k {k}, bf16" + (", with SwiGLU" if swiglu else "")
    ours, theirs = [], []
    for seed in range(buffer_sets(2 * (experts * n * k + rows * (n + k)))):
        x, w, ends = _problem(experts, rows, n, k, seed)
        _check(x, w, ends, swiglu, case)
        ours.append(lambda x=x, w=w, ends=ends: gemm.grouped(x, w, ends, swiglu=swiglu))
        theirs.append(lambda x=x, w=w, ends=ends: _torch(x, w, ends, swiglu))
    name = "torch._grouped_mm" + (" and a compiled silu(gate) * up" if swiglu else "") + ", same run"
    return {"case": case, "us": round(graph_us(ours), 2), "anchor": name, "anchor_us": round(graph_us(theirs), 2)}


def _problem(experts: int, rows: int, n: int, k: int, seed: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator(device="cuda").manual_seed(seed)
    choice = torch.randint(experts, (rows,), generator=g, device="cuda")
    ends = torch.bincount(choice, minlength=experts).cumsum(0).int()
    x = torch.randn(rows, k, generator=g, device="cuda", dtype=BF16)
    w = torch.randn(experts, n, k, generator=g, device="cuda", dtype=BF16) / k**0.5
    return x, w, ends


def _torch(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, swiglu: bool) -> torch.Tensor:
    y = torch._grouped_mm(x, w.transpose(1, 2), offs=ends)
    return _silu_mul(y) if swiglu else y


@torch.compile(dynamic=False)
def _silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


def _check(
    x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, swiglu: bool, what: str, plan: GemmPlan | None = None
) -> None:
    """Every row against float32 products of each group, to bfloat16's rounding."""
    got = gemm.grouped(x, w, ends, swiglu=swiglu, plan=plan)
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            want = x[start:end].float() @ w[group].float().T
            if swiglu:
                gate, up = want.chunk(2, 1)
                want = torch.nn.functional.silu(gate) * up
            results.check_close(got[start:end], want, atol=8e-3, rtol=8e-3, what=f"{what}, group {group}")
        start = end


def compare(experts: int, rows: int, n: int, k: int, swiglu: bool = False) -> dict[str, float]:
    """Median microseconds of each kernel, timed in turns: what comes first finds a cooler card."""
    x, w, ends = _problem(experts, rows, n, k, 0)
    calls: dict[str, Callable[[], object]] = {"torch._grouped_mm": lambda: _torch(x, w, ends, swiglu)}
    for name, plan in (
        ("gluon", gluon_plan(128, 256, BF16)),
        ("small", GemmPlan("small")),
        ("torch", GemmPlan("torch")),
    ):
        if name != "torch":  # which rounds once more with SwiGLU
            _check(x, w, ends, swiglu, f"{name}, rows {rows}, n {n}, k {k}", plan)
        calls[name] = lambda plan=plan: gemm.grouped(x, w, ends, swiglu=swiglu, plan=plan)
    turns = [{name: graph_us([call], budget_ms=20) for name, call in calls.items()} for _ in range(3)]
    return {name: statistics.median(turn[name] for turn in turns) for name in calls}


def main() -> int:
    from bench.grouped_bf16 import CASES

    warm_up()
    faster = True
    for case in CASES:
        us = compare(*case)
        faster &= us["gluon"] < us["torch"]
        print(*case, "  ".join(f"{name} {value:.1f} us" for name, value in us.items()), sep=", ", flush=True)
    print(f'LARGE_GROUPS = "{"gluon" if faster else "torch"}"')
    return 0 if faster else 1


if __name__ == "__main__":
    raise SystemExit(main())
