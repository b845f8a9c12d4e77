"""The kernels behind `dsinfra::mla_decode` and what each of them takes.

`gluon` is the Hopper kernel (TMA and wgmma), `triton` its twin for any CUDA device. Both live in `dscompile.kernels`
and are imported when a CUDA tensor first asks for them: registering them here needs no Triton. Each kernel states its
own limits; what the operator allows beyond the kernels' entry (a layout, a scale below zero) is settled here.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dscompile.lowering.select import YES, Decision, is_real, no, size, table

_NAMES = "q_latent", "q_rope", "latent", "k_rope", "latent_scale"


def supports(
    impl: str,
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    seqlens: Tensor,
    mask: Tensor | None,
    page_table: Tensor | None,
    scale: float,
    causal: bool,
    latent_scale: Tensor | None = None,
    batch_invariant: bool = False,
    equal_lengths: bool = False,
) -> Decision:
    """Whether the kernel `impl` takes the arguments: CUDA tensors of contiguous columns, then its own limits."""
    if q_latent.device.type != "cuda":
        return no(f"the tensors are on {q_latent.device.type}, not cuda")
    if not torch.cuda.is_available():
        return no("no CUDA device is present, so its limits can't be asked")
    tensors = (q_latent, q_rope, latent, k_rope, *(() if latent_scale is None else (latent_scale,)))
    for i, x in enumerate(tensors):
        if size(x.stride(-1)) != 1 and size(x.shape[-1]) != 1:
            return no(f"{_NAMES[i]} has columns {size(x.stride(-1))} elements apart, and rows are read in one piece")
    if not scale > 0:
        return no(f"scale is {scale}, and the running maximum is taken of unscaled scores")
    from dscompile.kernels import mla_decode as kernels

    refusal = {"gluon": kernels.gluon_refusal, "triton": kernels.triton_refusal}[impl](
        *(tensors if is_real(q_latent) else map(_concrete, tensors))
    )
    return no(refusal) if refusal else YES


def _concrete(x: Tensor) -> Any:
    """The metadata of a traced tensor in plain numbers, so that the kernels' own checks install no guards."""
    shape, strides, offset = tuple(map(size, x.shape)), tuple(map(size, x.stride())), size(x.storage_offset())
    return SimpleNamespace(
        dtype=x.dtype, device=x.device, shape=shape, stride=lambda: strides, storage_offset=lambda: offset
    )


def run(
    impl: str,
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    seqlens: Tensor,
    mask: Tensor | None,
    page_table: Tensor | None,
    scale: float,
    causal: bool,
    latent_scale: Tensor | None = None,
    batch_invariant: bool = False,
    equal_lengths: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel `impl`; lengths and table rows are made contiguous where they aren't.

    Its entry's checks are left out: the operator has checked shapes, dtypes and devices, and `supports` (which the
    table asks before every run) columns, scale and the kernel's own limits. They cost as much as the launch.
    """
    from dscompile.kernels import mla_decode as kernels

    page_table = None if page_table is None else page_table.contiguous()
    return kernels.mla_decode_unchecked(
        q_latent,
        q_rope,
        latent,
        k_rope,
        seqlens.contiguous(),
        mask,
        page_table,
        scale,
        causal,
        latent_scale,
        impl=impl,
        batch_invariant=batch_invariant,
        equal_lengths=equal_lengths,
    )


def register() -> None:
    """Add `gluon` and `triton` to the table of `mla_decode`, best first."""
    for impl in ("gluon", "triton"):
        table("mla_decode").register(impl, functools.partial(supports, impl), functools.partial(run, impl))
