"""Appends rows to a float8 latent cache, in plain Triton: quantised and placed by one kernel.

    largest = max |x[128 g .. 128 g + 127]|,   scale[g] = the power of two at or above largest / 448
    row of the pool = 512 bytes round(x / scale) as float8_e4m3fn | 4 scales float32 | 64 rope columns as they are

Inputs: latent [N, C] and k_rope [N, R] with contiguous columns, rows [N] int64, the pool's row of each (below 0: left
out). Scales are powers of two, so that both division and dequantisation are exact but for the one rounding. A group of
zeros has the least scale, 2^-100; NaN and infinity give NaN. One program a row. The pool comes as three views of it, in
the dtypes of its parts.
"""

import triton
import triton.language as tl


@triton.jit
def append_fp8_kernel(
    latent_ptr,
    k_rope_ptr,
    rows_ptr,
    pool8_ptr,
    scale_ptr,
    rope_ptr,
    latent_stride,
    k_rope_stride,
    pool8_stride,
    scale_stride,
    rope_stride,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
):
    """Formula and arguments: at the head of this file; the strides of the pool's views are those of its rows."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i)
    if row >= 0:
        g = tl.arange(0, GROUPS)
        c = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        r = tl.arange(0, R)
        x = tl.load(latent_ptr + i * latent_stride + c).to(tl.float32)  # [GROUPS, GROUP]
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(magnitude, 1)  # as integers, NaN is the largest of all
        # The quotient's exponent, one more where bits follow it. 448 = 1.75 * 2^8 and so in integers: exponent - 8, and
        # one more where the mantissa is above 0.75 of its range.
        exponent = (largest >> 23) - 8 + tl.where((largest & 0x7FFFFF) > 0x600000, 1, 0)
        finite = largest < 0x7F800000
        exponent = tl.where(finite, tl.maximum(exponent, 27), 255)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = tl.where(finite, 254 - exponent, 255) << 23
        q = x * inverse.to(tl.float32, bitcast=True)[:, None]
        tl.store(pool8_ptr + row * pool8_stride + c, q.to(tl.float8e4nv))
        tl.store(scale_ptr + row * scale_stride + g, scale)
        tl.store(rope_ptr + row * rope_stride + r, tl.load(k_rope_ptr + i * k_rope_stride + r))
