"""Gated activations in Triton's interpreter, against PyTorch's in float64."""

import pytest
import torch

from dscompile.kernels.activation import ACTIVATIONS, gated_activation
from tests.kernels.moe_cases import activation_arguments, activation_reference

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, interleaved: bool, bias: bool, dtype: torch.dtype) -> None:
    gate_up, ends, b = activation_arguments(11, 300, dtype, "cpu")
    settings = dict(activation=activation, interleaved=interleaved, alpha=1.702, limit=2.0)
    args = (gate_up, ends, b) if bias else (gate_up[:9], None, None)
    want = activation_reference(*args, **settings)
    rtol = 2**-11 if dtype == torch.float16 else 2e-6
    torch.testing.assert_close(gated_activation(*args, **settings).double(), want, rtol=1.01 * rtol, atol=1e-6)


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_no_limit(limit: float) -> None:
    gate_up, *_ = activation_arguments(11, 64, torch.float32, "cpu")
    settings = dict(activation="swiglu_oai", interleaved=True, alpha=1.0, limit=limit)
    want = activation_reference(gate_up[:9], None, None, **settings)
    torch.testing.assert_close(gated_activation(gate_up[:9], **settings).double(), want, rtol=2e-6, atol=1e-6)


def test_nan_stays_behind_a_limit() -> None:
    gate_up = torch.zeros(2, 4)
    gate_up[0, 0], gate_up[1, 3] = torch.nan, torch.nan
    h = gated_activation(gate_up, activation="swiglu_oai", limit=7.0)
    assert h.isnan().tolist() == [[True, False], [False, True]]


def test_strided_and_empty() -> None:
    gate_up, ends, b = activation_arguments(11, 64, torch.float32, "cpu")
    want = gated_activation(gate_up, ends, b)
    assert torch.equal(gated_activation(gate_up.t().contiguous().t(), ends, b.t().contiguous().t()), want)
    assert gated_activation(torch.empty(0, 8)).shape == (0, 4) and gated_activation(torch.empty(3, 0)).shape == (3, 0)
