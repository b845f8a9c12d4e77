"""Which implementation each operator on rows of tokens would take on a Hopper, asked on traced tensors of any machine:
the kernels' own limits, no guard on a symbolic size, and the reason where a better one is skipped."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.kernels import launch
from dscompile.lowering import grouped, moe, rows, select
from tests.lowering.test_row_errors import BF16, CALLS, bf16, fp8, ints, zeros

# The calls of test_row_errors have odd sizes; these are what Hopper's kernels take. D 256, F 128, N 256, K 256.
ALIGNED = {
    "quantize_1x128": {},
    "silu_mul_quantize_1x128": {},
    "fp8_linear": {
        "x": fp8(5, 256), "x_scale": zeros(2, 8), "w": fp8(256, 256), "w_scale": zeros(2, 2), "bias": zeros(256),
    },
    "grouped_linear": {"x": bf16(5, 256), "w": bf16(3, 256, 256)},
    "grouped_weight_grad": {"dy": bf16(5, 256), "x": bf16(5, 256)},
    "fp8_grouped_linear": {"x": fp8(5, 256), "x_scale": zeros(2, 8), "w": fp8(3, 256, 256), "w_scale": zeros(3, 2, 2)},
    "fp8_grouped_linear_masked": {
        "x": fp8(3, 5, 256), "x_scale": zeros(3, 2, 8), "w": fp8(3, 256, 256), "w_scale": zeros(3, 2, 2),
    },
    "route": {},
    "moe_plan": {},
    "moe_gather": {},
    "moe_combine": {},
    "experts": {
        "x": bf16(5, 256), "w_gate_up": bf16(3, 256, 256), "w_down": bf16(3, 256, 128), "b_gate_up": None,
        "b_down": None,
    },
    "fp8_experts": {
        "x": bf16(5, 256), "w_gate_up": fp8(3, 256, 256), "s_gate_up": zeros(3, 2, 2), "w_down": fp8(3, 256, 128),
        "s_down": zeros(3, 2, 1),
    },
}  # fmt: skip
BEST = {
    **dict.fromkeys(ALIGNED, "kernel"),
    **dict.fromkeys(("fp8_linear", "grouped_linear", "fp8_grouped_linear", "fp8_grouped_linear_masked"), "hopper"),
    **dict.fromkeys(("experts", "fp8_experts"), "fused"),
    "grouped_weight_grad": "torch",
}


@pytest.fixture
def hopper(monkeypatch):
    """Every check answers as on a Hopper with Triton and Gluon."""
    if not launch.has_gluon():
        pytest.skip("versions: no Triton with Gluon here")
    monkeypatch.setattr(launch, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    for module in (grouped, moe, rows):
        monkeypatch.setattr(module, "on_cuda", lambda x: select.YES)


def traced(arguments, symbolic=True):
    """-> fake tensors whose first dimensions are symbols, and their environment."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)

    def trace(x):
        if not isinstance(x, torch.Tensor):
            return x
        sizes = [DimDynamic.DUCK if symbolic else DimDynamic.STATIC] + [DimDynamic.STATIC] * (x.dim() - 1)
        return mode.from_tensor(x.contiguous(), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    return tuple(map(trace, arguments)), environment


@pytest.mark.parametrize("op", ALIGNED)
def test_the_best_is_chosen_without_a_guard(hopper, op):
    args, environment = traced({**CALLS[op], **ALIGNED[op]}.values())
    chosen, skipped = select.choose(op, args)
    assert chosen.name == BEST[op] and skipped == []
    assert environment.guards == []


SKIPPED = {
    "grouped_linear": ({"x": bf16(5, 130), "w": bf16(3, 200, 130)}, "triton", "16 bytes"),
    "experts": ({"activation": "gelu"}, "pieces", "only silu"),
    "fp8_experts": ({"activation": "gelu"}, "pieces", "only silu"),
    "grouped_weight_grad": ({"x": bf16(5, 130)}, "reference", "16 bytes"),
    "moe_combine": ({"out_dtype": torch.float64}, "reference", "result is float64"),
    "moe_plan": ({"num_experts": 5000}, "reference", "5000 experts"),
    "route": ({"bias": zeros(16).double()}, "reference", "float64"),
    "silu_mul_quantize_1x128": ({"ends": ints(0)}, "reference", "no groups"),
    "fp8_linear": ({"out_dtype": torch.float32}, "triton", "16 bits a value"),
}


@pytest.mark.parametrize("op", SKIPPED)
def test_the_next_is_chosen_with_the_reason(hopper, op):
    changes, expected, reason = SKIPPED[op]
    args, _ = traced({**CALLS[op], **ALIGNED[op], **changes}.values(), symbolic=False)
    chosen, skipped = select.choose(op, args)
    assert chosen.name == expected and reason in skipped[0][1]


@pytest.mark.parametrize("op", ["experts", "grouped_linear"])
def test_float64_is_left_to_torch(hopper, op):
    arguments = {**CALLS[op], **ALIGNED[op]}
    wide = [x.double() if isinstance(x, torch.Tensor) and x.dtype == BF16 else x for x in arguments.values()]
    chosen, skipped = select.choose(op, traced(wide)[0])
    assert chosen.name in ("pieces", "reference") and "float64" in skipped[0][1]


def test_without_a_device_no_kernel_is_promised(monkeypatch):
    monkeypatch.setattr(grouped, "_cuda_is_present", lambda: False)
    with FakeTensorMode():
        args = tuple(torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in CALLS["grouped_linear"].values())
    chosen, skipped = select.choose("grouped_linear", args)
    assert chosen.name == "reference"
    assert {reason for _, reason in skipped} == {"no CUDA device is present, so its limits can't be asked"}


def test_answers_are_remembered_by_metadata_and_alignment():
    """Asked once for each layout of real tensors, always for traced ones."""
    asked = []
    ask = grouped.remembered(lambda *args: asked.append(args) or select.YES)
    x = torch.zeros(8, 64)
    for same in (x, torch.ones(8, 64)):
        assert ask("impl", same, None, 1.0)
    assert len(asked) == 1
    for other in (
        x[:4],
        x[:, :32],
        x.half(),
        x.t(),
        torch.zeros(8 * 64 + 1)[1:].view(8, 64),
        torch.nn.Parameter(x[:3]),
    ):
        ask("impl", other, None, 1.0)
    ask("other", x, None, 1.0)
    ask("impl", x, x, 1.0)
    assert len(asked) == 9
    fake = FakeTensorMode().from_tensor(x)
    ask("impl", fake, None, 1.0)
    ask("impl", fake, None, 1.0)
    assert len(asked) == 11
