"""Every mistake in a call of the operators on rows of tokens: its own class, in three parts, before anything is
computed, eagerly and at trace time."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import errors, moe, select

OPS, FP8, BF16 = torch.ops.dsinfra, torch.float8_e4m3fn, torch.bfloat16
zeros = torch.zeros


def ints(*shape, dtype=torch.int32):
    return zeros(*shape, dtype=dtype)


def fp8(*shape):
    return zeros(*shape).to(FP8)


def bf16(*shape):
    return zeros(*shape, dtype=BF16)


# Arguments without a mistake, by name: M 5, N 200, K 130, G 3, T 5, E 3, D 130, F 100, top-2.
CALLS = {
    "quantize_1x128": {"x": bf16(5, 130)},
    "silu_mul_quantize_1x128": {"gate_up": bf16(5, 260), "ends": ints(3)},
    "fp8_linear": {
        "x": fp8(5, 130), "x_scale": zeros(2, 8), "w": fp8(200, 130), "w_scale": zeros(2, 2), "bias": zeros(200),
        "out_dtype": BF16,
    },
    "fp8_linear_bf16": {"x": bf16(5, 130), "w": fp8(200, 130), "w_scale": zeros(2, 2), "bias": zeros(200)},
    "grouped_linear": {"x": bf16(5, 130), "w": bf16(3, 200, 130), "ends": ints(3)},
    "grouped_weight_grad": {"dy": bf16(5, 200), "x": bf16(5, 130), "ends": ints(3)},
    "fp8_grouped_linear": {
        "x": fp8(5, 130), "x_scale": zeros(2, 8), "w": fp8(3, 200, 130), "w_scale": zeros(3, 2, 2), "ends": ints(3),
        "out_dtype": BF16,
    },
    "fp8_grouped_linear_masked": {
        "x": fp8(3, 5, 130), "x_scale": zeros(3, 2, 8), "w": fp8(3, 200, 130), "w_scale": zeros(3, 2, 2),
        "counts": ints(3), "out_dtype": BF16,
    },
    "route": {
        "logits": zeros(5, 16), "bias": zeros(16), "top_k": 4, "score": "sigmoid", "n_group": 4, "topk_group": 2,
        "group_score": "top2", "renormalize": True, "eps": 1e-20, "scale": 1.0,
    },
    "moe_plan": {"topk_idx": ints(5, 2), "num_experts": 3},
    "moe_gather": {"x": bf16(5, 130), "order": ints(10), "position": ints(5, 2)},
    "moe_combine": {
        "z": bf16(10, 130), "position": ints(5, 2), "topk_weight": zeros(5, 2), "topk_idx": ints(5, 2),
        "num_experts": 3, "out_dtype": BF16,
    },
    "experts": {
        "x": bf16(5, 130), "topk_idx": ints(5, 2), "topk_weight": zeros(5, 2), "w_gate_up": bf16(3, 200, 130),
        "w_down": bf16(3, 130, 100), "b_gate_up": bf16(3, 200), "b_down": bf16(3, 130), "activation": "silu",
        "interleaved": False, "alpha": 1.0, "limit": 0.0,
    },
    "fp8_experts": {
        "x": bf16(5, 130), "topk_idx": ints(5, 2), "topk_weight": zeros(5, 2), "w_gate_up": fp8(3, 200, 130),
        "s_gate_up": zeros(3, 2, 2), "w_down": fp8(3, 130, 100), "s_down": zeros(3, 2, 1), "activation": "silu",
        "x_scale": None, "out_dtype": None,
    },
}  # fmt: skip

Shape, Dtype, Device, Scale = errors.ShapeMismatch, errors.DtypeMismatch, errors.DeviceMismatch, errors.ScaleError
Ids, Ends, Router = errors.ExpertIdsError, errors.GroupEndsError, errors.RouterError
elsewhere = {"device": "meta"}

# (operator, changes, error, what it says)
MISTAKES = [
    ("quantize_1x128", {"x": bf16(2, 5, 130)}, Shape, r"x has 3 dimensions.*\[M,K\]"),
    ("quantize_1x128", {"x": zeros(5, 130).double()}, Dtype, r"x \[5, 130\] is torch.float64"),
    ("silu_mul_quantize_1x128", {"gate_up": bf16(5, 261)}, Shape, r"gate_up \[5, 261\].*even"),
    ("silu_mul_quantize_1x128", {"ends": ints(3, dtype=torch.int64)}, Ends, r"ends \[3\] of torch.int64"),
    ("silu_mul_quantize_1x128", {"ends": ints(3).to("meta")}, Device, r"ends \[3\] is on meta"),
    ("fp8_linear", {"x": bf16(5, 130)}, Dtype, r"x \[5, 130\] is torch.bfloat16.*quantize_1x128"),
    ("fp8_linear", {"w": fp8(200, 128)}, Shape, r"w \[200, 128\], x \[5, 130\].*contracted"),
    ("fp8_linear", {"x_scale": zeros(5, 2)}, Scale, r"x_scale \[5, 2\] of torch.float32 for x \[5, 130\].*\[2, 8\]"),
    ("fp8_linear", {"x_scale": zeros(2, 5)}, Scale, r"padded to 4 rows: \[2, 8\]"),
    ("fp8_linear", {"x_scale": zeros(8, 2).t()}, Scale, r"strides \[1, 2\].*contiguous"),
    ("fp8_linear", {"x_scale": bf16(2, 8)}, Scale, r"of torch.bfloat16"),
    ("fp8_linear", {"w_scale": zeros(2, 3)}, Scale, r"w_scale \[2, 3\].*\[200, 130\].*\[2, 2\]"),
    ("fp8_linear", {"w_scale": zeros(2, 2).to(torch.float8_e8m0fnu)}, Scale, r"\.float\(\)"),
    ("fp8_linear", {"bias": zeros(199)}, Shape, r"bias \[199\], w \[200, 130\]"),
    ("fp8_linear", {"out_dtype": torch.float64}, Dtype, r"out_dtype is torch.float64"),
    ("fp8_linear", {"w_scale": zeros(2, 2, **elsewhere)}, Device, r"w_scale \[2, 2\] is on meta"),
    ("fp8_linear_bf16", {"w": bf16(200, 130)}, Dtype, r"w \[200, 130\] is torch.bfloat16"),
    ("fp8_linear_bf16", {"x": zeros(5, 130).double()}, Dtype, r"x \[5, 130\] is torch.float64"),
    ("grouped_linear", {"w": zeros(3, 200, 130)}, Dtype, r"w .* is torch.float32 but x .* is torch.bfloat16"),
    ("grouped_linear", {"w": bf16(3, 130, 200)}, Shape, r"w \[3, 130, 200\], x \[5, 130\]"),
    ("grouped_linear", {"w": bf16(200, 130)}, Shape, r"w has 2 dimensions.*\[G,N,K\]"),
    ("grouped_linear", {"ends": ints(4)}, Ends, r"ends \[4\] .* for 3 groups.*cumsum"),
    ("grouped_linear", {"x": ints(5, 130)}, Dtype, r"x \[5, 130\] is torch.int32"),
    ("grouped_weight_grad", {"dy": bf16(4, 200)}, Shape, r"dy \[4, 200\], x \[5, 130\]"),
    ("grouped_weight_grad", {"dy": zeros(5, 200)}, Dtype, r"dy .* is torch.float32"),
    ("fp8_grouped_linear", {"ends": ints(2)}, Ends, r"for 3 groups"),
    ("fp8_grouped_linear", {"w_scale": zeros(3, 2, 1)}, Scale, r"\[3, 2, 2\]"),
    ("fp8_grouped_linear", {"w": bf16(3, 200, 130)}, Dtype, r"w .* is torch.bfloat16"),
    ("fp8_grouped_linear_masked", {"x": fp8(2, 5, 130)}, Shape, r"w \[3, 200, 130\], x \[2, 5, 130\]"),
    ("fp8_grouped_linear_masked", {"counts": ints(3).to("meta")}, Device, r"counts \[3\] is on meta"),
    ("fp8_grouped_linear_masked", {"x_scale": zeros(3, 2, 5)}, Scale, r"\[3, 2, 8\]"),
    ("fp8_grouped_linear_masked", {"x": fp8(5, 130)}, Shape, r"\[L,max,K\]"),
    ("route", {"score": "tanh"}, Router, r"score is 'tanh'.*softmax_topk"),
    ("route", {"group_score": "mean"}, Router, r"group_score is 'mean'"),
    ("route", {"top_k": 17}, Router, r"top_k 17 of 16 experts"),
    ("route", {"top_k": 0}, Router, r"top_k 0"),
    ("route", {"n_group": 3}, Router, r"16 experts in 3 groups"),
    ("route", {"topk_group": 5}, Router, r"5 of them kept"),
    ("route", {"n_group": 16, "topk_group": 4}, Router, r"top2 adds two experts"),
    ("route", {"topk_group": 1, "top_k": 5}, Router, r"top_k 5, but 1 groups of 4 experts are kept"),
    ("route", {"bias": zeros(15)}, Shape, r"bias \[15\], logits \[5, 16\]"),
    ("route", {"logits": ints(5, 16)}, Dtype, r"logits .* is torch.int32"),
    ("moe_plan", {"topk_idx": zeros(5, 2)}, Ids, r"topk_idx \[5, 2\] of torch.float32"),
    ("moe_plan", {"num_experts": 0}, Ids, r"0 experts"),
    ("moe_gather", {"order": ints(9)}, Shape, r"order \[9\], position \[5, 2\]"),
    ("moe_gather", {"position": ints(4, 2), "order": ints(8)}, Shape, r"position \[4, 2\], x \[5, 130\]"),
    ("moe_gather", {"order": ints(10, dtype=torch.int64)}, Dtype, r"order \[10\] is torch.int64"),
    ("moe_combine", {"z": bf16(9, 130)}, Shape, r"z \[9, 130\], topk_idx \[5, 2\]"),
    ("moe_combine", {"topk_weight": zeros(5, 3)}, Shape, r"topk_weight \[5, 3\]"),
    ("moe_combine", {"out_dtype": FP8}, Dtype, r"out_dtype is torch.float8_e4m3fn"),
    ("experts", {"topk_idx": zeros(5, 2)}, Ids, r"topk_idx \[5, 2\] of torch.float32.*torch.topk"),
    ("experts", {"topk_idx": ints(5, 2, dtype=torch.int16)}, Ids, r"torch.int16"),
    ("experts", {"topk_idx": ints(4, 2)}, Ids, r"topk_idx \[4, 2\] for 5 rows"),
    ("experts", {"topk_weight": zeros(5, 3)}, Shape, r"topk_weight \[5, 3\], topk_idx \[5, 2\]"),
    ("experts", {"topk_weight": ints(5, 2)}, Dtype, r"topk_weight .* torch.int32"),
    ("experts", {"w_gate_up": bf16(3, 100, 130)}, Shape, r"w_gate_up \[3, 100, 130\].*\[3, 200, 130\]"),
    ("experts", {"w_gate_up": bf16(3, 130, 200)}, Shape, r"F rows of the gate and F of up"),
    ("experts", {"w_down": bf16(3, 100, 130)}, Shape, r"w_down \[3, 100, 130\], x \[5, 130\]"),
    ("experts", {"w_down": zeros(3, 130, 100)}, Dtype, r"w_down .* is torch.float32 but w_gate_up"),
    ("experts", {"b_gate_up": bf16(3, 100)}, Shape, r"b_gate_up \[3, 100\]"),
    ("experts", {"b_down": bf16(3, 100)}, Shape, r"b_down \[3, 100\], w_down \[3, 130, 100\]"),
    ("experts", {"b_down": zeros(3, 130)}, Dtype, r"b_down .* is torch.float32"),
    ("experts", {"activation": "relu"}, errors.ActivationError, r"'relu'.*silu, gelu, gelu_tanh, swiglu_oai"),
    ("experts", {"x": bf16(5, 130).to("meta")}, Device, r"topk_idx .* is on cpu but the rows \[5, 130\] are on meta"),
    ("experts", {"x": fp8(5, 130)}, Dtype, r"x .* is torch.float8_e4m3fn"),
    ("fp8_experts", {"w_down": bf16(3, 130, 100)}, Dtype, r"w_down .* is torch.bfloat16"),
    ("fp8_experts", {"s_gate_up": zeros(3, 3, 2)}, Scale, r"s_gate_up \[3, 3, 2\].*drop rows"),
    ("fp8_experts", {"s_down": zeros(3, 1, 1)}, Scale, r"s_down \[3, 1, 1\].*\[3, 2, 1\]"),
    ("fp8_experts", {"activation": "swiglu_oai"}, errors.ActivationError, r"settings.*dsinfra::experts"),
    ("fp8_experts", {"x": fp8(5, 130), "x_scale": zeros(2, 5)}, Scale, r"x_scale \[2, 5\].*\[2, 8\]"),
    ("fp8_experts", {"x": fp8(5, 130)}, Dtype, r"x \[5, 130\] is torch.float8_e4m3fn"),
    ("fp8_experts", {"x": zeros(5, 130).double()}, Dtype, r"x .* is torch.float64"),
]  # fmt: skip
CASES = pytest.mark.parametrize(
    ("name", "changes", "error", "says"), MISTAKES, ids=[f"{m[0]}-{'-'.join(m[1])}-{i}" for i, m in enumerate(MISTAKES)]
)


def call(name, changes=None):
    return getattr(OPS, name).default, tuple({**CALLS[name], **(changes or {})}.values())


@pytest.mark.parametrize("name", CALLS)
def test_calls_without_a_mistake_pass(name):
    op, args = call(name)
    assert [a.name for a in op._schema.arguments] == list(CALLS[name])
    op(*args)


@CASES
def test_mistake_is_named_before_anything_is_computed(monkeypatch, name, changes, error, says):
    op, args = call(name, changes)
    monkeypatch.setattr(select.Table, "choose", lambda self, args: pytest.fail("an implementation was chosen"))
    monkeypatch.setattr(moe, "forward_pieces", lambda *args: pytest.fail("something was computed"))
    with pytest.raises(error, match=says) as raised:
        op(*args)
    assert raised.type is error
    found, why, change = raised.value.found, raised.value.why, raised.value.change
    assert found.startswith(f"{name}:") and why and change


@CASES
def test_mistake_is_named_at_trace_time(name, changes, error, says):
    op, args = call(name, changes)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
    with mode, pytest.raises(error, match=says):
        op(*fakes)


def test_experts_forward_makes_the_same_checks():
    args = {**CALLS["experts"], "w_down": bf16(3, 100, 130)}
    with pytest.raises(errors.ShapeMismatch, match=r"experts: w_down \[3, 100, 130\]"):
        OPS.experts_forward(*args.values())
