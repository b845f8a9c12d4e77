"""A latent cache in float8: its layout in bytes, the views that the decode kernels read, and appending rows.

A row is what FlashMLA calls the V3.2 layout, here for any widths: C float8_e4m3fn latents, one float32 scale for each
128 of them, R rope columns in the model's 16- or 32-bit dtype; 656 bytes for 512, 4 and 64 in bfloat16. The rope part
is left as it is: it carries positions, and is a ninth of the columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dscompile.kernels import launch
from dscompile.kernels.refusals import BadArguments, device_refusal, refuse_if

GROUP = 128  # latent columns of a scale
LARGEST = 448.0  # finite value of float8_e4m3fn
LEAST_SCALE = 2.0**-100


def groups_of(latent_width: int) -> int:
    """Scales of a row.

    Raises:
        BadArguments: columns can't be divided into groups of 128, or one smaller power of two.
    """
    narrow = latent_width < GROUP and latent_width >= 4 and latent_width & (latent_width - 1) == 0
    if latent_width % GROUP and not narrow:
        raise BadArguments(
            f"The latent is {latent_width} wide. A scale belongs to {GROUP} columns. Use a float8 cache with widths "
            f"that are multiples of {GROUP}, or powers of two from 4 on below it."
        )
    return max(1, latent_width // GROUP)


def row_bytes(latent_width: int, rope_width: int, rope_dtype: torch.dtype) -> int:
    """Bytes of a row of the pool."""
    return latent_width + 4 * groups_of(latent_width) + rope_width * rope_dtype.itemsize


class Columns(NamedTuple):
    """A part of a row: columns start .. stop - 1 of the row seen in `dtype`."""

    dtype: torch.dtype
    start: int
    stop: int


def columns(latent_width: int, rope_width: int, rope_dtype: torch.dtype) -> tuple[Columns, Columns, Columns]:
    """Where latent, k_rope and scales lie in a row, as `views` returns them."""
    first, size = latent_width + 4 * groups_of(latent_width), rope_dtype.itemsize
    return (
        Columns(torch.float8_e4m3fn, 0, latent_width),
        Columns(rope_dtype, first // size, first // size + rope_width),
        Columns(torch.float32, latent_width // 4, first // 4),
    )


def views(
    pool: torch.Tensor, latent_width: int, rope_width: int, rope_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> latent float8_e4m3fn [.., C], k_rope [.., R], latent_scale float32 [.., C / 128] of a uint8 pool [.., bytes].

    Raises:
        BadArguments: the pool isn't bytes, or its rows have another length.
    """
    width = row_bytes(latent_width, rope_width, rope_dtype)
    if pool.dtype != torch.uint8 or pool.shape[-1] != width or width % 4:
        raise BadArguments(
            f"The pool is {pool.dtype} {tuple(pool.shape)}. {latent_width} latent and {rope_width} rope columns in "
            f"{rope_dtype} take {width} bytes a row, a multiple of 4. Pass uint8 [.., {width}]."
        )
    latent, k_rope, scale = (
        pool.view(part.dtype)[..., part.start : part.stop] for part in columns(latent_width, rope_width, rope_dtype)
    )
    return latent, k_rope, scale


