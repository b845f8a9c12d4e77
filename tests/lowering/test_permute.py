"""`dsinfra::moe_plan`, `moe_gather` and `moe_combine` on the CPU: the sort, its inverse, sums in order, gradients."""

import pytest
import torch

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import select
from tests.lowering.graphs import compile_counting

OPS = torch.ops.dsinfra
PLAN, GATHER, COMBINE = OPS.moe_plan.default, OPS.moe_gather.default, OPS.moe_combine.default
# name: T, K, E
SIZES = {
    "usual": (9, 2, 4),
    "one-token": (1, 3, 8),
    "one-expert": (5, 1, 1),
    "many-experts": (3, 2, 40),
    "none": (0, 2, 3),
}


def ids(T, K, E, sentinels=True, dtype=torch.int64):
    g = torch.Generator().manual_seed(T)
    idx = torch.randint(0, E, (T, K), generator=g).to(dtype)
    if sentinels:
        idx[torch.rand(T, K, generator=g) < 0.2] = E
        idx[torch.rand(T, K, generator=g) < 0.2] = -1
        idx[torch.rand(T, K, generator=g) < 0.1] = 2 * E
    return idx


def planned_by_hand(idx, E):
    """-> order and ends as lists: Python's sort is stable."""
    flat = [e if 0 <= e < E else E for e in idx.flatten().tolist()]
    order = sorted(range(len(flat)), key=lambda row: flat[row])
    return order, [sum(e <= expert for e in flat) for expert in range(E)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("sentinels", [False, True], ids=["all-valid", "sentinels"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_plan(sizes, sentinels, dtype):
    T, K, E = sizes
    idx = ids(*sizes, sentinels, dtype)
    order, position, ends = PLAN(idx, E)
    assert order.dtype == position.dtype == ends.dtype == torch.int32
    expected_order, expected_ends = planned_by_hand(idx, E)
    assert order.tolist() == expected_order and ends.tolist() == expected_ends
    assert position.shape == (T, K) and position.flatten()[order.long()].tolist() == list(range(T * K))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gather_and_combine(sizes):
    T, K, E = sizes
    idx, x, weight = ids(*sizes), torch.randn(T, 5), torch.randn(T, K)
    order, position, ends = PLAN(idx, E)
    rows = GATHER(x, order, position)
    assert torch.equal(rows, x[order.long() // K])
    z = rows.clone()
    z[int(ends[-1]) :] = float("nan")  # rows of no expert may hold anything
    expected = torch.zeros(T, 5, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            if 0 <= idx[t, k] < E:
                expected[t] += weight[t, k].double() * x[t].double()
    y = COMBINE(z, position, weight, idx, E, torch.float32)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    ones = COMBINE(z, position, None, idx, E, torch.float32)
    assert torch.equal(ones, COMBINE(z, position, torch.ones_like(weight), idx, E, torch.float32))


def test_combine_rounds_once_and_in_the_order_of_k():
    """1 + 2^-9 - 1 is 0 where a sum is rounded to bfloat16 in between, and 2^30 + 1 - 2^30 is in float32."""
    idx = torch.tensor([[0, 1, 2]])
    _, position, _ = PLAN(idx, 3)
    z, weight = torch.tensor([[1.0], [2**-9], [-1.0]], dtype=torch.bfloat16), torch.ones(1, 3)
    assert COMBINE(z, position, weight, idx, 3, torch.bfloat16).item() == 2**-9
    z = torch.tensor([[2.0**30], [1.0], [-(2.0**30)]])
    assert COMBINE(z, position, weight, idx, 3, torch.float32).item() == 0.0
    assert COMBINE(z.roll(1, 0).roll(-1, 0)[[0, 2, 1]], position, weight, idx, 3, torch.float32).item() == 1.0


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_combine_gives_the_dtype_asked_for(out_dtype):
    idx = ids(6, 2, 3)
    _, position, _ = PLAN(idx, 3)
    z = torch.randn(12, 4).bfloat16()
    y = COMBINE(z, position, torch.rand(6, 2), idx, 3, out_dtype)
    assert y.dtype == out_dtype


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
def test_gradcheck(weighted):
    idx = ids(5, 2, 3)
    order, position, _ = PLAN(idx, 3)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: GATHER(x, order, position), (x,))
    z = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 2, dtype=torch.float64, requires_grad=True) if weighted else None
    inputs = (z, weight) if weighted else (z,)
    assert torch.autograd.gradcheck(lambda z, w=None: COMBINE(z, position, w, idx, 3, torch.float64), inputs)


def test_opcheck():
    idx = ids(5, 2, 3)
    order, position, _ = PLAN(idx, 3)
    torch.library.opcheck(PLAN, (idx, 3))
    torch.library.opcheck(GATHER, (torch.randn(5, 4, requires_grad=True), order, position))
    z, weight = torch.randn(10, 4, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    torch.library.opcheck(COMBINE, (z, position, weight, idx, 3, torch.float32))
    torch.library.opcheck(COMBINE, (z, position, None, idx, 3, torch.bfloat16))


def test_compiles_once_for_all_lengths():
    def layer(x, idx, weight):
        order, position, ends = PLAN(idx, 4)
        return COMBINE(GATHER(x, order, position) * 2, position, weight, idx, 4, torch.float32), ends

    compiled, graphs = compile_counting(layer)
    for T in (3, 7, 20):
        x, idx, weight = torch.randn(T, 6, requires_grad=True), ids(T, 2, 4), torch.rand(T, 2, requires_grad=True)
        ours, eager = compiled(x, idx, weight), layer(x, idx, weight)
        assert torch.equal(ours[0], eager[0]) and torch.equal(ours[1], eager[1])
        for a, b in zip(*(torch.autograd.grad(y[0].sum(), (x, weight)) for y in (ours, eager))):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


def test_tables():
    for op in ("moe_plan", "moe_gather", "moe_combine"):
        assert select.table(op).names == ("kernel", "reference")
    z, weight = torch.randn(4, 3), torch.rand(2, 2)
    idx = torch.zeros(2, 2, dtype=torch.int64)
    reason = select.choose("moe_combine", (z, idx.int(), weight.double(), idx, 1, torch.float32))[1][0][1]
    assert reason == "a weight or the result is float64, and the kernel computes in float32"
