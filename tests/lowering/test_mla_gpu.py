"""`dsinfra::mla` and `dsinfra::mla_decode` on one CUDA device, against float64: torch's kernels as we call them.

Errors are relative in the Frobenius norm. bfloat16 keeps 8 bits: k, v, p and o are each rounded once, so results agree
with float64 to a little over 2^-8; gradients add the rounding of dk and dv on their way through the projections.
"""

import math

import pytest
import torch

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import expanded, select, torch_attention
from tests.lowering import oracle, test_mla_decode

pytestmark = pytest.mark.gpu

MLA, MLA_BACKWARD = torch.ops.dsinfra.mla.default, torch.ops.dsinfra.mla_backward.default
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3, torch.float64: 1e-10}
NAMES = ("q_nope", "q_rope", "latent", "k_rope", "w_uk", "w_uv")

# name: B, H, S, T (N 128, R 64, V 128, C 512)
SIZES = {
    "16-heads": (2, 16, 256, 256),
    "128-heads": (1, 128, 256, 256),
    "odd": (2, 16, 193, 193),
    "odd-prime": (1, 16, 509, 509),
    "longer-cache": (2, 16, 65, 300),
    "short-prefix": (1, 16, 130, 133),
    "one-query": (2, 16, 1, 300),
}


def make(B, H, S, T, dtype=torch.bfloat16, N=128, R=64, V=128, C=512, requires_grad=True):
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device="cuda", dtype=torch.float32).to(dtype)

    q, cache = normal(B, S, H, N + R).transpose(1, 2), normal(B, T + 5, C + R)[:, :T]
    w = (normal(H, N + V, C).float() / math.sqrt(C)).to(dtype)
    parts = (q[..., :N], q[..., N:], cache[..., :C], cache[..., C:], w[:, :N], w[:, N:])
    return [x.detach().requires_grad_(requires_grad) for x in parts]


