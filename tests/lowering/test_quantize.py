"""`dsinfra::quantize_1x128` and `silu_mul_quantize_1x128` on the CPU, against blocks that are quantised one by one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import block_scales, select
from tests.lowering import experts_oracle
from tests.lowering.graphs import compile_counting

QUANTIZE = torch.ops.dsinfra.quantize_1x128.default
SILU_MUL = torch.ops.dsinfra.silu_mul_quantize_1x128.default
SIZES = {"usual": (5, 256), "partial-block": (4, 200), "narrow": (3, 1), "one-row": (1, 128), "no-row": (0, 256)}


def rows(M, K, dtype=torch.float32, seed=0):
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_matches_oracle_bit_for_bit(sizes, dtype):
    x = rows(*sizes, dtype)
    q, scale = QUANTIZE(x)
    expected_q, expected_scale = experts_oracle.quantize(x)
    M, K = sizes
    assert q.dtype == torch.float8_e4m3fn and q.shape == (M, K) and q.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (-(-K // 128), -(-M // 4) * 4) and scale.is_contiguous()
    assert torch.equal(q.double(), expected_q) and torch.equal(scale[:, :M].t().double(), expected_scale)
    assert torch.all(scale[:, M:] == 0)


def test_is_off_by_half_a_step_at_most():
    x = rows(7, 384) * torch.logspace(-20, 20, 7).unsqueeze(1)
    q, scale = QUANTIZE(x)
    back = block_scales.dequantize_rows(q, scale)
    steps = scale[:, :7].t().repeat_interleave(128, 1)
    assert torch.all((back - x).abs() <= torch.maximum(x.abs() * 2**-4, steps * 2**-10) * (1 + 1e-6))


def test_the_largest_of_a_block_is_448():
    q, scale = QUANTIZE(rows(6, 300))
    padded = torch.nn.functional.pad(q.float().abs(), (0, 84)).view(6, 3, 128)
    assert torch.all(padded.amax(-1) == 448)


def test_blocks_of_zeros_tiny_and_not_finite_values():
    x = torch.zeros(5, 256)
    x[1, 3], x[2, 130], x[3, 7], x[4, 200] = 1e-42, 3e38, float("nan"), -float("inf")
    x[3, 9] = x[4, 201] = 1.0
    q, scale = QUANTIZE(x)
    back = block_scales.dequantize_rows(q, scale)
    assert torch.all(q[0].float() == 0) and torch.isfinite(scale[:, :3]).all()
    assert torch.isfinite(back[:3]).all() and abs(back[2, 130] - 3e38) < 1e37
    assert not torch.isfinite(back[3, 7]) and not torch.isfinite(back[4, 200])
    assert torch.isfinite(back[3, 128:]).all() and torch.isfinite(back[4, :128]).all()


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_silu_mul_matches_oracle(sizes, strided):
    M, F = sizes
    gate_up = rows(M, 2 * F + 3, torch.bfloat16)[:, 3:] if strided else rows(M, 2 * F, torch.bfloat16)
    q, scale = SILU_MUL(gate_up, None)
    exact = torch.stack(
        [experts_oracle.gated(row.double(), "silu", False, 1.0, 0.0) for row in gate_up] or [torch.zeros(F).double()]
    )[:M]
    back = block_scales.dequantize_rows(q, scale).double()
    # h differs from the exact one by float32's rounding, which may move it across the middle between two FP8 values.
    steps = scale[:, :M].t().repeat_interleave(128, 1)[:, :F].double()
    assert torch.all((back - exact).abs() <= torch.maximum(exact.abs() * 2**-4, steps * 2**-10) * (1 + 1e-4))


@pytest.mark.parametrize("end", [0, 2, 5, 9])
def test_rows_past_the_last_end_are_not_looked_at(end):
    gate_up = rows(5, 256)
    expected_q, expected_scale = SILU_MUL(gate_up.masked_fill(torch.arange(5).unsqueeze(1) >= end, 0.0), None)
    gate_up[end:] = float("nan")
    q, scale = SILU_MUL(gate_up, torch.tensor([min(1, end), end], dtype=torch.int32))
    assert torch.equal(q.float(), expected_q.float()) and torch.equal(scale, expected_scale)
    assert torch.all(q[end:].float() == 0)


def test_weights_dequantise_block_by_block():
    w, scale = experts_oracle.fp8_weight(2, 200, 130, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([experts_oracle.weight_of(w[g], scale[g]) for g in range(2)])
    torch.testing.assert_close(block_scales.dequantize_weight(w, scale).double(), expected, rtol=1e-7, atol=0)


def test_opcheck():
    torch.library.opcheck(QUANTIZE, (rows(5, 200, torch.bfloat16),))
    torch.library.opcheck(SILU_MUL, (rows(5, 400, torch.bfloat16), torch.tensor([2, 4], dtype=torch.int32)))
    torch.library.opcheck(SILU_MUL, (rows(5, 400, torch.bfloat16), None))


def test_compiles_once_for_all_lengths():
    compiled, graphs = compile_counting(lambda x: (*QUANTIZE(x), *SILU_MUL(x, None)))
    for M in (3, 5, 12):
        x = rows(M, 256)
        for ours, eager in zip(compiled(x), (*QUANTIZE(x), *SILU_MUL(x, None))):
            assert torch.equal(ours.float(), eager.float()) and ours.stride() == eager.stride()
    assert len(graphs) == 1


def test_autocast_changes_nothing():
    x = rows(3, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, scale = QUANTIZE(x)
    assert torch.equal(q.float(), QUANTIZE(x)[0].float()) and torch.equal(scale, QUANTIZE(x)[1])


def test_flops_and_table():
    with FlopCounterMode(display=False) as counter:
        QUANTIZE(rows(3, 256))
    assert counter.get_total_flops() == 0
    assert select.table("quantize_1x128").names == ("kernel", "reference")
    assert select.choose("silu_mul_quantize_1x128", (rows(3, 4), None))[0].name == "reference"
