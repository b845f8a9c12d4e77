"""The GEMM of few tokens on a Hopper GPU: values against float64, poisoned neighbours, repeatability, CUDA graphs."""

import pytest
import torch

from dscompile.kernels import gemm_small
from dscompile.kernels.gemm_small_launch import SmallCall, launch_small
from dscompile.kernels.gemm_small_plan import SmallPlan, small_plan, tile_tokens
from tests.kernels.small_gemm_cases import FP8, UNEVEN, Case, Inputs, make, problems

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp8": FP8}
TOKENS = (8, 16, 32, 64, 128)


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"hopper: this device has compute capability {torch.cuda.get_device_capability()}")


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def run(case: Case, i: Inputs, plan: SmallPlan) -> torch.Tensor:
    """y [L, M, n], from memory full of NaN."""
    out = torch.bfloat16 if case.dtype == FP8 else case.dtype
    y = torch.full((*i.x.shape[:2], case.n), torch.nan, dtype=out, device="cuda")
    launch_small(SmallCall(i.x, i.w, y, i.bounds, i.x_scale, i.w_scale, case.layout, case.swiglu), plan)
    return y


def check(case: Case, plan: SmallPlan) -> None:
    i = make(case, "cuda")
    y = run(case, i, plan)
    assert not problems(case, y, i)
    assert torch.equal(y.nan_to_num(0.5), run(case, i, plan).nan_to_num(0.5)), "not repeatable"


# Sums and products of two blocks of 128 tokens in FP8 don't fit the registers: that is no plan.
UNEVEN_PLANS = [
    pytest.param(dtype, tokens, blocks, consumers, id=f"{name}-{tokens}-{blocks}-{consumers}")
    for name, dtype in DTYPES.items()
    for tokens in TOKENS
    for blocks, consumers in ((1, 1), (1, 2), (2, 1), (2, 2))
    if (dtype, tokens, blocks) != (FP8, 128, 2)
]


@pytest.mark.parametrize("dtype, tokens, blocks, consumers", UNEVEN_PLANS)
def test_groups_of_uneven_sizes(dtype: torch.dtype, tokens: int, blocks: int, consumers: int) -> None:
    check(Case(dtype=dtype, n=584, k=464, extra=5), small_plan(dtype, tokens, blocks, consumers))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tokens", TOKENS[:4])
def test_swiglu(tokens: int, splits: int, dtype: torch.dtype) -> None:
    depth = 128 if dtype == FP8 and tokens == 64 else None
    check(Case(dtype=dtype, n=192, swiglu=True, extra=3), small_plan(dtype, tokens, 2, 1, depth=depth, splits=splits))


@pytest.mark.parametrize("tokens", TOKENS)
def test_masked(tokens: int, dtype: torch.dtype) -> None:
    check(Case(dtype=dtype, layout="masked", extra=5), small_plan(dtype, tokens, 1, 2))


@pytest.mark.parametrize("splits", [1, 3, 8], ids=["whole", "uneven", "some empty"])
@pytest.mark.parametrize("tokens", [1, 13, 64, 65, 128])
def test_dense_in_parts(tokens: int, splits: int, dtype: torch.dtype) -> None:
    case = Case((tokens,), n=576, k=1024, layout="dense", dtype=dtype)
    check(case, small_plan(dtype, tile_tokens(tokens, 1, "dense"), 1, 1, splits=splits))