def make_mask(kind, B, H, S, T, dtype):
    """-> mask, causal. The boolean one leaves a row of the last request without a key."""
    if kind in ("full", "causal"):
        return None, kind == "causal"
    g = torch.Generator("cuda").manual_seed(1)
    visible = torch.rand(B, 1, S, T, generator=g, device="cuda") > 0.3
    visible[-1, :, S // 2] = False
    if kind == "bool":
        return visible, False
    return torch.randn(B, 1, S, T, generator=g, device="cuda").to(dtype), False


def error(ours, exact):
    exact = exact.double()
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def gradient_error(ours, exact, uncancelled):
    """As `error`, except where the exact gradient vanishes. A query that sees one key has p = 1, so that its
    ds = p (dp - sum p dp) is zero: the terms cancel, rounding is left of them, and a relative error would divide by
    nothing. There the difference is measured against the terms: the gradient with the softmax's sum held fixed."""
    if exact.double().norm() > 1e-12 * uncancelled.norm():
        return error(ours, exact)
    return float((ours.double() - exact.double()).norm() / uncancelled.norm())


def check_against_oracle(args, mask, causal, dtype):
    scale = args[0].shape[3] ** -0.5
    o, lse = MLA(*args, mask, scale, causal)
    wide = [x.detach().double().requires_grad_() for x in args]
    expected_o, expected_lse = oracle.mla(*wide, mask, scale, causal)
    assert torch.isfinite(o).all() and error(o, expected_o) < TOLERANCE[dtype]
    alive = expected_lse > -math.inf
    assert torch.equal(lse > -math.inf, alive) and torch.all(o[~alive] == 0)
    # lse is float32 by contract: for float64 inputs it can be no better than float32's rounding.
    rtol, atol = (torch.finfo(torch.float32).eps, 1e-6) if dtype == torch.float64 else (0, 2 * TOLERANCE[dtype])
    torch.testing.assert_close(lse[alive].double(), expected_lse[alive], rtol=rtol, atol=atol)
    direction = torch.randn_like(o)
    # Inputs of width 0 have a gradient of nothing.
    picked = [i for i, x in enumerate(args) if x.numel()]
    ours = torch.autograd.grad(o, [args[i] for i in picked], direction)
    inputs = [wide[i] for i in picked]
    exact = torch.autograd.grad(expected_o, inputs, direction.double(), retain_graph=True)
    # d(o exp(lse - constant)) = do + o dlse: the first term of ds alone.
    fixed_sum = expected_o[alive] * torch.exp(expected_lse - expected_lse.detach())[alive].unsqueeze(-1)
    terms = torch.autograd.grad(fixed_sum, inputs, direction[alive].double())
    errors = {NAMES[i]: gradient_error(*three) for i, *three in zip(picked, ours, exact, terms)}
    assert max(errors.values()) < 2 * TOLERANCE[dtype], errors


def is_hopper():
    return torch_attention.device_capability(torch.device("cuda")) == (9, 0)


@pytest.mark.parametrize("kind", ["full", "causal", "bool", "float"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_forward_and_backward(sizes, dtype, kind):
    args = make(*sizes, dtype)
    mask, causal = make_mask(kind, *sizes, dtype)
    chosen, skipped = select.choose("mla", (*args, mask, 0.1, causal))
    if is_hopper():
        assert chosen.name == "cudnn", skipped
    check_against_oracle(args, mask, causal, dtype)


@pytest.mark.parametrize("impl", ["efficient", "reference"])
@pytest.mark.parametrize("kind", ["full", "causal"])
def test_forced_implementations(impl, kind):
    args = make(*SIZES["longer-cache"])
    with select.force("mla", impl), select.force("mla_backward", impl):
        check_against_oracle(args, None, kind == "causal", torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "widths"),
    [
        (torch.float32, {}),
        (torch.float64, {}),
        (torch.bfloat16, {"R": 0}),
        (torch.bfloat16, {"N": 64, "R": 32, "V": 64}),
        (torch.bfloat16, {"N": 20, "R": 10, "V": 12, "C": 40}),
    ],
    ids=["float32", "float64", "no-rope", "narrow", "unaligned"],
)
def test_other_dtypes_and_widths(dtype, widths):
    args = make(2, 8, 65, 131, dtype, **widths)
    check_against_oracle(args, None, True, dtype)


@pytest.mark.parametrize(("S", "T"), [(5, 5), (2, 2), (1, 2), (3, 4), (7, 3), (1, 1)])
def test_tiny_lengths(S, T):
    check_against_oracle(make(1, 4, S, T), None, True, torch.bfloat16)


def test_mixed_backends_agree():
    """Forward and backward may choose differently: o and lse mean the same in every implementation."""
    args = make(*SIZES["odd"], requires_grad=False)
    results = {}
    for impl in ("cudnn", "efficient", "reference") if is_hopper() else ("efficient", "reference"):
        with select.force("mla", impl):
            results[impl] = MLA(*args, None, 0.07, True)
    o, lse = results["reference"]
    grad_o = torch.randn_like(o)
    with select.force("mla_backward", "reference"):
        expected = MLA_BACKWARD(grad_o, *args, None, o, lse, 0.07, True)
    for forward, (o, lse) in results.items():
        for impl in results:
            with select.force("mla_backward", impl):
                gradients = MLA_BACKWARD(grad_o, *args, None, o, lse, 0.07, True)
            errors = [error(a, b) for a, b in zip(gradients, expected)]
            assert max(errors) < 2 * TOLERANCE[torch.bfloat16], (forward, impl, errors)
            assert all(a.stride() == b.stride() for a, b in zip(gradients, expected)), (forward, impl)


@pytest.mark.parametrize("sizes", [SIZES["odd"], SIZES["longer-cache"]], ids=["square", "longer-cache"])
def test_forward_repeats_bit_for_bit(sizes):
    args = make(*sizes, requires_grad=False)
    first, second = (MLA(*args, None, 0.07, True) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_backward_repeats_bit_for_bit_where_asked():
    args = make(*SIZES["odd"])
    o, _ = MLA(*args, None, 0.07, True)
    grad_o = torch.randn_like(o)
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would want an environment variable otherwise
    try:
        first, second = (torch.autograd.grad(o, args, grad_o, retain_graph=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("kind", ["causal", "bool"])
def test_forward_in_a_cuda_graph(kind):
    sizes = SIZES["longer-cache"]
    args = make(*sizes, requires_grad=False)
    mask, causal = make_mask(kind, *sizes, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        MLA(*args, mask, 0.07, causal)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = MLA(*args, mask, 0.07, causal)
    for x, new in zip(args, make(*sizes, requires_grad=False)):
        x.copy_(new.flip(0) * 0.5)
    graph.replay()
    expected = MLA(*args, mask, 0.07, causal)
    assert torch.equal(o, expected[0]) and torch.equal(lse, expected[1])


def test_autocast():
    args = make(*SIZES["odd"], torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        o, _ = MLA(*args, None, 0.07, True)
    expected, _ = MLA(*(x.bfloat16() for x in args), None, 0.07, True)
    assert torch.equal(o, expected)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(o.sum(), args))


def test_compiled_training_step_equals_eager():
    """Through Inductor, with strides that its shape function promised, at two lengths of one compilation."""
    compiled = torch.compile(lambda *a: MLA(*a, None, 0.07, True)[0].transpose(1, 2).flatten(2) * 2, dynamic=True)
    for S, T in ((65, 300), (129, 200)):
        args = make(2, 16, S, T)
        o = compiled(*args)
        expected = MLA(*args, None, 0.07, True)[0].transpose(1, 2).flatten(2) * 2
        assert torch.equal(o, expected)
        ours, eager = (torch.autograd.grad(x.float().square().sum(), args) for x in (o, expected))
        assert all(error(a, b) < 1e-2 for a, b in zip(ours, eager))


@pytest.mark.parametrize("kind", ["causal", "bool"])
def test_backward_keeps_arguments_and_results_only(kind):
    sizes = SIZES["longer-cache"]
    args = make(*sizes)
    mask, causal = make_mask(kind, *sizes, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        o, lse = MLA(*args, mask, 0.07, causal)
    known = {x.untyped_storage().data_ptr() for x in (*args, o, lse, *(() if mask is None else (mask,)))}
    assert saved and {x.untyped_storage().data_ptr() for x in saved} <= known


def test_expand_makes_no_hidden_copy():
    """The up-projections write k and v in place: nothing else of their size is ever allocated."""
    _, _, latent, k_rope, w_uk, w_uv = make(1, 128, 1, 2048, requires_grad=False)
    expanded.expand(latent, k_rope, w_uk, w_uv)  # cuBLAS's workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    k, v = expanded.expand(latent, k_rope, w_uk, w_uv)
    peak = torch.cuda.max_memory_allocated() - before
    results, rows = 2 * (k.numel() + v.numel()), 2 * latent.numel()
    assert results <= peak <= results + rows + (1 << 16)


@pytest.mark.parametrize("impl", ["gluon", "triton", "reference"])
@pytest.mark.parametrize("paged", [False, True], ids=["plain", "paged"])
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
def test_decode_implementations(impl, paged, masked):
    B, S, H, C, R, T, lengths = case = (4, 2, 16, 512, 64, 300, (300, 1, 64, 130))
    args, page_table = test_mla_decode.make(case, paged, torch.bfloat16)
    args = [x.cuda() for x in args]
    if page_table is not None:
        page_table = page_table.cuda()
    capacity = T if page_table is None else page_table.shape[1] * 64
    g = torch.Generator("cuda").manual_seed(2)
    mask = torch.rand(1, S, capacity, generator=g, device="cuda") > 0.3 if masked else None
    call = (*args, mask, page_table, 0.05, True)
    if impl == "gluon" and not is_hopper():
        assert "(9, 0)" in dict(select.choose("mla_decode", call)[1])["gluon"]
        return
    with select.force("mla_decode", impl):
        o, lse = torch.ops.dsinfra.mla_decode(*call)
    expected_o, expected_lse = oracle.mla_decode(*call)
    assert error(o, expected_o) < TOLERANCE[torch.bfloat16]
    alive = expected_lse > -math.inf
    assert torch.equal(lse > -math.inf, alive)
    torch.testing.assert_close(lse[alive].double(), expected_lse[alive], rtol=0, atol=1e-2)


def test_decode_takes_gluon_on_hopper():
    args, _ = test_mla_decode.make((4, 1, 16, 512, 64, 300, (300, 1, 64, 130)), dtype=torch.bfloat16)
    chosen, _ = select.choose("mla_decode", (*(x.cuda() for x in args), None, None, 0.05, True))
    assert chosen.name == ("gluon" if is_hopper() else "triton")
