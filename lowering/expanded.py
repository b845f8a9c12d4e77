"""MLA in its expanded form on CUDA: keys and values are built from the latent, then torch's best kernel attends.

For prefill and training: k = [W_uk c, k_rope] and v = W_uv c cost two GEMMs and are read by S queries each. Forward
keeps only the latent side; backward builds k and v again, so a layer saves B*T*(C + R) elements instead of
B*T*H*(N + R + V).

Layouts: k [B,T,H,N+R] and v [B,T,H,V] are contiguous. The up-projections are batched GEMMs over heads that write
straight into that pitch (cuBLAS takes any row pitch for its output), so no copy of k or v follows; the rope part is one
broadcast copy. The query's two parts are taken in place where they lie side by side in memory.

Implementations registered here: `cudnn` and `efficient`, for the operators `mla` and `mla_backward`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dscompile.lowering import torch_attention
from dscompile.lowering.cudnn_trial import cudnn_trial
from dscompile.lowering.layouts import copy_rows, in_bshd, join_columns
from dscompile.lowering.select import YES, Decision, is_real, no, size, table


@dataclass(frozen=True)
class Backend:
    """A fused attention over expanded keys and values, as `torch_attention` describes them."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    # (S, T, causal) -> why the backward doesn't take what the forward takes, or an empty string.
    backward_refusal: Callable[[int, int, bool], str] = lambda S, T, causal: ""


CUDNN = Backend(torch_attention.cudnn_forward, torch_attention.cudnn_backward, torch_attention.cudnn_backward_refusal)
EFFICIENT = Backend(torch_attention.efficient_forward, torch_attention.efficient_backward)


# ------------------------------------------------------------------ the computation


def expand(latent_BTC: Tensor, k_rope_BTR: Tensor, w_uk_HNC: Tensor, w_uv_HVC: Tensor) -> tuple[Tensor, Tensor]:
    """-> k [B,H,T,N+R], v [B,H,T,V], transposes of contiguous [B,T,H,.]."""
    B, T, C = latent_BTC.shape
    H, N, _ = w_uk_HNC.shape
    V, R = w_uv_HVC.shape[1], k_rope_BTR.shape[2]
    k_BTHD = latent_BTC.new_empty(B, T, H, N + R)
    v_BTHV = latent_BTC.new_empty(B, T, H, V)
    rows_HMC = latent_BTC.reshape(B * T, C).expand(H, B * T, C)
    torch.bmm(rows_HMC, w_uk_HNC.transpose(1, 2), out=k_BTHD.view(B * T, H, N + R)[..., :N].transpose(0, 1))
    torch.bmm(rows_HMC, w_uv_HVC.transpose(1, 2), out=v_BTHV.view(B * T, H, V).transpose(0, 1))
    copy_rows(k_BTHD[..., N:], k_rope_BTR.unsqueeze(2))
    return k_BTHD.transpose(1, 2), v_BTHV.transpose(1, 2)


