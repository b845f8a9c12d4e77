"""`dsinfra::mla` with a mask operand on one CUDA device, against float64, and the query's parts taken in place.

Every kind of mask and of row, through each of torch's kernels. Rows that see nothing must be exact zeros, gradients
included; rows that an additive mask hides by its dtype's lowest value must be what softmax makes of them.
"""

import contextlib
import math

import pytest
import torch

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import cudnn_trial, layouts, select, torch_attention
from tests.lowering import oracle
from tests.lowering.test_mla_gpu import TOLERANCE, error, is_hopper, make

pytestmark = pytest.mark.gpu

MLA = torch.ops.dsinfra.mla.default
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
IMPLS = pytest.mark.parametrize("impl", ["cudnn", "efficient"])

# name: B, H, S, T (N 128, R 64, V 128, C 512)
SIZES = {
    "odd-batch-3": (3, 16, 77, 131),
    "square": (2, 16, 256, 256),
    "128-heads": (1, 128, 130, 130),
    "half-a-tile": (2, 8, 192, 192),
    "one-query": (2, 16, 1, 300),
    "more-queries-than-keys": (2, 8, 140, 75),
}


def padded(B, S, T, *, causal):
    """Left padding of another length for each request; causal, padded queries see nothing: [B,1,1 or S,T]."""
    start = torch.arange(B, device="cuda") * (T // (2 * B)) + T // 8
    visible = (torch.arange(T, device="cuda") >= start.unsqueeze(1))[:, None, None]
    return visible & torch.ones(S, T, dtype=torch.bool, device="cuda").tril(T - S) if causal else visible


def additive(visible, dtype, hidden):
    return torch.zeros(visible.shape, dtype=dtype, device="cuda").masked_fill_(~visible, hidden)


def per_head(B, H, S, T, dtype):
    visible = torch.rand(1, H, S, T, generator=torch.Generator("cuda").manual_seed(2), device="cuda") > 0.5
    visible[:, 1, S // 2] = False
    return visible


def hidden_twice(B, H, S, T, dtype):
    """Two additive masks added up, as old models do: the lowest value where one hides, -inf where both do."""
    lowest, causal = torch.finfo(dtype).min, torch.ones(S, T, dtype=torch.bool, device="cuda").tril(T - S)
    return additive(padded(B, S, T, causal=False), dtype, lowest) + additive(causal, dtype, lowest)


MASKS = {
    "padding": lambda B, H, S, T, dtype: padded(B, S, T, causal=False),
    "causal-padding": lambda B, H, S, T, dtype: padded(B, S, T, causal=True),
    "plane": lambda B, H, S, T, dtype: padded(1, S, T, causal=True)[0, 0],
    "float": lambda B, H, S, T, dtype: additive(padded(B, S, T, causal=True), dtype, -math.inf),
    "lowest": lambda B, H, S, T, dtype: additive(padded(B, S, T, causal=True), dtype, torch.finfo(dtype).min),
    "hidden-twice": hidden_twice,
    "per-head": per_head,
}


@contextlib.contextmanager
def forced(impl, S, T):
    """`impl` forward, and backward where it takes these lengths."""
    refusal = torch_attention.cudnn_backward_refusal(S, T, False) if impl == "cudnn" else ""
    with select.force("mla", impl), select.force("mla_backward", "efficient" if refusal else impl):
        yield


def skip_elsewhere(impl):
    if impl == "cudnn" and not is_hopper():
        pytest.skip("hopper: cuDNN's kernel for widths 192/128")


def check_against_oracle(args, mask, dtype, scale=0.07):
    o, lse = MLA(*args, mask, scale, False)
    exact_args = [x.detach().double().requires_grad_() for x in args]
    exact_o, exact_lse = oracle.mla(*exact_args, mask, scale, False)
    dead = exact_lse == -math.inf
    assert torch.isfinite(o).all() and error(o, exact_o) < TOLERANCE[dtype]
    assert torch.all(o[dead] == 0) and torch.equal(lse == -math.inf, dead)
    torch.testing.assert_close(lse[~dead].double(), exact_lse[~dead], rtol=1e-6, atol=2 * TOLERANCE[dtype])
    direction = torch.randn_like(o)
    ours, exact = torch.autograd.grad(o, args, direction), torch.autograd.grad(exact_o, exact_args, direction.double())
    assert all(torch.isfinite(g).all() for g in ours)
    assert torch.all(ours[0][dead] == 0) and torch.all(ours[1][dead] == 0)
    errors = [error(a, b) for a, b in zip(ours, exact)]
    assert max(errors) < 2 * TOLERANCE[dtype], errors


@IMPLS
@DTYPES
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_forward_and_backward(sizes, kind, dtype, impl):
    skip_elsewhere(impl)
    mask = MASKS[kind](*sizes, dtype)
    with forced(impl, *sizes[2:]):
        check_against_oracle(make(*sizes, dtype), mask, dtype)


@DTYPES
@pytest.mark.parametrize("kind", MASKS)
def test_hopper_takes_cudnn(kind, dtype):
    sizes = SIZES["odd-batch-3"]
    args, mask = make(*sizes, dtype), MASKS[kind](*sizes, dtype)
    chosen, skipped = select.choose("mla", (*args, mask, 0.07, False))
    assert chosen.name == ("cudnn" if is_hopper() else "efficient"), skipped


@DTYPES
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_trial_of_cudnn_passes_on_hopper(mask, dtype):
    mask_dtype = {"none": None, "bool": torch.bool, "float": dtype}[mask]
    skip_elsewhere("cudnn")
    assert cudnn_trial.run_trial(torch.device("cuda"), dtype, 192, 128, mask_dtype) == ""


@IMPLS
@pytest.mark.parametrize("kind", ["lowest", "hidden-twice"])
def test_rows_hidden_by_the_lowest_value_alone(kind, impl):
    """Those rows by themselves, where the norm over all rows would drown them: the mean, and gradients of a mean."""
    skip_elsewhere(impl)
    sizes = SIZES["odd-batch-3"]
    args, mask = make(*sizes), MASKS[kind](*sizes, torch.bfloat16)
    exact_args = [x.detach().double().requires_grad_() for x in args]
    with forced(impl, *sizes[2:]):
        o, lse = MLA(*args, mask, 0.07, False)
        exact_o, _ = oracle.mla(*exact_args, mask, 0.07, False)
        flat = (mask.amax(-1) == torch.finfo(torch.bfloat16).min).expand(*o.shape[:3])
        assert flat.any() and torch.all(lse[flat] == torch.finfo(torch.bfloat16).min)
        assert error(o[flat], exact_o[flat]) < TOLERANCE[torch.bfloat16]
        direction = torch.randn_like(o) * flat.unsqueeze(-1)
        ours = torch.autograd.grad(o, args, direction)
    exact = torch.autograd.grad(exact_o, exact_args, direction.double())
    errors = [error(a, b) for a, b in zip(ours, exact)]
    assert max(errors) < 2 * TOLERANCE[torch.bfloat16], errors


@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
@pytest.mark.parametrize(("S", "T"), [(192, 192), (64, 64), (100, 320), (1, 128), (128, 128), (77, 131)])
def test_very_low_scores_give_no_nan(S, T, masked):
    """Every score near -120, so exp(-lse) overflows: a tile's keys that don't exist must not enter the gradients."""
    args = [x.detach() * 0.1 for x in make(2, 8, S, T)]
    args[1][..., 0], args[3][..., 0] = 1.0, -120 / 0.07
    args = [x.requires_grad_() for x in args]
    mask = torch.ones(S, T, dtype=torch.bool, device="cuda") if masked else None
    o, lse = MLA(*args, mask, 0.07, False)
    assert torch.all(lse < -89)
    exact_args = [x.detach().double().requires_grad_() for x in args]
    exact_o, _ = oracle.mla(*exact_args, mask, 0.07, False)
    direction = torch.randn_like(o)
    ours, exact = torch.autograd.grad(o, args, direction), torch.autograd.grad(exact_o, exact_args, direction.double())
    assert error(o, exact_o) < TOLERANCE[torch.bfloat16] and all(torch.isfinite(g).all() for g in ours)
    values = [error(a, b) for a, b in zip((ours[2], ours[5]), (exact[2], exact[5]))]  # p: not a small difference
    assert max(values) < 4 * TOLERANCE[torch.bfloat16], values


@IMPLS
@pytest.mark.parametrize("kind", ["causal-padding", "lowest"])
def test_forward_repeats_bit_for_bit(kind, impl):
    skip_elsewhere(impl)
    sizes = SIZES["odd-batch-3"]
    args, mask = make(*sizes, requires_grad=False), MASKS[kind](*sizes, torch.bfloat16)
    with select.force("mla", impl):
        first, second = (MLA(*args, mask, 0.07, False) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("kind", ["causal-padding", "lowest"])
def test_forward_and_backward_in_a_cuda_graph(kind):
    sizes = SIZES["odd-batch-3"]
    args, mask = make(*sizes), MASKS[kind](*sizes, torch.bfloat16)
    direction = torch.ones(sizes[0], sizes[1], sizes[2], 128, dtype=torch.bfloat16, device="cuda")

    def step():
        o, _ = MLA(*args, mask, 0.07, False)
        return o, torch.autograd.grad(o, args, direction)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, gradients = step()
    graph.replay()
    expected_o, expected = step()
    assert torch.equal(o, expected_o)
    assert all(error(a, b) < 1e-2 for a, b in zip(gradients, expected))


def test_compiled_training_step_equals_eager():
    compiled = torch.compile(lambda *a: MLA(*a, 0.07, False)[0].transpose(1, 2).flatten(2) * 2, dynamic=True)
    for sizes in (SIZES["odd-batch-3"], SIZES["square"]):
        args, mask = make(*sizes), MASKS["causal-padding"](*sizes, torch.bfloat16)
        o, expected = compiled(*args, mask), MLA(*args, mask, 0.07, False)[0].transpose(1, 2).flatten(2) * 2
        assert torch.equal(o, expected)
        ours, eager = (torch.autograd.grad(x.float().square().sum(), args) for x in (o, expected))
        assert all(error(a, b) < 1e-2 for a, b in zip(ours, eager))


def test_adjacent_parts_are_joined_without_memory():
    q_nope, q_rope, *_ = make(1, 128, 512, 512, requires_grad=False)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    joined = layouts.join_columns(q_nope, q_rope)
    assert torch.cuda.max_memory_allocated() == before and joined.data_ptr() == q_nope.data_ptr()
    copied = layouts.join_columns(q_nope, q_rope.clone())
    assert torch.cuda.max_memory_allocated() - before >= 2 * joined.numel() and torch.equal(copied, joined)


@pytest.mark.parametrize("layout", ["in-place", "by-copy", "heads-outside"])
def test_operator_over_each_layout_of_the_query(layout):
    """Slices of one [B,S,H,N+R], unrelated parts, and slices of one [B,H,S,N+R]: the same numbers, to the bit where the
    kernel sees the same strides."""
    sizes = SIZES["odd-batch-3"]
    args = make(*sizes, requires_grad=False)
    expected, expected_lse = MLA(*args, None, 0.07, False)
    if layout == "by-copy":
        args[1] = args[1].clone()
    if layout == "heads-outside":
        q = torch.cat(args[:2], -1).contiguous()
        args[:2] = q[..., :128], q[..., 128:]
        assert layouts.join_columns(*args[:2]).data_ptr() == q.data_ptr()
    o, lse = MLA(*args, None, 0.07, False)
    assert o.transpose(1, 2).is_contiguous() and error(o, expected) < TOLERANCE[torch.bfloat16]
    if layout != "heads-outside":
        assert torch.equal(o, expected) and torch.equal(lse, expected_lse)
    args = [x.requires_grad_() for x in args]
    check_against_oracle(args, None, torch.bfloat16)


def test_copy_in_words_moves_the_same_bits():
    source = torch.randint(-(2**15), 2**15, (2, 33, 1, 72), dtype=torch.int16, device="cuda").view(torch.bfloat16)
    out = torch.zeros(2, 33, 7, 200, dtype=torch.bfloat16, device="cuda")[..., 128:192]
    layouts.copy_rows(out, source[..., :64])
    assert torch.equal(out.view(torch.int16), source[..., :64].view(torch.int16).expand(-1, -1, 7, -1))
