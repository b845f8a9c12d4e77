"""SwiGLU and FP8 quantisation in blocks of 1 x 128 in one pass, beside Inductor's code for the same formula.

bfloat16 gate_up [M, 2F] to float8_e4m3fn [M, F] with scales in the GEMM's layout. Both are checked against the formula
in float32 before they are timed; the first is this project's kernel, the anchor `torch.compile` in its default mode.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.results import check
from bench.timing import buffer_sets, graph_us, warm_up
from dscompile.kernels.quantize import silu_mul_quantize_1x128
from tests.kernels.moe_cases import quantize_reference, silu_mul, steps_apart

GPUS = 1
_ANCHOR = "inductor default mode, same run"
_CASES = [(rows, 2048) for rows in (8, 64, 1024, 8192, 32768)] + [(8192, 768), (32768, 1408)]  # M, F
_QUICK = [(64, 2048), (8192, 2048)]


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of every case; quick takes two."""
    warm_up()
    compiled = torch.compile(_formula, dynamic=False)
    rows = []
    for tokens, width in _QUICK if quick else _CASES:
        torch._dynamo.reset()
        shape = tokens, 2 * width
        inputs = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            for _ in range(min(8, buffer_sets(tokens * width * 5)))
        ]
        case = f"silu(gate) * up to FP8, [{tokens}, 2 x {width}] bf16"
        for name, call in (("kernel", silu_mul_quantize_1x128), ("inductor", compiled)):
            _check(call(inputs[0]), inputs[0], f"{case}, {name}")
        ours, anchor = (
            graph_us([lambda x=x, call=call: call(x) for x in inputs]) for call in (silu_mul_quantize_1x128, compiled)
        )
        rows.append({"case": case, "us": round(ours, 2), "anchor": _ANCHOR, "anchor_us": round(anchor, 2)})
    return rows


def _formula(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the kernel, for columns and rows that need no padding."""
    h = silu_mul(gate_up).view(len(gate_up), -1, 128)
    scale = h.abs().amax(2) / 448
    q = (h / scale[:, :, None]).to(torch.float8_e4m3fn).flatten(1)
    return q, scale.t().contiguous()


def _check(got: tuple[torch.Tensor, torch.Tensor], gate_up: torch.Tensor, what: str) -> None:
    q, scale = quantize_reference(silu_mul(gate_up))
    check(bool(torch.isclose(got[1], scale, rtol=1e-5, atol=0).all()), f"{what}: scales")
    apart = steps_apart(got[0], q)
    check(int(apart.max()) <= 1 and float(apart.float().mean()) < 1e-3, f"{what}: values")
