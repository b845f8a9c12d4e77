"""`dsinfra::experts` on the CPU: reference, gradient, what it keeps, shape function, autocast, tables, debug checks."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import errors, grouped, select
from dscompile.lowering.ops import experts as module
from tests.lowering import experts_oracle
from tests.lowering.graphs import compile_counting

EXPERTS = torch.ops.dsinfra.experts.default

# name: T, D, F, E, K
SIZES = {
    "usual": (9, 6, 5, 4, 2),
    "one-token": (1, 8, 4, 8, 3),
    "one-expert": (5, 4, 3, 1, 1),
    "more-experts-than-rows": (2, 4, 6, 16, 2),
    "odd": (7, 13, 11, 5, 3),
    "no-token": (0, 4, 4, 3, 2),
}
# name: activation, interleaved, alpha, limit
ACTIVATIONS = {
    "silu": ("silu", False, 1.0, 0.0),
    "silu-interleaved": ("silu", True, 1.0, 0.0),
    "gelu": ("gelu", False, 1.0, 0.0),
    "gelu-tanh": ("gelu_tanh", False, 1.0, 0.0),
    "oai": ("swiglu_oai", True, 1.702, 0.7),
    "oai-no-limit": ("swiglu_oai", False, 1.702, 0.0),
}


def make(sizes, dtype=torch.float32, biases=False, sentinels=False, requires_grad=False, seed=0):
    """Arguments up to b_down. Weights are transposed views of parameters [E,D,2F] and [E,F,D] when biases are there."""
    T, D, F, E, K = sizes
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_(requires_grad)

    x, weight = normal(T, D), normal(T, K)
    idx = torch.rand(T, E, generator=g).topk(K, -1).indices
    if sentinels:
        idx[torch.rand(T, K, generator=g) < 0.3] = E
        idx[torch.rand(T, K, generator=g) < 0.2] = -1
    if not biases:
        return [x, idx, weight, normal(E, 2 * F, D), normal(E, D, F), None, None]
    w_gate_up, w_down = normal(E, D, 2 * F), normal(E, F, D)
    return [x, idx, weight, w_gate_up.transpose(1, 2), w_down.transpose(1, 2), normal(E, 2 * F), normal(E, D)]


def differentiable(args):
    return [x for x in args if x is not None and x.requires_grad]


@pytest.mark.parametrize("sentinels", [False, True], ids=["all-valid", "sentinels"])
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_matches_oracle(sizes, activation, biases, sentinels):
    args = make(sizes, biases=biases, sentinels=sentinels)
    y = EXPERTS(*args, *activation)
    torch.testing.assert_close(y.double(), experts_oracle.experts(*args, *activation), rtol=1e-5, atol=2e-5)
    assert y.dtype == args[0].dtype and y.is_contiguous()


@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "in-a-graph"])
def test_sentinels_touch_nothing(capturing, monkeypatch):
    """A row of sentinels is zero, though its token, weight and the experts that nobody chose hold NaN."""
    monkeypatch.setattr(module, "can_wait", lambda x: not capturing)
    x, idx, weight, w_gate_up, w_down, *_ = make(SIZES["usual"])
    idx[idx == 3] = 0
    idx[1], idx[2, 0] = torch.tensor([-1, 4]), 8
    expected = experts_oracle.experts(x, idx, weight, w_gate_up, w_down, None, None, *ACTIVATIONS["silu"])
    x[1], weight[1], weight[2, 0], w_gate_up[3], w_down[3] = (float("nan"),) * 5
    y = EXPERTS(x, idx, weight, w_gate_up, w_down, None, None, *ACTIVATIONS["silu"])
    assert torch.all(y[1] == 0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rounds_once_to_the_dtype_of_x(dtype, idx_dtype):
    x, idx, *rest = make(SIZES["usual"], dtype)
    y = EXPERTS(x, idx.to(idx_dtype), *rest, *ACTIVATIONS["silu"])
    exact = experts_oracle.experts(x, idx, *rest, *ACTIVATIONS["silu"])
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("sentinels", [False, True], ids=["all-valid", "sentinels"])
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("sizes", [SIZES["usual"], SIZES["more-experts-than-rows"]], ids=["usual", "few-rows"])
def test_gradients_match_oracle(sizes, activation, biases, sentinels):
    args = make(sizes, torch.float64, biases, sentinels, requires_grad=True)
    y, expected = EXPERTS(*args, *activation), experts_oracle.experts(*args, *activation)
    torch.testing.assert_close(y, expected)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    inputs = differentiable(args)
    ours, exact = (torch.autograd.grad(out, inputs, direction) for out in (y, expected))
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["silu", "oai"])
def test_gradcheck(name):
    x, idx, *rest = make((3, 4, 3, 3, 2), torch.float64, biases=True, sentinels=True, requires_grad=True)
    rest = [r.detach().requires_grad_() for r in rest]
    assert torch.autograd.gradcheck(lambda x, *r: EXPERTS(x, idx, *r, *ACTIVATIONS[name]), (x, *rest))


@pytest.mark.parametrize(
    "wanted", [0, 2, 3, 4, 5, 6], ids=["x", "weight", "w_gate_up", "w_down", "b_gate_up", "b_down"]
)
def test_frozen_parts_get_and_cost_nothing(wanted):
    """Only the product that the one wanted gradient needs is computed."""
    args = make(SIZES["usual"], torch.float64, biases=True)
    args = [a if a is None or i != wanted else a.detach().requires_grad_() for i, a in enumerate(args)]
    y = EXPERTS(*args, *ACTIVATIONS["silu"])
    with FlopCounterMode(display=False) as counter:
        (grad,) = torch.autograd.grad(y.sum(), [args[wanted]])
    assert grad.shape == args[wanted].shape
    T, D, F, E, K = SIZES["usual"]
    ours = {str(op): count for op, count in counter.get_flop_counts()["Global"].items() if "grouped" in str(op)}
    dgrad, wgrad = ours.get("dsinfra.grouped_linear", 0), ours.get("dsinfra.grouped_weight_grad", 0)
    through_down, through_gate_up = 2 * T * K * D * F, 4 * T * K * D * F
    assert dgrad == through_down + (through_gate_up if wanted == 0 else 0)
    assert wgrad == {3: through_gate_up, 4: through_down}.get(wanted, 0)


def test_keeps_gate_up_and_the_plan_only():
    args = make(SIZES["usual"], requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        EXPERTS(*args, *ACTIVATIONS["silu"])
    inputs = {x.data_ptr() for x in args if x is not None}
    T, D, F, E, K = SIZES["usual"]
    extra = [tuple(x.shape) for x in kept if x.data_ptr() not in inputs]
    assert sorted(extra) == sorted([(T * K, 2 * F), (T * K,), (T, K), (E,)])


def test_gradient_of_the_gradient_is_refused():
    args = make(SIZES["usual"], requires_grad=True)
    y = EXPERTS(*args, *ACTIVATIONS["silu"])
    with pytest.raises(errors.NotDifferentiable, match=r"gradient of its gradient.*create_graph"):
        torch.autograd.grad(y.sum(), args[0], create_graph=True)


def test_form_without_gradients():
    args = make(SIZES["usual"], requires_grad=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not EXPERTS(*args, *ACTIVATIONS["silu"]).requires_grad
    frozen = [x if x is None else x.detach() for x in args]
    assert EXPERTS(*frozen, *ACTIVATIONS["silu"]).grad_fn is None


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_opcheck(biases, requires_grad):
    args = make(SIZES["usual"], biases=biases, sentinels=True)
    args = [
        a.detach().clone().requires_grad_(requires_grad) if a is not None and a.is_floating_point() else a for a in args
    ]
    for op in (EXPERTS, torch.ops.dsinfra.experts_forward.default):
        torch.library.opcheck(op, (*args, *ACTIVATIONS["oai"]))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiles_once_for_all_lengths(training):
    compiled, graphs = compile_counting(lambda *a: EXPERTS(*a, None, None, "silu", False, 1.0, 0.0) + 1)
    for T in (3, 5, 12):
        args = make((T, 6, 5, 4, 2), requires_grad=training)[:5]
        ours, eager = compiled(*args), EXPERTS(*args, None, None, "silu", False, 1.0, 0.0) + 1
        assert torch.equal(ours, eager)
        if training:
            both = [torch.autograd.grad(y.sum(), differentiable(args)) for y in (ours, eager)]
            assert all(map(torch.equal, *both))
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert "dsinfra.experts.default" in names and not any("experts_forward" in name for name in names)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["x-fp32", "x-bf16"])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16], ids=["w-fp32", "w-bf16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_computes_in_the_dtype_of_the_weights(x_dtype, w_dtype, autocast):
    """As torch's grouped_mm in the written form: no autocast rule, rows converted to the weights' dtype."""
    x, idx, weight, w_gate_up, w_down, *none = make(SIZES["usual"])
    args = (x.to(x_dtype), idx, weight, w_gate_up.to(w_dtype), w_down.to(w_dtype), *none)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = EXPERTS(*args, *ACTIVATIONS["silu"])
    exact = experts_oracle.experts(args[0].to(w_dtype), *args[1:], *ACTIVATIONS["silu"])
    assert y.dtype == x_dtype
    torch.testing.assert_close(y.double(), exact, rtol=max(1e-5, torch.finfo(x_dtype).eps), atol=1e-5)


def test_gradients_of_mixed_dtypes_have_the_dtypes_of_their_inputs():
    x, idx, weight, w_gate_up, w_down, *none = make(SIZES["usual"])
    leaves = [t.detach().requires_grad_() for t in (x, weight, w_gate_up.bfloat16(), w_down.bfloat16())]
    EXPERTS(leaves[0], idx, *leaves[1:], *none, *ACTIVATIONS["silu"]).sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.parametrize("op", [EXPERTS, torch.ops.dsinfra.experts_forward.default], ids=["experts", "experts_forward"])
def test_flops(op):
    T, D, F, E, K = SIZES["usual"]
    with FlopCounterMode(display=False) as counter:
        op(*make(SIZES["usual"]), *ACTIVATIONS["silu"])
    assert counter.get_total_flops() == 6 * T * K * D * F


def test_tables_name_the_way_and_why_better_ones_were_skipped():
    args = (*make(SIZES["usual"]), *ACTIVATIONS["silu"])
    chosen, skipped = select.choose("experts", args)
    assert chosen.name == "reference"
    assert skipped == [
        ("fused", "the tensors are on cpu, not cuda"),
        ("pieces", "the tensors are on cpu, not cuda"),
    ]
    assert select.table("experts").names == ("fused", "pieces", "reference")
    args = (*make(SIZES["usual"], biases=True), *ACTIVATIONS["oai"])
    assert "only silu(gate) * up in two halves without biases" in select.choose("experts", args)[1][0][1]


def test_pieces_agree_with_the_reference():
    """The pipeline's steps as they run on a CUDA device where the fused form doesn't apply."""
    args = (*make(SIZES["odd"], biases=True, sentinels=True), *ACTIVATIONS["oai"])
    pieces = select.table("experts").get("pieces").run(*args)
    torch.testing.assert_close(pieces, EXPERTS(*args), rtol=1e-5, atol=1e-5)


def test_traced_metadata_is_plain():
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(4, 6, dtype=torch.bfloat16)[:, 2:]
        plain = grouped.concrete(fake)
    assert plain.shape == (4, 4) and plain.stride() == (6, 1) and plain.stride(0) == 6 and plain.dim() == 2
    assert plain.data_ptr() == 4 and plain.element_size() == 2 and plain.numel() == 16
    real = torch.zeros(2)
    assert grouped.concrete(real) is real and grouped.concrete(None) is None


# ------------------------------------------------------------------ debug checks


def test_debug_checks_name_the_first_bad_row(monkeypatch):
    x, idx, *rest = make(SIZES["usual"])
    idx[2], idx[5, 1], idx[7, 0] = torch.tensor([-1, 8]), 9, -2  # row 2 holds the farthest sentinels that pass
    assert torch.isfinite(EXPERTS(x, idx, *rest, *ACTIVATIONS["silu"])).all()
    monkeypatch.setattr(module, "debug_checks", True)
    for op in (EXPERTS, torch.ops.dsinfra.experts_forward.default):
        with pytest.raises(errors.ExpertIdsError, match=r"row 5 of topk_idx \[9, 2\] holds \[\d, 9\], of 4 experts"):
            op(x, idx, *rest, *ACTIVATIONS["silu"])
    monkeypatch.setattr(module, "can_wait", lambda x: False)  # a graph is captured: nothing may be read
    module.check_values("experts", idx, 4)


@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("0", "False"), (None, "False")])
def test_debug_checks_are_an_environment_variable(value, expected):
    environment = {key: v for key, v in os.environ.items() if key != "DSINFRA_DEBUG_CHECKS"}
    environment |= {} if value is None else {"DSINFRA_DEBUG_CHECKS": value}
    code = "from dscompile.lowering.ops import experts; print(experts.debug_checks)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
