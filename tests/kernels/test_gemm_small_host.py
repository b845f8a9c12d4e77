"""The GEMM of few tokens without a device: plans, refusals, and the kernel's own index arithmetic, run in Python."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dscompile.kernels import gemm_small, launch
from dscompile.kernels.gemm_small_launch import SmallCall
from dscompile.kernels.gemm_small_plan import FP8, SHARED, SmallPlan, plan_small, small_plan, tile_tokens
from dscompile.kernels.refusals import KernelLimit
from tests.kernels.small_gemm_cases import UNEVEN, Case, make

BF16 = torch.bfloat16


# The plan


@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP8], ids=str)
@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "swiglu"])
@pytest.mark.parametrize("layout", ["dense", "ends", "masked"])
def test_plans_are_ones_that_the_kernel_takes(layout: str, swiglu: bool, dtype: torch.dtype) -> None:
    for m, n, k, groups in itertools.product(
        (1, 6, 96, 128, 1024, 9000), (64, 576, 7168), (128, 2048, 7168), (1, 8, 64, 256)
    ):
        if layout == "dense" and groups > 1:
            continue
        plan = plan_small(m, n, k, groups, dtype, layout, swiglu, 132)
        assert plan.tokens in (8, 16, 32, 64, 128) and plan.consumers in (1, 2)
        assert plan.blocks in ((2,) if swiglu else (1, 2))
        assert plan.stages >= 2, plan
        assert plan.depth % 128 == 0 or dtype != FP8
        # No part of K is empty.
        steps = -(-k // plan.depth)
        assert (plan.splits - 1) * -(-steps // plan.splits) < steps, plan
        assert plan.splits == 1 or layout == "dense"
        # Sums and, for FP8, the products being scaled, of one thread: what leaves room for the rest.
        registers = plan.tokens // 2 * plan.blocks * (2 if dtype == FP8 else 1)
        assert registers <= 128, plan


def test_stages() -> None:
    """With few tokens as many as keep 64 KB on their way, three at least; else as many as fit."""
    assert small_plan(BF16, 8, 1, 1).stages == 4 and small_plan(FP8, 32, 1, 1).stages == 4
    assert small_plan(BF16, 8, 2, 1).stages == 3
    plan, bytes_of_stage = small_plan(BF16, 32, 1, 2), (128 + 32) * 128 * 2
    assert plan.stages * bytes_of_stage < SHARED < (plan.stages + 1) * bytes_of_stage + 8192
    assert small_plan(BF16, 8, 1, 1, stages=2).stages == 2
    assert small_plan(BF16, 128, 2, 2, stages=9).stages == 2


@pytest.mark.parametrize(
    ("m", "groups", "layout", "tokens"),
    [(1, 1, "dense", 8), (9, 1, "dense", 16), (128, 1, "dense", 128), (500, 1, "dense", 128), (6, 64, "ends", 8),
     (96, 64, "ends", 8), (1024, 64, "ends", 32), (8192, 64, "ends", 128), (640, 32, "masked", 32)],
)  # fmt: skip
def test_tokens_of_a_tile(m: int, groups: int, layout: str, tokens: int) -> None:
    assert tile_tokens(m, groups, layout) == tokens


@pytest.mark.parametrize(
    ("m", "n", "k", "splits"),
    [(128, 2112, 7168, 4), (1, 2112, 7168, 4), (128, 576, 7168, 14), (128, 4096, 7168, 2), (16, 4096, 7168, 1),
     (128, 7168, 16384, 1), (1, 7168, 2048, 1), (128, 32768, 512, 1), (1, 64, 128, 1), (1, 64, 1280, 2)],
)  # fmt: skip
def test_parts_of_k(m: int, n: int, k: int, splits: int) -> None:
    assert plan_small(m, n, k, 1, FP8, "dense", False, 132).splits == splits


# The kernel's index arithmetic: its own source, over torch's integers in place of Gluon's


class Pointer:
    def __init__(self, values: torch.Tensor, offset: Any = 0) -> None:
        self.values, self.offset = values, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.values, self.offset + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.values, self.offset - offset)


def load(pointer: Pointer, mask: Any = True, other: int = 0) -> torch.Tensor:
    offset, mask = torch.as_tensor(pointer.offset), torch.as_tensor(mask)
    assert bool(((offset >= 0) & (offset < len(pointer.values)) | ~mask).all()), "a load outside `ends`"
    return torch.where(mask, pointer.values[torch.where(mask, offset, 0)], other)


LANGUAGE = SimpleNamespace(
    int32=torch.int32,
    load=load,
    where=lambda *a: torch.where(*map(torch.as_tensor, a)),
    sum=lambda x, axis: x.sum(axis),
    max=lambda x, axis: x.amax(axis),
    minimum=lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)),
    maximum=lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)),
    cdiv=lambda x, y: -(-x // y),
    arange=lambda start, end, layout: torch.arange(start, end),
    associative_scan=lambda x, axis, combine: x.cumsum(axis),
)
FIELDS = ("group", "batch", "token", "lead", "left", "tile", "part", "first", "end")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    if not launch.has_gluon() or launch.interpreting():
        pytest.skip("compile_only: Gluon is not installed, or this process interprets kernels")
    from dscompile.kernels import gemm_small_gluon as source

    names = ("_slack", "_token_tiles", "_count", "_item", "_weight_row")
    functions = {name: getattr(source, name).fn for name in names}
    for name, function in functions.items():
        monkeypatch.setattr(source, name, function)
    monkeypatch.setattr(source, "gl", LANGUAGE)
    monkeypatch.setattr(source, "Item", lambda *values: SimpleNamespace(**dict(zip(FIELDS, map(int, values)))))
    return SimpleNamespace(**{name[1:]: function for name, function in functions.items()})


def items(kernel: SimpleNamespace, case: Case, plan: SmallPlan, tiles: int) -> list[SimpleNamespace]:
    numbers = case.counts if case.layout == "masked" else [end for _, _, end in case.owned()]
    groups, steps = len(case.counts), -(-case.k // plan.depth)
    g = SimpleNamespace(
        ends=Pointer(torch.tensor(numbers)), groups=groups, tokens=case.tokens, tiles=tiles, k_blocks=steps
    )
    c = SimpleNamespace(
        BT=plan.tokens, SPLITS=plan.splits, LAYOUT=case.layout, GROUPS=max(32, groups), FP8=case.dtype == FP8
    )
    upto = kernel.token_tiles(g, c, None)
    return [kernel.item(torch.tensor(i), g, c, upto) for i in range(int(kernel.count(g, c, upto)))]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("tokens", [8, 32, 128])
@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        ("ends", UNEVEN),
        ("ends", (0,) * 40),
        ("ends", (0,) * 30 + (5,)),
        ("masked", UNEVEN),
        ("dense", (1,)),
        ("dense", (130,)),
    ],
    ids=str,
)
def test_items_cover_each_product_once(
    layout: str, counts: tuple[int, ...], tokens: int, dtype: torch.dtype, splits: int, kernel: SimpleNamespace
) -> None:
    case = Case(counts, layout=layout, dtype=dtype, k=640, extra=0 if layout == "dense" else 7)
    if layout == "masked" and splits > 1:
        splits = 1
    plan, tiles = small_plan(dtype, tokens, 1, 1, depth=128, splits=splits), 3
    found = items(kernel, case, plan, tiles)
    covered = torch.zeros(len(counts), max(case.tokens, 1), tiles, 5, dtype=torch.int)
    for w in found:
        assert dtype != FP8 or w.token % 4 == 0, "TMA wants the scales' box at a multiple of 16 bytes"
        assert w.token >= 0 and 0 <= w.lead < min(w.left, tokens)
        batch, first, end = case.owned()[w.group]
        assert w.batch == batch
        mine = range(w.token + w.lead, w.token + min(w.left, tokens))
        assert first <= mine.start and mine.stop <= end
        covered[w.group, mine.start : mine.stop, w.tile, w.first : w.end] += 1
    wanted = torch.zeros_like(covered)
    for group, (_, first, end) in enumerate(case.owned()):
        wanted[group, first:end] = 1
    assert torch.equal(covered, wanted)


def test_token_tiles_of_a_weight_tile_are_neighbours(kernel: SimpleNamespace) -> None:
    """They run side by side, so that the second finds the weights in L2."""
    found = items(kernel, Case((3, 100, 5)), small_plan(BF16, 32, 1, 1), 4)
    order = [(w.group, w.tile) for w in found]
    assert [key for key, _ in itertools.groupby(order)] == sorted(set(order))


def test_grid_is_never_larger_than_the_work_allows(kernel: SimpleNamespace) -> None:
    """`token_tiles` bounds from above, without reading `ends`, what the device counts."""
    for counts in (UNEVEN, (1,) * 20, (64,) * 4, (0, 0, 1), (63, 65)):
        for layout, size in itertools.product(("ends", "masked"), (8, 32)):
            case = Case(counts, layout=layout)
            i = make(case, "cpu")
            bound = SmallCall(i.x, i.w, i.x, i.bounds, None, None, layout, False).token_tiles(size)
            assert len(items(kernel, case, small_plan(BF16, size, 1, 1), 1)) <= bound


def test_weight_rows_of_a_tile(kernel: SimpleNamespace) -> None:
    w, g = SimpleNamespace(tile=2), SimpleNamespace(up=1408)
    plain, fused = SimpleNamespace(SWIGLU=False, BOXES=4), SimpleNamespace(SWIGLU=True, BOXES=4)
    assert [kernel.weight_row(w, g, plain, side) for side in range(4)] == [512, 576, 640, 704]
    assert [kernel.weight_row(w, g, fused, side) for side in range(4)] == [256, 1664, 320, 1728]


# What it refuses


@pytest.fixture
def hopper() -> Any:
    """As if on Hopper, without compiling: refusals read metadata only."""
    if not launch.has_gluon() or launch.interpreting():
        pytest.skip("compile_only: Gluon is not installed, or this process interprets kernels")
    with launch.offline():
        yield


def test_takes(hopper: Any) -> None:
    for dtype, layout in itertools.product((BF16, torch.float16, FP8), ("dense", "ends", "masked")):
        i = make(Case(dtype=dtype, layout=layout), "cpu")
        x = i.x if layout == "masked" else i.x[0]
        assert gemm_small.supports(x, i.w, x_scale=i.x_scale, w_scale=i.w_scale) is None
    i = make(Case(n_major=True), "cpu")
    assert gemm_small.supports(i.x[0], i.w, swiglu=True) is None
    assert gemm_small.supports(i.x[0, 3:], i.w[1:, 64:]) is None  # slices


@pytest.mark.parametrize(
    ("x", "w", "options", "words"),
    [
        (torch.zeros(4, 64), torch.zeros(64, 64), {}, "Convert x"),
        (torch.zeros(4, 64, dtype=BF16), torch.zeros(64, 64, dtype=BF16), {"out_dtype": torch.float32}, "writes 16"),
        (torch.zeros(4, 65, dtype=BF16)[:, :64], torch.zeros(8, 64, dtype=BF16), {}, r"x \(4, 64\).*\(65, 1\)"),
        (torch.zeros(4, 64, dtype=BF16), torch.zeros(8, 68, dtype=BF16)[:, 4:], {}, r"w \(8, 64\).*8 bytes past"),
        (torch.zeros(4, 64, dtype=BF16), torch.zeros(600, 1, 64, dtype=BF16), {}, "600 groups.*512 at most"),
        (torch.zeros(4, 64).to(FP8), torch.zeros(64, 64).to(FP8).T, {}, "along K only"),
        (torch.zeros(4, 64, dtype=BF16), torch.zeros(2, 64, 24, dtype=BF16).mT, {"swiglu": True}, "to 8 rows"),
        (torch.zeros(4, 64).to(FP8), torch.zeros(2, 320, 64).to(FP8), {"swiglu": True}, "multiples of 64 rows"),
        (torch.zeros(4, 64).to(FP8), torch.zeros(64, 64).to(FP8),
         {"x_scale": torch.zeros(1, 1, 3), "w_scale": torch.zeros(1, 1, 1)}, "Pad it to 4"),
    ],
    ids=["float32", "out", "stride", "offset", "groups", "fp8 along N", "halves along N", "fp8 swiglu", "scale"],
)  # fmt: skip
def test_refuses(x: torch.Tensor, w: torch.Tensor, options: dict, words: str, hopper: Any) -> None:
    refusal = gemm_small.supports(x, w, **options)
    assert refusal and re.search(words, refusal), refusal


def test_refuses_the_cpu() -> None:
    with pytest.raises(KernelLimit, match="Only Hopper|no Gluon"):
        gemm_small.linear(torch.zeros(4, 64, dtype=BF16), torch.zeros(64, 64, dtype=BF16))
    assert plan_small(4, 64, 64, 1, BF16, "dense", False, 132).splits == 1
