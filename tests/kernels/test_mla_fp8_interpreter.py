"""The float8 latent cache in Triton's interpreter: bytes that are appended, and decode over them."""

import pytest
import torch

from dscompile.kernels.mla_cache import append_fp8, append_fp8_plain, dequantize, quantize, row_bytes, views
from dscompile.kernels.mla_decode import mla_decode
from tests.kernels.mla_decode_cases import Case, expected, problems
from tests.kernels.mla_fp8_cases import dequantized, make_fp8

pytestmark = pytest.mark.interpreter

SMALL = Case(lengths=(0, 1, 300, 150, 64), heads=5, latent=32, rope=16, capacity=300, dtype=torch.float16)


@pytest.mark.parametrize("splits", [None, 2])
@pytest.mark.parametrize(("layout", "s_q"), [("paged", 1), ("plain", 2), ("sliced", 3)])
def test_decode(layout: str, s_q: int, splits: int | None) -> None:
    args = make_fp8(SMALL.with_(layout=layout, s_q=s_q), "cpu")
    assert not problems(mla_decode(*args, impl="triton", splits=splits), expected(dequantized(args)))


@pytest.mark.parametrize(("latent", "rope"), [(384, 32), (4, 0)], ids=str)
def test_decode_of_other_widths(latent: int, rope: int) -> None:
    args = make_fp8(SMALL.with_(latent=latent, rope=rope, heads=3, lengths=(0, 65, 70, 5), capacity=70), "cpu")
    assert not problems(mla_decode(*args, impl="triton"), expected(dequantized(args)))


def test_decode_with_four_scales_and_a_mask() -> None:
    args = make_fp8(SMALL.with_(latent=512, rope=64, mask=(5, 1), lengths=(0, 70, 65, 5, 64), capacity=70), "cpu")
    assert not problems(mla_decode(*args, impl="triton"), expected(dequantized(args)))


def test_appended_bytes() -> None:
    """Both versions write the same scales and rope. The interpreter's own rounding to float8 is off for a few values,
    by half where a mantissa overflows: all bytes are compared on a GPU (test_mla_fp8_gpu.py)."""
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(9, 256, generator=g) * torch.logspace(-30, 30, 9)[:, None]
    latent[1, :128] = 0
    latent[2, 0], latent[2, 1:128] = 448 * 4.0, 0.0
    k_rope = torch.randn(9, 16, generator=g)
    rows = torch.tensor([5, 3, -1, 11, 0, 2, 7, 8, 10])
    pools = [torch.full((3, 4, 1, row_bytes(256, 16, torch.float32)), 77, dtype=torch.uint8) for _ in range(2)]
    append_fp8(pools[0], latent, k_rope, rows)
    append_fp8_plain(pools[1], latent, k_rope, rows)
    got, want = (views(pool, 256, 16, torch.float32) for pool in pools)
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])
    written = [r for r in rows.tolist() if r >= 0]
    x, y = (p[0].flatten(0, 2)[written].float() for p in (got, want))
    assert ((x - y).abs() <= y.abs() / 2 + 2**-9).all() and (x == y).float().mean() > 0.95
    untouched = [i for i in range(12) if i not in written]
    assert all((pool.flatten(0, 2)[untouched] == 77).all() for pool in pools)


def test_quantize_is_the_nearest_value_under_a_power_of_two() -> None:
    x = torch.randn(50, 512, generator=torch.Generator().manual_seed(1)) * torch.logspace(-8, 8, 50)[:, None]
    q, scale = quantize(x)
    assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))
    largest = x.unflatten(-1, (4, 128)).abs().amax(-1) / scale
    assert (largest <= 448).all() and (largest > 224).all()
    back = dequantize(q, scale, torch.float32)
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, scale.repeat_interleave(128, 1) * 2**-10)).all()
