"""`dsinfra::mla_append_fp8` and `dsinfra::mla_read_fp8`: writing a float8 latent cache, and reading it back whole.

A row of the pool holds C latents in float8_e4m3fn, a float32 scale for each 128 of them, and R rope columns as they
are (`dscompile.kernels.mla_cache`). Appending quantises: it changes rounding, and who asks for such a cache asks for
that. Reading dequantises a request's pages into plain rows, for a consumer that doesn't read the pool in place;
`dsinfra::mla_decode` with `latent_scale` does.

Refused: gradients, pools of another row length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dscompile.lowering.errors import NotDifferentiable, PageTableError, ShapeMismatch
from dscompile.lowering.ops.library import define

PAGE = 64


def _check_append(pool: Tensor, latent: Tensor, k_rope: Tensor, rows: Tensor) -> None:
    from dscompile.kernels import mla_cache

    if torch.is_grad_enabled() and (latent.requires_grad or k_rope.requires_grad):
        raise NotDifferentiable(
            f"mla_append_fp8: rows that require grad, latent {list(latent.shape)}",
            "Rounding to float8 has no gradient",
            "Call it under torch.no_grad() or torch.inference_mode()",
        )
    try:
        width = mla_cache.row_bytes(latent.shape[-1], k_rope.shape[-1], k_rope.dtype)
    except mla_cache.BadArguments as error:
        raise ShapeMismatch(
            f"mla_append_fp8: latent {list(latent.shape)}", str(error), "Keep this cache in the model's dtype"
        ) from None
    if latent.dim() != 2 or k_rope.dim() != 2 or pool.shape[-1] != width or pool.dtype is not torch.uint8:
        raise ShapeMismatch(
            f"mla_append_fp8: pool {list(pool.shape)} of {pool.dtype}, latent {list(latent.shape)}, k_rope "
            f"{list(k_rope.shape)} of {k_rope.dtype}",
            f"Such a row takes {width} bytes",
            f"Allocate the pool as uint8 [P, {PAGE}, 1, {width}], and give rows [N, C] and [N, R]",
        )


def _append(pool: Tensor, latent: Tensor, k_rope: Tensor, rows: Tensor) -> None:
    from dscompile.kernels import mla_cache

    _check_append(pool, latent, k_rope, rows)
    if latent.device.type == "cuda" and mla_cache.append_refusal(latent, k_rope.shape[1]) is None:
        mla_cache.append_fp8(pool, latent, k_rope, rows)
    else:
        mla_cache.append_fp8_plain(pool, latent, k_rope, rows)


def _append_fake(pool: Tensor, latent: Tensor, k_rope: Tensor, rows: Tensor) -> None:
    _check_append(pool, latent, k_rope, rows)


def _check_read(pool: Tensor, page_table: Tensor, latent_width: int, rope_width: int, dtype: torch.dtype) -> None:
    from dscompile.kernels import mla_cache

    width = mla_cache.row_bytes(latent_width, rope_width, dtype)
    if pool.dtype is not torch.uint8 or pool.shape[-1] != width or pool.shape[1] != PAGE or page_table.dim() != 2:
        raise PageTableError(
            f"mla_read_fp8: pool {list(pool.shape)} of {pool.dtype}, table {list(page_table.shape)}",
            f"Rows of {latent_width} latent and {rope_width} rope columns in {dtype} take {width} bytes, in pages of "
            f"{PAGE}",
            f"Give uint8 [P, {PAGE}, 1, {width}] and a table [B, max_pages]",
        )


def read(
    pool: Tensor, page_table: Tensor, latent_width: int, rope_width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch on any device: -> latent [B, T, C] dequantised, k_rope [B, T, R], T = 64 * max_pages."""
    from dscompile.kernels import mla_cache

    _check_read(pool, page_table, latent_width, rope_width, dtype)
    rows = pool.flatten(2)[page_table].flatten(1, 2)
    latent8, rope, scale = mla_cache.views(rows, latent_width, rope_width, dtype)
    return mla_cache.dequantize(latent8, scale, dtype), rope.contiguous()


def columns(latent_width: int, rope_width: int, rope_dtype: torch.dtype) -> tuple[tuple[torch.dtype, int, int], ...]:
    """(dtype, first, end) of latent, k_rope and scales in a row of the pool, each in columns of its dtype."""
    from dscompile.kernels import mla_cache

    return mla_cache.columns(latent_width, rope_width, rope_dtype)


def _read_fake(
    pool: Tensor, page_table: Tensor, latent_width: int, rope_width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    _check_read(pool, page_table, latent_width, rope_width, dtype)
    B, T = page_table.shape[0], page_table.shape[1] * PAGE
    return pool.new_empty(B, T, latent_width, dtype=dtype), pool.new_empty(B, T, rope_width, dtype=dtype)


define(
    "mla_append_fp8",
    "(Tensor(a!) pool, Tensor latent, Tensor k_rope, Tensor rows) -> ()",
    kernel=_append,
    fake=_append_fake,
    autocast=False,
)
define(
    "mla_read_fp8",
    "(Tensor pool, Tensor page_table, int latent_width, int rope_width, ScalarType dtype)"
    " -> (Tensor latent, Tensor k_rope)",
    kernel=read,
    fake=_read_fake,
    autocast=False,
)
