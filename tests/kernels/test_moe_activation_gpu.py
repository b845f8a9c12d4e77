"""Gated activations on a GPU, against PyTorch's in float64."""

import pytest
import torch

from dscompile.kernels.activation import ACTIVATIONS, gated_activation
from tests.kernels.moe_cases import activation_arguments, activation_reference

pytestmark = pytest.mark.gpu


# One rounding to the dtype, and float32's own.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 3e-6)])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, interleaved: bool, bias: bool, dtype: torch.dtype, rtol: float) -> None:
    gate_up, ends, b = activation_arguments(500, 2880, dtype, "cuda")
    settings = dict(activation=activation, interleaved=interleaved, alpha=1.702, limit=7.0)
    args = (gate_up, ends, b if bias else None)
    h = gated_activation(*args, **settings)
    torch.testing.assert_close(h.double(), activation_reference(*args, **settings), rtol=1.01 * rtol, atol=2e-6)
    assert not bool(h[-2:].any())
