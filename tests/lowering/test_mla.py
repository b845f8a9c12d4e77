"""`dsinfra::mla` on the CPU: reference, gradient, shape function, dynamic shapes, autocast, FLOPs."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import errors
from tests.lowering import oracle

MLA = torch.ops.dsinfra.mla.default

# name: B, H, S, T, N, R, V, C
SIZES = {
    "square": (2, 3, 5, 5, 8, 4, 6, 16),
    "longer-cache": (2, 2, 3, 9, 8, 4, 6, 16),
    "one-query": (1, 2, 1, 7, 8, 4, 8, 10),
    "one-key": (2, 1, 1, 1, 4, 2, 4, 5),
    "no-rope": (1, 2, 4, 4, 8, 0, 6, 16),
    "odd": (3, 5, 7, 11, 3, 5, 9, 13),
    "more-queries-than-keys": (1, 2, 6, 4, 8, 4, 6, 16),
}


def make(sizes, dtype=torch.float32, seed=0, requires_grad=False):
    """Arguments up to w_uv, with the layouts a model gives: transposed queries, weights as views of one parameter."""
    B, H, S, T, N, R, V, C = sizes
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, S, H, N + R, generator=g).to(dtype).transpose(1, 2)
    cache = torch.randn(B, T + 3, C + R, generator=g).to(dtype)[:, :T]
    w = torch.randn(H, N + V, C, generator=g).to(dtype) / math.sqrt(C)
    parts = (q[..., :N], q[..., N:], cache[..., :C], cache[..., C:], w[:, :N], w[:, N:])
    return [x.detach().requires_grad_(requires_grad) for x in parts]


def make_mask(kind, sizes, dtype=torch.float32):
    """-> (mask, causal)."""
    B, H, S, T = sizes[:4]
    g = torch.Generator().manual_seed(1)
    if kind in ("full", "causal"):
        return None, kind == "causal"
    if kind == "float":
        return torch.randn(B, 1, S, T, generator=g).to(dtype), False
    shape = {"bool": (B, H, S, T), "bool-2d": (S, T), "bool-per-key": (B, 1, 1, T)}[kind]
    return torch.rand(shape, generator=g) > 0.3, False


def assert_near(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["full", "causal", "bool", "bool-2d", "bool-per-key", "float"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_forward_matches_oracle(sizes, kind):
    args, (mask, causal) = make(sizes), make_mask(kind, sizes)
    o, lse = MLA(*args, mask, 0.3, causal)
    expected_o, expected_lse = oracle.mla(*args, mask, 0.3, causal)
    assert_near(o, expected_o, 1e-5)
    assert_near(lse, expected_lse, 1e-5)
    B, H, S, V = o.shape
    assert o.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32 and lse.shape == (B, H, S)


@pytest.mark.parametrize("kind", ["full", "causal", "bool", "float"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradients_match_oracle(sizes, kind):
    args = make(sizes, torch.float64, requires_grad=True)
    mask, causal = make_mask(kind, sizes, torch.float64)
    o, _ = MLA(*args, mask, 0.3, causal)
    expected, _ = oracle.mla(*args, mask, 0.3, causal)
    direction = torch.randn(o.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = [x for x in args if x.numel()]
    ours, theirs = (torch.autograd.grad(x, wanted, direction) for x in (o, expected))
    for a, b in zip(ours, theirs):
        assert_near(a, b, 1e-10)


def test_gradcheck():
    args = make((1, 2, 2, 3, 3, 2, 2, 4), torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: MLA(*a, None, 0.3, True)[0], args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_the_result_only(dtype):
    """The reference computes in float32: its error against float64 is the rounding of its own output."""
    args = make(SIZES["odd"], dtype)
    o, lse = MLA(*args, None, 0.3, False)
    expected, expected_lse = oracle.mla(*args, None, 0.3, False)
    assert o.dtype == dtype
    torch.testing.assert_close(o.float(), expected.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert_near(lse, expected_lse, 1e-5)


def test_row_that_sees_nothing_gives_zero_and_no_gradient():
    args = make(SIZES["square"], torch.float64, requires_grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    o, lse = MLA(*args, mask, 0.3, False)
    assert torch.all(o[:, :, 2] == 0) and torch.all(lse[:, :, 2] == -math.inf)
    grads = torch.autograd.grad(o.sum(), args)
    assert all(torch.isfinite(g).all() for g in grads)
    assert torch.all(grads[0][:, :, 2] == 0) and torch.all(grads[1][:, :, 2] == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_hidden_by_the_lowest_value_is_the_mean(dtype):
    """A padded query under an additive mask: softmax of equal scores is uniform, and log(n) must not get lost there."""
    args = make(SIZES["square"], dtype, requires_grad=True)
    mask = torch.zeros(2, 1, 5, 5, dtype=dtype)
    mask[..., 4], mask[0, 0, 2] = torch.finfo(dtype).min, torch.finfo(dtype).min
    o, lse = MLA(*args, mask, 0.3, False)
    q, k, v = expand_eagerly(*args)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.float() for x in (q, k, v)), attn_mask=mask.float(), scale=0.3
    )
    rounding = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(o.float(), expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(o[0, :, 2].float(), v[0].float().mean(1), rtol=rounding, atol=rounding)
    assert torch.isfinite(lse).all() and torch.all(lse[0, :, 2] == torch.finfo(dtype).min)
    for ours, exact in zip(torch.autograd.grad(o.sum(), args), torch.autograd.grad(expected.sum(), args)):
        torch.testing.assert_close(ours.float(), exact.float(), rtol=4 * rounding, atol=4 * rounding)


def expand_eagerly(q_nope, q_rope, latent, k_rope, w_uk, w_uv):
    """q, k, v in float32, built with operators that autograd knows."""
    latent, k_rope, w_uk, w_uv = (x.float() for x in (latent, k_rope, w_uk, w_uv))
    k_nope, v = (torch.einsum("btc,hxc->bhtx", latent, w) for w in (w_uk, w_uv))
    k = torch.cat([k_nope, k_rope.unsqueeze(1).expand(-1, k_nope.shape[1], -1, -1)], -1)
    return torch.cat([q_nope, q_rope], -1), k, v


def test_empty_cache():
    args = make((2, 3, 4, 0, 8, 4, 6, 16))
    o, lse = MLA(*args, None, 0.3, False)
    assert torch.all(o == 0) and torch.all(lse == -math.inf)


def test_repeats_bit_for_bit():
    args = make(SIZES["odd"], torch.bfloat16, requires_grad=True)
    results = []
    for _ in range(2):
        o, lse = MLA(*args, None, 0.3, True)
        results.append([o, lse, *torch.autograd.grad(o.sum(), args)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_inference_mode():
    args = make(SIZES["square"])
    expected = MLA(*args, None, 0.3, True)
    with torch.inference_mode():
        o, lse = MLA(*args, None, 0.3, True)
    assert torch.equal(o, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("kind", ["causal", "bool", "float"])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_opcheck(kind, grad):
    sizes = SIZES["longer-cache"]
    mask, causal = make_mask(kind, sizes)
    torch.library.opcheck(MLA, (*make(sizes, requires_grad=grad), mask, 0.3, causal))


def test_opcheck_backward():
    args = make(SIZES["longer-cache"])
    o, lse = MLA(*args, None, 0.3, True)
    torch.library.opcheck(
        torch.ops.dsinfra.mla_backward.default,
        (torch.ones_like(o), *args, None, o, lse, 0.3, True),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compiles_once_for_all_lengths():
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    compiled = torch.compile(lambda *a: MLA(*a, None, 0.3, True)[0] * 2, backend=backend, dynamic=True, fullgraph=True)
    for S, T in ((5, 9), (6, 13), (12, 12)):
        args = make((2, 3, S, T, 8, 4, 6, 16), requires_grad=True)
        o = compiled(*args)
        expected = MLA(*args, None, 0.3, True)[0] * 2
        assert torch.equal(o, expected)
        ours, theirs = (torch.autograd.grad(x.sum(), args) for x in (o, expected))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert len(graphs) == 1


@pytest.mark.parametrize("mask_kind", ["full", "bool", "float"])
def test_autocast_casts_everything_floating(mask_kind):
    args = make(SIZES["square"])
    mask, _ = make_mask(mask_kind, SIZES["square"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, lse = MLA(*args, mask, 0.3, False)
    low = [x.bfloat16() for x in args]
    low_mask = mask.bfloat16() if mask_kind == "float" else mask
    expected = MLA(*low, low_mask, 0.3, False)
    assert o.dtype == torch.bfloat16 and torch.equal(o, expected[0]) and torch.equal(lse, expected[1])


def test_autocast_gradients_reach_the_wide_leaves():
    args = make(SIZES["square"], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _ = MLA(*args, None, 0.3, True)
    o.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in args)


def test_autocast_compiles():
    args = make(SIZES["square"])

    def f(*a):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return MLA(*a, None, 0.3, True)[0]

    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(*args), f(*args))


def test_flops():
    B, H, S, T, N, R, V, C = sizes = SIZES["longer-cache"]
    with FlopCounterMode(display=False) as counter:
        o, _ = MLA(*make(sizes, requires_grad=True), None, 0.3, True)
    assert counter.get_total_flops() == 2 * B * T * H * C * (N + V) + 2 * B * H * S * T * (N + R + V)
    with FlopCounterMode(display=False) as counter:
        o.sum().backward()
    assert counter.get_total_flops() == 6 * B * T * H * C * (N + V) + 2 * B * H * S * T * (3 * N + 3 * R + 2 * V)


def test_float_mask_that_requires_grad_is_refused():
    args = make(SIZES["square"], requires_grad=True)
    with pytest.raises(errors.NotDifferentiable, match="float mask"):
        MLA(*args, torch.zeros(5, 5, requires_grad=True), 0.3, False)


def test_gradient_of_the_gradient_is_refused():
    args = make(SIZES["square"], requires_grad=True)
    o, _ = MLA(*args, None, 0.3, True)
    with pytest.raises(errors.NotDifferentiable, match="gradient of its gradient"):
        torch.autograd.grad(o.sum(), args, create_graph=True)
