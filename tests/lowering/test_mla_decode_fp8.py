"""`dsinfra::mla_decode` over a float8 cache, and the operators that fill and read one, on the CPU."""

import pytest
import torch

import dscompile.lowering.ops.mla_cache  # noqa: F401  (registers the operators)
from dscompile.kernels.mla_cache import BadArguments, dequantize, groups_of, quantize, row_bytes, views
from dscompile.lowering import errors
from tests.kernels.mla_decode_cases import Case, expected, problems
from tests.kernels.mla_fp8_cases import dequantized, make_fp8

OPS = torch.ops.dsinfra
CASE = Case(lengths=(0, 1, 130, 64, 97), heads=3, s_q=2, latent=128, rope=16, capacity=140, dtype=torch.bfloat16)


@pytest.mark.parametrize("layout", ["paged", "plain", "sliced"])
def test_matches_the_dequantized_cache_and_ignores_poison(layout: str) -> None:
    args = make_fp8(CASE.with_(layout=layout), "cpu")
    assert not problems(OPS.mla_decode(*args), expected(dequantized(args)))


def test_append_then_read() -> None:
    pool = torch.zeros(4, 64, 1, row_bytes(256, 16, torch.bfloat16), dtype=torch.uint8)
    latent, k_rope = torch.randn(70, 256).bfloat16(), torch.randn(70, 16).bfloat16()
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    rows = table[0, torch.arange(70) // 64].long() * 64 + torch.arange(70) % 64
    OPS.mla_append_fp8(pool, latent, k_rope, rows)
    got, rope = OPS.mla_read_fp8(pool, table, 256, 16, torch.bfloat16)
    assert got.shape == (1, 128, 256) and torch.equal(rope[0, :70], k_rope) and not got[0, 70:].any()
    assert torch.equal(got[0, :70], dequantize(*quantize(latent), torch.bfloat16))
    assert float((got[0, :70] - latent).norm() / latent.norm()) < 0.04


def test_the_layout_is_656_bytes() -> None:
    assert row_bytes(512, 64, torch.bfloat16) == 656
    pool = torch.zeros(2, 64, 656, dtype=torch.uint8)
    parts = views(pool, 512, 64, torch.bfloat16)
    assert [(p.shape[2], p.storage_offset() * p.element_size()) for p in parts] == [(512, 0), (64, 528), (4, 512)]


def test_operators_agree_with_their_shape_functions() -> None:
    torch.library.opcheck(OPS.mla_decode, make_fp8(CASE, "cpu"), test_utils=("test_faketensor",))
    checks = ("test_schema", "test_faketensor")
    pool = torch.zeros(2, 64, 1, row_bytes(128, 16, torch.bfloat16), dtype=torch.uint8)
    table = torch.zeros(1, 2, dtype=torch.int32)
    rows = torch.randn(3, 128).bfloat16(), torch.randn(3, 16).bfloat16(), torch.arange(3)
    torch.library.opcheck(OPS.mla_append_fp8, (pool, *rows), test_utils=checks)
    torch.library.opcheck(OPS.mla_read_fp8, (pool, table, 128, 16, torch.bfloat16), test_utils=checks)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({9: lambda x: x.double()}, "float64.*float8_e4m3fn and latent_scale as float32"),
        ({2: lambda x: x.bfloat16()}, "bfloat16.*or neither"),
        ({9: lambda x: x[:, :3]}, "one float32 scale"),
        ({9: lambda x: torch.cat([x, x, x], -1)}, "3 scales a row"),
        ({2: lambda x: x[:, :32], 3: lambda x: x[:, :32], 9: lambda x: x[:, :32]}, "pages of 32 rows"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, words: str) -> None:
    args = list(make_fp8(CASE, "cpu"))
    for i, change in changes.items():
        args[i] = change(args[i])
    with pytest.raises(errors.OperatorError, match=words):
        OPS.mla_decode(*args)


def test_pools_of_another_row_length_are_refused() -> None:
    pool = torch.zeros(2, 64, 1, 300, dtype=torch.uint8)
    with pytest.raises(errors.ShapeMismatch, match="takes 164 bytes"):
        OPS.mla_append_fp8(pool, torch.randn(1, 128).half(), torch.randn(1, 16).half(), torch.tensor([0]))
    with pytest.raises(errors.PageTableError, match="take 164 bytes"):
        OPS.mla_read_fp8(pool, torch.zeros(1, 1, dtype=torch.int32), 128, 16, torch.float16)
    with pytest.raises(BadArguments, match="multiples of 128"):
        groups_of(320)