@pytest.mark.parametrize(
    "counts",
    [
        (0,) * 64,
        (0,) * 31 + (5,) + (0,) * 32,
        (1,) * 6,
        tuple(g % 3 for g in range(256)),
        tuple(g % 2 for g in range(300)),
    ],
    ids=["none", "one of 64", "1 each", "256", "300"],
)
def test_numbers_of_groups(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    check(Case(counts, n=128, k=256, dtype=dtype, extra=2), small_plan(dtype, 8, 1, 2))


@pytest.mark.parametrize("layout", ["ends", "masked"])
def test_nan_stays_in_its_group(layout: str, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, layout=layout)
    i = make(case, "cuda")
    clean = run(case, i, small_plan(dtype, 16, 1, 1))
    batch, first, end = case.owned()[4]
    i.x[batch, first:end] = torch.tensor(torch.nan).to(dtype)
    y = run(case, i, small_plan(dtype, 16, 1, 1))
    assert bool(y[batch, first:end].isnan().all())
    y[batch, first:end] = clean[batch, first:end]
    assert torch.equal(y.nan_to_num(0.5), clean.nan_to_num(0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "swiglu"])
@pytest.mark.parametrize("tokens", [8, 64])
def test_weights_with_n_contiguous(tokens: int, swiglu: bool, dtype: torch.dtype) -> None:
    check(Case(dtype=dtype, n=328, k=456, n_major=True, swiglu=swiglu, extra=1), small_plan(dtype, tokens, 2, 1))


@pytest.mark.parametrize("depth", [64, 256])
def test_depths(depth: int, dtype: torch.dtype) -> None:
    if depth == 64 and dtype == FP8:
        depth = 512
    for swiglu in (False, True):
        check(Case(dtype=dtype, n=384, k=400, swiglu=swiglu), small_plan(dtype, 16, 2, 1, depth=depth))


@pytest.mark.parametrize("tokens", [8, 64])
def test_float16(tokens: int) -> None:
    check(Case(dtype=torch.float16, n=584, k=464, extra=5), small_plan(torch.float16, tokens, 1, 2))


def test_many_stages_and_a_long_sum(dtype: torch.dtype) -> None:
    check(Case((128,), n=256, k=16384, layout="dense", dtype=dtype), small_plan(dtype, 128, 1, 2))


def test_widths_of_16_bytes(dtype: torch.dtype) -> None:
    check(Case((9,), n=72, k=80, layout="dense", dtype=dtype), small_plan(dtype, 16, 1, 1))


@pytest.mark.parametrize("rows", [1, 16, 100])
def test_the_three_entries_plan_for_themselves(rows: int, dtype: torch.dtype) -> None:
    dense = Case((rows,), layout="dense", dtype=dtype)
    i = make(dense, "cuda")
    scales = {} if dtype != FP8 else {"x_scale": i.x_scale[0], "w_scale": i.w_scale[0]}
    assert not problems(dense, gemm_small.linear(i.x[0], i.w[0], **scales)[None], i)
    for swiglu in (False, True):
        ends = Case(UNEVEN, dtype=dtype, swiglu=swiglu, extra=rows)
        i = make(ends, "cuda")
        scales = {} if dtype != FP8 else {"x_scale": i.x_scale[0], "w_scale": i.w_scale}
        assert not problems(ends, gemm_small.grouped(i.x[0], i.w, i.bounds, swiglu=swiglu, **scales)[None], i)
    case = Case(UNEVEN, layout="masked", dtype=dtype, extra=rows)
    i = make(case, "cuda")
    y = gemm_small.masked(i.x, i.w, i.bounds, x_scale=i.x_scale, w_scale=i.w_scale)
    for batch, _, end in case.owned():
        y[batch, end:] = torch.nan  # left as they were
    assert not problems(case, y, i)


def test_groups_may_change_under_a_graph() -> None:
    case = Case(counts=(3, 0, 5, 8), n=256, k=512)
    i = make(case, "cuda")
    gemm_small.grouped(i.x[0], i.w, i.bounds)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gemm_small.grouped(i.x[0], i.w, i.bounds)
    for counts in ((16, 0, 0, 0), (0, 1, 15, 0), (2, 2, 2, 2)):
        other = case.with_(counts=counts, extra=16 - sum(counts))
        i.bounds.copy_(torch.tensor(counts).cumsum(0))
        graph.replay()
        assert not problems(other, y[None], i)
