"""The expanded form around torch's CUDA attention, run on the CPU with stand-ins that keep the kernels' contracts.

So everything of ours is tested here: building k and v, the cut of a causal mask, the join by log-sum-exp, the bias and
the rows it gets wrong, the trial run, and the way back through the projections. The kernels themselves: test_mla_gpu.py
and test_mla_masked_gpu.py.
"""

import math

import pytest
import torch

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import cudnn_trial, expanded, masking, torch_attention
from dscompile.lowering.ops import mla
from tests.lowering import stand_ins
from tests.lowering.test_mla import SIZES, make, make_mask


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    stand_ins.install(monkeypatch)


def check(backend, sizes, mask, causal):
    args = make(sizes, torch.float64)
    expected_o, expected_lse = mla.reference(*args, mask, 0.3, causal)
    o, lse = expanded.forward(backend, *args, mask, 0.3, causal)
    torch.testing.assert_close(o, expected_o)
    torch.testing.assert_close(lse.float(), expected_lse)
    assert o.transpose(1, 2).is_contiguous()
    grad_o = torch.randn(o.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = mla.reference_backward(grad_o, *args, mask, expected_o, expected_lse, 0.3, causal)
    gradients = expanded.backward(backend, grad_o, *args, mask, o, lse, 0.3, causal)
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride() or 1 in ours.shape or 0 in ours.shape


CUDNN_SIZES = {name: SIZES[name] for name in ("square", "longer-cache", "one-query", "no-rope", "odd")}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", CUDNN_SIZES.values(), ids=CUDNN_SIZES)
def test_cudnn_path_equals_reference(sizes, causal):
    assert torch_attention.cudnn_causal_refusal(sizes[2], sizes[3], causal) == ""
    check(expanded.CUDNN, sizes, None, causal)


BACKENDS = {"cudnn": expanded.CUDNN, "efficient": expanded.EFFICIENT}
both = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


@both
@pytest.mark.parametrize("kind", ["bool", "bool-2d", "bool-per-key", "float"])
@pytest.mark.parametrize("name", CUDNN_SIZES)
def test_masked_path_equals_reference(backend, name, kind):
    mask, causal = make_mask(kind, SIZES[name], torch.float64)
    check(backend, SIZES[name], mask, causal)


@pytest.mark.parametrize("kind", ["full", "causal"])
@pytest.mark.parametrize("name", CUDNN_SIZES)
def test_efficient_path_equals_reference(name, kind):
    mask, causal = make_mask(kind, SIZES[name], torch.float64)
    check(expanded.EFFICIENT, SIZES[name], mask, causal)


LOWEST = torch.finfo(torch.float64).min


@both
@pytest.mark.parametrize("hidden", [None, -math.inf, LOWEST], ids=["bool", "-inf", "lowest"])
def test_row_that_sees_nothing(backend, hidden):
    """Nothing by bool or -inf: zeros. By the lowest finite value: the mean, as torch.softmax has it."""
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, 0, 3] = mask[:, :, :, 1] = False
    if hidden is not None:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill_(~mask, hidden)
    check(backend, SIZES["square"], mask, False)


@both
def test_row_hidden_in_two_ways(backend):
    """Two additive masks summed: -inf where both hide. The keys that one of them hides share the row evenly."""
    mask = torch.zeros(5, 5, dtype=torch.float64)
    mask[2], mask[2, ::2] = LOWEST, -math.inf
    check(backend, SIZES["square"], mask, False)


@both
def test_mask_of_one_column_is_materialised(backend):
    mask = torch.tensor([True, False, True, True, True]).view(1, 1, 5, 1)
    check(backend, SIZES["square"], mask, False)
    check(backend, SIZES["square"], torch.zeros(5, 1, dtype=torch.float64).masked_fill_(~mask[0, 0], LOWEST), False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_trial_passes_on_kernels_that_keep_their_contract(mask, dtype):
    mask_dtype = {"none": None, "bool": torch.bool, "float": dtype}[mask]
    assert cudnn_trial.run_trial(torch.device("cpu"), dtype, 24, 16, mask_dtype) == ""


class Refusing(stand_ins.Cudnn):
    def forward(self, *args, **settings):
        raise RuntimeError("No valid execution plans built.\nand more")


class IgnoringTheBias(stand_ins.Cudnn):
    def bias(self, bias, q, k, causal):
        return torch.zeros_like(super().bias(bias, q, k, causal))


class OverflowingInBase2(stand_ins.Cudnn):
    """Its exponent is exp2(fma(s, log2(e), -m)): -inf - -inf where the bias is the lowest value."""

    def forward(self, q, k, v, bias, *args, **settings):
        o, lse, *rest = super().forward(q, k, v, bias, *args, **settings)
        overflowed = (bias.float() * 1.4427 == -math.inf).all(-1, keepdim=True)
        return o.masked_fill(overflowed, math.nan), lse, *rest


class BackwardWithNan(stand_ins.Cudnn):
    def backward(self, *args, **settings):
        dq, dk, dv = super().backward(*args, **settings)
        return dq.index_fill(2, torch.tensor([1]), math.nan), dk, dv


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        (Refusing(), "refused a trial of widths 24/16 in torch.bfloat16 with a mask of torch.bool: No valid execution"),
        (IgnoringTheBias(), "wrong results"),
        (BackwardWithNan(), "wrong results"),
    ],
    ids=["refuses", "ignores-the-bias", "nan"],
)
def test_trial_notices(monkeypatch, kernels, reason):
    stand_ins.install(monkeypatch, kernels)
    said = cudnn_trial.run_trial(torch.device("cpu"), torch.bfloat16, 24, 16, torch.bool)
    assert reason in said and "and more" not in said


def test_trial_notices_what_the_floor_prevents(monkeypatch):
    stand_ins.install(monkeypatch, OverflowingInBase2())
    trial = torch.device("cpu"), torch.bfloat16, 24, 16, torch.bfloat16
    assert cudnn_trial.run_trial(*trial) == ""
    monkeypatch.setattr(masking, "floor_of", lambda dtype: torch.finfo(dtype).min)
    monkeypatch.setattr(masking, "hidden_value", lambda mask, dtype: torch.finfo(dtype).min)
    assert "wrong results" in cudnn_trial.run_trial(*trial)


def test_trial_is_kept_and_not_made_while_a_graph_is_captured(monkeypatch):
    runs, capturing = [], [True]
    monkeypatch.setattr(cudnn_trial, "_answers", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(cudnn_trial, "run_trial", lambda *args: runs.append(args) or "no")
    ask = 0, torch.bfloat16, 192, 128, torch.bool
    assert "warm up" in cudnn_trial.cudnn_trial(*ask) and not runs
    capturing[0] = False
    assert cudnn_trial.cudnn_trial(*ask) == "no"
    capturing[0] = True
    assert cudnn_trial.cudnn_trial(*ask) == "no" and len(runs) == 1


def test_expand_writes_keys_in_place_of_a_copy():
    """The up-projection's output is the key buffer itself: rows of H * (N + R), the rope part beside each head's."""
    _, _, latent, k_rope, w_uk, w_uv = make(SIZES["odd"], torch.float64)
    B, H, _, T, N, R, V, _ = SIZES["odd"]
    k, v = expanded.expand(latent, k_rope, w_uk, w_uv)
    assert k.transpose(1, 2).is_contiguous() and v.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(k[..., :N], torch.einsum("btc,hnc->bhtn", latent, w_uk))
    torch.testing.assert_close(v, torch.einsum("btc,hvc->bhtv", latent, w_uv))
    assert torch.equal(k[..., N:], k_rope.unsqueeze(1).expand(B, H, T, R))
