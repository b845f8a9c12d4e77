"""Both MLA decode kernels on a GPU over poisoned caches: values, repeatability, CUDA graphs whose lengths change."""

import pytest
import torch

import dscompile.lowering.ops  # noqa: F401  (registers the operator)
from dscompile.kernels.mla_decode import mla_decode
from dscompile.lowering import select
from tests.kernels.mla_decode_cases import LAYOUTS, Case, expected, make, problems

pytestmark = pytest.mark.gpu

RAGGED = (0, 1, 2, 64, 65, 500, 999, 1000)
BASE = Case(lengths=RAGGED)


@pytest.fixture(params=["gluon", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"hopper: this device has compute capability {torch.cuda.get_device_capability()}")
    return request.param


def compare(case: Case, impl: str, splits: int | None = None) -> None:
    args = make(case, "cuda")
    assert not problems(mla_decode(*args, impl=impl, splits=splits), expected(args), case.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("s_q", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 16, 20, 64, 128])
def test_shapes(heads: int, s_q: int, splits: int, dtype: torch.dtype, impl: str) -> None:
    compare(BASE.with_(heads=heads, s_q=s_q, dtype=dtype, layout=LAYOUTS[(heads + s_q + splits) % 3]), impl, splits)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("splits", [1, 2, 3, 8, 32, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_splits(layout: str, splits: int | None, causal: bool, impl: str) -> None:
    compare(BASE.with_(layout=layout, s_q=3, heads=20, causal=causal), impl, splits)


@pytest.mark.parametrize("scale", [192**-0.5, 8.0], ids=["usual", "peaked"])
def test_scales(scale: float, impl: str) -> None:
    compare(BASE.with_(scale=scale, s_q=2, heads=64), impl, 3)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", [(1, 1), (8, 1), (8, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks(layout: str, mask: tuple[int, int], causal: bool, impl: str) -> None:
    compare(BASE.with_(layout=layout, s_q=3, heads=20, mask=mask, causal=causal), impl, 2)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("layout", ["paged", "plain"])
def test_a_mask_that_hides_whole_pages_and_whole_rows(layout: str, splits: int, impl: str) -> None:
    args = make(BASE.with_(layout=layout, s_q=2, mask=(8, 2), causal=False), "cuda")
    mask = args[5]
    mask[5, 0, :] = False  # nothing at all
    mask[6, 1, :640] = False  # the maximum stays -inf for ten pages
    mask[7, 1, 1:] = False
    assert not problems(mla_decode(*args, impl=impl, splits=splits), expected(args))


def test_many_pages_go_round_the_stages(impl: str) -> None:
    compare(BASE.with_(lengths=(8192, 8191, 8129, 4097), capacity=8192, s_q=2, heads=64), impl, 1)


@pytest.mark.parametrize("layout", ["paged", "sliced"])
@pytest.mark.parametrize(("latent", "rope"), [(256, 64), (320, 32), (320, 0), (512, 32), (1024, 64), (13, 3)], ids=str)
def test_widths_through_the_operator(latent: int, rope: int, layout: str) -> None:
    """Widths that no fast kernel has: the operator takes plain Triton for them, in equal parts or dealt by lengths."""
    for case in (BASE.with_(s_q=2), BASE.with_(lengths=RAGGED * 3, heads=40)):
        args = make(case.with_(latent=latent, rope=rope, layout=layout), "cuda")
        assert select.choose("mla_decode", args)[0].name == "triton"
        assert not problems(torch.ops.dsinfra.mla_decode(*args), expected(args))


def test_float32_in_plain_triton() -> None:
    compare(BASE.with_(dtype=torch.float32, s_q=2), "triton", 2)


@pytest.mark.parametrize("s_q", [1, 2])
def test_queries_as_a_product_over_heads_leaves_them(s_q: int, impl: str) -> None:
    args = list(make(BASE.with_(s_q=s_q), "cuda"))
    args[0] = args[0].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    args[1] = args[1].transpose(1, 2).contiguous().transpose(1, 2)
    assert not problems(mla_decode(*args, impl=impl), expected(tuple(args)))


@pytest.mark.parametrize("splits", [1, 3, None])
def test_runs_agree_in_every_bit(splits: int, impl: str) -> None:
    args = make(BASE.with_(s_q=2, heads=128), "cuda")
    first = mla_decode(*args, impl=impl, splits=splits)
    for _ in range(20):
        again = mla_decode(*args, impl=impl, splits=splits)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize("layout", ["paged", "plain"])
def test_a_cuda_graph_follows_lengths_that_change(layout: str, splits: int, impl: str) -> None:
    args = make(BASE.with_(lengths=(1000,) * 8, layout=layout, s_q=2), "cuda")
    seqlens = args[4]
    mla_decode(*args, impl=impl, splits=splits)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mla_decode(*args, impl=impl, splits=splits)
    for lengths in (RAGGED, (1000,) * 8, (0,) * 8, tuple(reversed(RAGGED))):
        seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        assert not problems(got, expected(args))


def test_a_stream_other_than_the_default(impl: str) -> None:
    args = make(BASE, "cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = mla_decode(*args, impl=impl, splits=3)
    stream.synchronize()
    assert not problems(got, expected(args))
