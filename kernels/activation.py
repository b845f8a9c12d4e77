"""Gated activations of expert layers, with the bias of each row's expert: the entry, its limits, its launch.

For what isn't fused elsewhere: silu without a bias is part of the grouped GEMM or of the quantisation behind it. The
formulas are at the head of kernels/activation_triton.py. No host synchronisation and no state: safe in a CUDA graph.
"""

from __future__ import annotations

import torch

from dscompile.kernels.overlap import start_overlapped
from dscompile.kernels.refusals import BadArguments, device_refusal, refuse_if

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")


def gated_activation(
    gate_up: torch.Tensor,
    ends: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float = 0.0,
) -> torch.Tensor:
    """gate_up [M, 2F] bfloat16, float16 or float32 -> h [M, F] in its dtype.

    Args:
        gate_up: columns contiguous, or it is copied.
        ends: int32 [E], the end of each expert's rows. Those past the last are not read and give zeros.
        bias: [E, 2F] in any of these dtypes, laid out as gate_up; its expert's row is added to each row, rounded to the
            dtype of gate_up. Wants ends.
        activation: "silu", "gelu", "gelu_tanh" or "swiglu_oai".
        interleaved: gate and up are the even and the odd columns, not the first and the second half.
        alpha, limit: of "swiglu_oai"; a limit of 0 or below is none. The others take neither.

    Raises:
        BadArguments: shapes, names or dtypes that don't fit together.
        KernelLimit: no Triton, no CUDA device, or another dtype.
    """
    _check(gate_up, ends, bias, activation)
    for name, x in (("gate_up", gate_up), ("bias", bias)):
        refuse_if(None if x is None else device_refusal(name, x))
    from dscompile.kernels.activation_triton import activation_kernel

    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    h = torch.empty((rows, columns), dtype=gate_up.dtype, device=gate_up.device)
    if h.numel() == 0:
        return h
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    if bias is not None and bias.stride(1) != 1:
        bias = bias.contiguous()
    groups = 0 if ends is None else ends.shape[0]
    width = min(1024, max(256, 1 << (columns - 1).bit_length()))
    start_overlapped(
        activation_kernel,
        rows * -(-columns // width),
        h.device,
        gate_up,
        ends,
        bias,
        h,
        columns,
        gate_up.stride(0),
        0 if bias is None else bias.stride(0),
        groups,
        float(alpha),
        float(limit),
        ACTIVATION=activation,
        CLAMPED=limit > 0,
        INTERLEAVED=interleaved,
        COLUMNS=width,
        GROUPS=1 << max(groups - 1, 0).bit_length(),
        num_warps=width // 256,
    )
    return h


def _check(gate_up: torch.Tensor, ends: torch.Tensor | None, bias: torch.Tensor | None, activation: str) -> None:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise BadArguments(f"gate_up is {tuple(gate_up.shape)}. Each gate has something to multiply. Pass [M, 2F].")
    if activation not in ACTIVATIONS:
        raise BadArguments(
            f"activation is {activation!r}. No kernel has that name. Use one of {', '.join(map(repr, ACTIVATIONS))}."
        )
    if ends is not None and (
        ends.dtype != torch.int32
        or ends.dim() != 1
        or not len(ends)
        or not ends.is_contiguous()
        or ends.device != gate_up.device
    ):
        raise BadArguments(
            f"ends is {ends.dtype} {tuple(ends.shape)} on {ends.device}. It says which rows an expert has. Pass "
            f"contiguous int32 [E] on {gate_up.device}."
        )
    if bias is not None and (
        ends is None or bias.shape != (len(ends), gate_up.shape[1]) or bias.device != gate_up.device
    ):
        raise BadArguments(
            f"bias is {tuple(bias.shape)} on {bias.device} for gate_up {tuple(gate_up.shape)} and "
            f"{'no ends' if ends is None else f'{len(ends)} experts'}. A row gets its expert's. Pass ends, and "
            f"[E, {gate_up.shape[1]}] on {gate_up.device}."
        )