def forward(
    backend: Backend,
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """`dsinfra::mla` through one backend."""
    k, v = expand(latent, k_rope, w_uk, w_uv)
    return backend.forward(join_columns(q_nope, q_rope), k, v, mask, scale, causal)


def backward(
    backend: Backend,
    grad_o: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`dsinfra::mla_backward` through one backend."""
    k, v = expand(latent, k_rope, w_uk, w_uv)
    q = join_columns(q_nope, q_rope)
    dq, dk, dv = backend.backward(grad_o, q, k, v, mask, o, lse, scale, causal)
    return (in_bshd(dq), *project_back(dk, dv, latent, w_uk, w_uv))


def project_back(
    dk_BHTD: Tensor, dv_BHTV: Tensor, latent_BTC: Tensor, w_uk_HNC: Tensor, w_uv_HVC: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k and v, taken back through the up-projections: -> those of latent, k_rope, w_uk, w_uv.

    The nope columns of dk lie in a pitch of N + R. Weight gradients are batched GEMMs that read that pitch. The
    latent's gradient sums over heads, so it must be one GEMM over rows of H*(N+R): the weight is padded with zero rows
    for the rope columns, which costs R/N more multiplications and saves a copy of dk.
    """
    B, T, C = latent_BTC.shape
    H, N, _ = w_uk_HNC.shape
    V, D = w_uv_HVC.shape[1], dk_BHTD.shape[3]
    dk_MHD = dk_BHTD.transpose(1, 2).contiguous().view(B * T, H, D)  # no copy: the kernels keep the layout of k
    dv_MHV = dv_BHTV.transpose(1, 2).contiguous().view(B * T, H, V)
    rows_HMC = latent_BTC.reshape(B * T, C).expand(H, B * T, C)
    dw_uk_HNC = torch.bmm(dk_MHD[..., :N].permute(1, 2, 0), rows_HMC)
    dw_uv_HVC = torch.bmm(dv_MHV.permute(1, 2, 0), rows_HMC)
    padded_w_uk = F.pad(w_uk_HNC, (0, 0, 0, D - N)).reshape(H * D, C)
    dlatent = torch.mm(dk_MHD.view(B * T, H * D), padded_w_uk)
    dlatent = torch.addmm(dlatent, dv_MHV.view(B * T, H * V), w_uv_HVC.reshape(H * V, C))
    dk_rope = dk_MHD[..., N:].sum(1)
    return dlatent.view(B, T, C), dk_rope.view(B, T, D - N), dw_uk_HNC, dw_uv_HVC


# ------------------------------------------------------------------ what they support


def supports_cudnn(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> Decision:
    """16-bit, widths that cuDNN has kernels for, any mask of its dtype; a trial run settles the rest where there is
    data."""
    B, H, S, T, D, V = _sizes(q_nope, q_rope, latent, w_uv)
    refusal = torch_attention.cudnn_refusal(q_nope.device, q_nope.dtype, B, H, S, T, D, V, causal)
    refusal = refusal or torch_attention.cudnn_mask_refusal(mask, q_nope.dtype)
    if not refusal and is_real(q_nope):
        refusal = cudnn_trial(q_nope.device.index, q_nope.dtype, D, V, None if mask is None else mask.dtype)
    return no(refusal) if refusal else YES


def supports_efficient(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> Decision:
    """Any mask that torch's memory-efficient kernel takes, float32 included."""
    B, H, S, T, D, V = _sizes(q_nope, q_rope, latent, w_uv)
    refusal = torch_attention.efficient_refusal(q_nope.device, q_nope.dtype, mask, B, H, S, T, D, V, causal)
    return no(refusal) if refusal else YES


def _sizes(q_nope: Tensor, q_rope: Tensor, latent: Tensor, w_uv: Tensor) -> tuple[int, int, int, int, int, int]:
    B, H, S, N = map(size, q_nope.shape)
    return B, H, S, size(latent.shape[1]), N + size(q_rope.shape[3]), size(w_uv.shape[1])


def _supports_backward(
    backend: Backend,
    supports: Callable[..., Decision],
    grad_o: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> Decision:
    if torch.are_deterministic_algorithms_enabled():
        return no("its backward adds in no fixed order, and torch.use_deterministic_algorithms is on")
    refusal = backend.backward_refusal(size(q_nope.shape[2]), size(latent.shape[1]), causal)
    if refusal:
        return no(refusal)
    return supports(q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, causal)


def register() -> None:
    """Add `cudnn` and `efficient` to the tables of `mla` and `mla_backward`, best first."""
    for name, backend, supports in (("cudnn", CUDNN, supports_cudnn), ("efficient", EFFICIENT, supports_efficient)):
        table("mla").register(name, supports, functools.partial(forward, backend))
        table("mla_backward").register(
            name, functools.partial(_supports_backward, backend, supports), functools.partial(backward, backend)
        )
