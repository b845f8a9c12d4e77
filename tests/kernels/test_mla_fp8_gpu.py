"""The float8 latent cache on a GPU: bytes that are appended, decode over 656-byte rows, graphs, repeatability."""

import pytest
import torch

from dscompile.kernels.mla_cache import append_fp8, append_fp8_plain, row_bytes
from dscompile.kernels.mla_decode import mla_decode
from tests.kernels.mla_decode_cases import LAYOUTS, Case, expected, problems
from tests.kernels.mla_fp8_cases import dequantized, make_fp8

pytestmark = pytest.mark.gpu

RAGGED = (0, 1, 2, 31, 32, 33, 63, 64, 65, 500, 999, 1000)
BASE = Case(lengths=RAGGED)


@pytest.fixture
def impl() -> str:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"hopper: this device has compute capability {torch.cuda.get_device_capability()}")
    return "triton"


def compare(case: Case, impl: str, **options: object) -> None:
    args = make_fp8(case, "cuda")
    assert not problems(mla_decode(*args, impl=impl, **options), expected(dequantized(args)), case.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize(("heads", "s_q"), [(1, 1), (16, 1), (20, 3), (64, 1), (128, 1), (128, 2)])
def test_shapes(heads: int, s_q: int, splits: int | None, dtype: torch.dtype, impl: str) -> None:
    layout = LAYOUTS[(heads + s_q) % 3]
    compare(BASE.with_(heads=heads, s_q=s_q, dtype=dtype, layout=layout), impl, splits=splits)


@pytest.mark.parametrize("mask", [None, (1, 1), (12, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_masks(layout: str, mask: tuple[int, int] | None, impl: str) -> None:
    compare(BASE.with_(layout=layout, s_q=3, heads=20, mask=mask, causal=mask is None), impl)


def test_long_requests_go_round_the_stages(impl: str) -> None:
    compare(BASE.with_(lengths=(8192, 8191, 8129, 4097, 3), capacity=8192, s_q=2, heads=64), impl, splits=1)
    compare(BASE.with_(lengths=(131072, 7), capacity=131072), impl)


def test_a_request_does_not_depend_on_its_neighbours(impl: str) -> None:
    args = make_fp8(BASE.with_(lengths=(3000, 0, 1100, 7), capacity=3000), "cuda")
    o, lse = mla_decode(*args, impl=impl, batch_invariant=True)
    q_latent, q_rope, latent, rope, seqlens, mask, table, *rest = args
    for b in range(4):
        one = slice(b, b + 1)
        part = q_latent[one], q_rope[one], latent, rope, seqlens[one], mask, table[one]
        o_b, lse_b = mla_decode(*part, *rest, impl=impl, batch_invariant=True)
        assert torch.equal(o_b[0], o[b]) and torch.equal(lse_b[0], lse[b])


def test_a_cuda_graph_appends_and_attends(impl: str) -> None:
    """A token appended and attended to within one graph, whose lengths and rows change between replays."""
    args = make_fp8(BASE.with_(lengths=(900, 5, 64), capacity=1000, layout="sliced"), "cuda")
    q_latent, q_rope, latent8, _, seqlens, *_ = args
    pool = latent8.view(torch.uint8).as_strided((3, 1000, 656), (656000, 656, 1))
    latent, k_rope = torch.randn(3, 512, device="cuda").bfloat16(), torch.randn(3, 64, device="cuda").bfloat16()
    rows = torch.zeros(3, dtype=torch.int64, device="cuda")

    def step() -> tuple:
        append_fp8(pool, latent, k_rope, rows)
        return mla_decode(*args, impl=impl)

    rows.copy_(torch.arange(3, device="cuda") * 1000 + seqlens)
    seqlens.add_(1)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(3):
        latent.normal_().div_(10)  # as large as the others
        rows.copy_(torch.arange(3, device="cuda") * 1000 + seqlens)
        seqlens.add_(1)
        graph.replay()
        torch.cuda.synchronize()
        assert not problems(got, expected(dequantized(args)))


def test_runs_agree_in_every_bit(impl: str) -> None:
    args = make_fp8(BASE.with_(s_q=2, heads=128), "cuda")
    first = mla_decode(*args, impl=impl)
    for _ in range(20):
        again = mla_decode(*args, impl=impl)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_appended_bytes(dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"hopper: this device has compute capability {torch.cuda.get_device_capability()}")
    g = torch.Generator(device="cuda").manual_seed(0)
    latent = torch.randn(999, 512, generator=g, device="cuda") * torch.logspace(-4, 4, 999, device="cuda")[:, None]
    latent[5, :128] = 0
    latent, k_rope = latent.to(dtype), torch.randn(999, 64, generator=g, device="cuda").to(dtype)
    rows = torch.randperm(1280, generator=g, device="cuda")[:999]
    rows[7] = -1
    pools = [torch.full((20, 64, 1, row_bytes(512, 64, dtype)), 77, dtype=torch.uint8, device="cuda") for _ in range(2)]
    append_fp8(pools[0], latent, k_rope, rows)
    append_fp8_plain(pools[1], latent, k_rope, rows)
    assert torch.equal(*pools)