def quantize(latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[.., C] of any float dtype -> float8_e4m3fn [.., C], float32 scales [.., C / 128], powers of two."""
    x = latent.float().unflatten(-1, (groups_of(latent.shape[-1]), -1))
    mantissa, exponent = torch.frexp(x.abs().amax(-1))  # mantissa in [0.5, 1); 448 = 0.875 * 2^9
    scale = torch.ldexp(torch.ones_like(mantissa), exponent - 9 + (mantissa > 0.875).int()).clamp_min(LEAST_SCALE)
    scale = torch.where(mantissa.isfinite(), scale, torch.inf).masked_fill(mantissa == 0, LEAST_SCALE)
    return (x / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2), scale


def dequantize(latent8: torch.Tensor, latent_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[.., C] and its scales -> [.., C] in `dtype`."""
    x = latent8.float().unflatten(-1, (latent_scale.shape[-1], -1)) * latent_scale.unsqueeze(-1)
    return x.flatten(-2).to(dtype)


def append_refusal(latent: torch.Tensor, rope_width: int) -> str | None:
    """Why the Triton kernel can't append these rows, or None. Reads metadata only."""
    refusal = device_refusal("latent", latent)
    widths = groups_of(latent.shape[-1]), rope_width
    if refusal is None and not launch.interpreting() and (launch.capability(latent.device) or (0, 0)) < (8, 9):
        refusal = "Triton converts to float8_e4m3fn from compute capability (8, 9) on. Use the plain version."
    if refusal is None and any(n < 1 or n & (n - 1) for n in widths):
        refusal = f"A row has {widths[0]} scales and {widths[1]} rope columns. The kernel's tiles are powers of two."
    return refusal


def append_fp8(pool: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, rows: torch.Tensor) -> None:
    """Quantise latent [N, C] and write it, with k_rope [N, R], to rows of a pool [.., bytes] uint8, contiguous.

    rows: [N] int64, each row's place in the pool flattened to [rows, bytes]; below 0 nothing is written. No two may be
    equal. Values beyond the pool are the caller's fault and not checked: they live on the device.

    Raises:
        BadArguments: shapes or dtypes that don't fit together.
        KernelLimit: there is no Triton, no CUDA device, or a width that isn't a power of two.
    """
    _check(pool, latent, k_rope, rows)
    refuse_if(append_refusal(latent, k_rope.shape[1]))
    if not len(rows):
        return
    from dscompile.kernels.mla_cache_triton import append_fp8_kernel

    latent, k_rope = (x if x.stride(1) == 1 else x.contiguous() for x in (latent, k_rope))
    parts = views(pool.view(-1, pool.shape[-1]), latent.shape[1], k_rope.shape[1], k_rope.dtype)
    pool8, rope, scale = parts
    groups = scale.shape[1]
    launch.start(
        append_fp8_kernel,
        (len(rows),),
        latent,
        k_rope,
        rows,
        pool8,
        scale,
        rope,
        latent.stride(0),
        k_rope.stride(0),
        pool8.stride(0),
        scale.stride(0),
        rope.stride(0),
        GROUPS=groups,
        GROUP=latent.shape[1] // groups,
        R=k_rope.shape[1],
        num_warps=4,
    )


def append_fp8_plain(pool: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, rows: torch.Tensor) -> None:
    """`append_fp8` in plain PyTorch, for any device; the same bytes."""
    _check(pool, latent, k_rope, rows)
    flat = pool.view(-1, pool.shape[-1])
    latent8, scale = quantize(latent)
    token = torch.cat([x.contiguous().view(torch.uint8) for x in (latent8, scale, k_rope)], -1)
    kept = (rows >= 0).unsqueeze(-1)
    rows = rows.clamp_min(0)
    if not bool(kept.all()):
        flat[rows[kept[:, 0]]] = token[kept[:, 0]]
    else:
        flat.index_copy_(0, rows, token)


def _check(pool: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, rows: torch.Tensor) -> None:
    if (
        latent.dim() != 2
        or k_rope.dim() != 2
        or rows.shape != latent.shape[:1]
        or k_rope.shape[0] != latent.shape[0]
        or rows.dtype != torch.int64
        or latent.dtype != k_rope.dtype
        or not latent.is_floating_point()
        or not pool.is_contiguous()
    ):
        raise BadArguments(
            f"latent is {latent.dtype} {tuple(latent.shape)}, k_rope {k_rope.dtype} {tuple(k_rope.shape)}, rows "
            f"{rows.dtype} {tuple(rows.shape)}, the pool {tuple(pool.shape)} with strides {pool.stride()}. A row has "
            "one place in a contiguous pool. Pass [N, C] and [N, R] of one dtype and int64 [N]."
        )
    views(pool, latent.shape[1], k_rope.shape[1], k_rope.dtype)
