"""FP8 block-scaled products of many rows on Hopper, in CUDA C++ (cuda/fp8_gemm.cu): host calls, tiles, launch.

    y[m, n] = sum over blocks b of 128 along k: x_scale[b, m] * w_scale[n / 128, b] * sum over k in b: x[m, k] * w[n, k]

Three layouts of one kernel: `linear` (dense), `grouped` (rows sorted by group, ends on the device, no padding) and
`masked` (a slab of rows a group, counts on the device). No host synchronisation; fit for CUDA graphs. Made for prefill
and training, where the tensor cores are the limit; products of few rows are other kernels' business. Refused, with a
reason from `supports`: other dtypes than e4m3 to bf16, other devices than Hopper, k or strides off 16 bytes, n off 8.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from dscompile.kernels import nvrtc
from dscompile.kernels.launch import capability, sm_count
from dscompile.kernels.refusals import refuse_if

__all__ = ["TILES", "Tile", "choose_tile", "grouped", "linear", "masked", "program", "supports"]

BLOCK = 128  # of the scales, and a step along k
SHARED_BYTES = 232448  # that a CTA on Hopper may have
LAYOUTS = ("dense", "ends", "masked")


@dataclass(frozen=True)
class Tile:
    """Shape of one instance of the kernel: rows and columns of a tile, and how two warpgroups and a cluster share it.

    across: multiplying warpgroups side by side along n (1 or 2), the others stand on one another. share: what the two
    CTAs of a cluster load together: rows of "x" (their tiles are neighbours along n), of "w" (along m), or "none".
    dense_only: not for groups, whose search takes registers that the producer of this tile would spill.
    """

    rows: int
    columns: int
    across: int = 1
    share: str = "none"
    dense_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}" + ("" if self.share == "none" else f"-{self.share}")

    @property
    def cluster(self) -> int:
        return 1 if self.share == "none" else 2

    @property
    def unit(self) -> tuple[int, int]:
        """Rows and columns that a cluster computes together."""
        return self.rows * (1 + (self.share == "w")), self.columns * (1 + (self.share == "x"))

    @property
    def step_bytes(self) -> int:
        """Shared memory of one slot of the ring: x, w, x's scales, the producer's note, two barriers."""
        return (self.rows + self.columns) * BLOCK + (self.rows + 4) * 4 + 32 + 16

    @property
    def staging_bytes(self) -> int:
        """Shared memory that holds a finished tile until it is stored: whole boxes of 64 columns of bf16."""
        return self.rows * self.across * math.ceil(self.columns // self.across / 64) * 128

    @property
    def stages(self) -> int:
        return min(8, (SHARED_BYTES - self.staging_bytes) // self.step_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.staging_bytes + self.stages * self.step_bytes


TILES = {
    tile.name: tile
    for tile in (
        Tile(256, 128),
        Tile(256, 128, share="x"),
        Tile(128, 256, across=2),
        Tile(128, 192),
        Tile(128, 192, share="w", dense_only=True),
        Tile(128, 176, share="x", dense_only=True),
        Tile(128, 128),
        Tile(64, 256, across=2),
    )
}


# Choosing


# Work that a tile gets done in a time, relative to 256x128, all multiprocessors busy. Of m 4096 and nine (n, k) on an
# H100 80GB HBM3, torch 2.11, NVRTC 13.0, back to back in a CUDA graph: what it chooses is within 1 % of the best in the
# mean. Multicast of x or w gained nothing there, so only the width that was not timed without it uses it.
SPEED = {"256x128": 1.0, "128x256": 0.97, "128x192": 1.04, "128x176-x": 1.0, "128x128": 0.87, "64x256": 0.76}


@functools.cache
def choose_tile(m: int, n: int, *, groups: int | None = None, sms: int = 132) -> str:
    """Name of the tile that takes the fewest and fullest rounds over `sms` multiprocessors; groups None for dense rows.

    m: rows of all groups together, as far as the host knows them; each group is taken to leave half a tile unfilled.
    """

    def cost(name: str) -> float:
        tile = TILES[name]
        unit_m, unit_n = tile.unit
        rows_of_units = math.ceil(m / unit_m) if groups is None else m / unit_m + groups / 2
        rounds = math.ceil(rows_of_units * math.ceil(n / unit_n) / (sms // tile.cluster))
        return rounds * tile.rows * tile.columns / SPEED[name]

    return min((name for name in SPEED if groups is None or not TILES[name].dense_only), key=cost)


def raster(tile: Tile, rows: int, n: int, sms: int) -> int:
    """Rows of units walked together, so that the tiles at work at one time touch the fewest rows of x and w."""
    unit_m, unit_n = tile.unit
    units_m, at_once = max(1, math.ceil(rows / unit_m)), max(1, sms // tile.cluster)

    def touched(height: int) -> int:
        height = min(height, units_m)
        return height * unit_m + min(math.ceil(at_once / height), math.ceil(n / unit_n)) * unit_n

    heights = {math.ceil(units_m / bands) for bands in range(1, min(units_m, 16) + 1)}  # bands of equal height
    return min(sorted(heights, reverse=True), key=touched)


# The program


class _Problem(ctypes.Structure):
    """`Problem` of cuda/schedule.cuh, field by field."""

    _fields_ = [
        ("x_scale", ctypes.c_void_p),
        ("x_scale_slab", ctypes.c_int64),
        ("x_scale_block", ctypes.c_int64),
        ("w_scale", ctypes.c_void_p),
        ("w_scale_group", ctypes.c_int64),
        ("w_scale_row", ctypes.c_int64),
        ("bounds", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_slab", ctypes.c_int64),
        ("y_row", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("m", "m_pad", "n", "k_blocks", "groups", "raster")),
    ]


def wgmma_header(columns: int) -> str:
    """Source of wgmma_zero and wgmma_add: 64 rows by `columns` by 32 of e4m3, into `columns / 2` registers a thread."""
    count = columns // 2
    outputs = ", ".join(f"%{i}" for i in range(count))

    def function(name: str, constraint: str, add: int) -> str:
        operands = ", ".join(f'"{constraint}"(d[{i}])' for i in range(count))
        return f"""
__device__ __forceinline__ void {name}(float (&d)[{count}], unsigned long long x, unsigned long long w) {{
    asm volatile("{{\\n.reg .pred add;\\nsetp.ne.u32 add, {add}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3 "
                 "{{{outputs}}}, %{count}, %{count + 1}, add, 1, 1;\\n}}"
                 : {operands}
                 : "l"(x), "l"(w));
}}
"""

    return "#pragma once\n" + function("wgmma_zero", "+f", 0) + function("wgmma_add", "+f", 1)


@functools.cache
def _files() -> dict[str, str]:
    folder = Path(__file__).parent / "cuda"
    return {name: (folder / name).read_text() for name in ("fp8_gemm.cu", "schedule.cuh", "sm90.cuh")}


@functools.cache
def program(tile: Tile, layout: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """(sources, options) of the kernel's instance for a tile and a layout, for `nvrtc.compile_cubin`."""
    values = {
        "TILE_M": tile.rows,
        "TILE_N": tile.columns,
        "TILE_WARPGROUPS_N": tile.across,
        "TILE_STAGES": tile.stages,
        "TILE_SHARE": tile.share.upper(),
        "TILE_LAYOUT": layout.upper(),
        "TILE_BYTES": tile.shared_bytes,
    }
    sources = {**_files(), "wgmma.cuh": wgmma_header(tile.columns // tile.across)}
    return sources, tuple(f"--define-macro={name}={value}" for name, value in values.items())


@functools.cache
def _kernel(tile: Tile, layout: str, device: int) -> nvrtc.Kernel:
    sources, options = program(tile, layout)
    return nvrtc.load(sources, options, "fp8_gemm", device, threads=384, cluster=tile.cluster, shared=tile.shared_bytes)


# Calls


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    tile: str | None = None,
) -> torch.Tensor:
    """y [M, N] bf16 of x [M, K] and w [N, K], both e4m3.

    x_scale float32 [ceil(K / 128), M_pad], M_pad a multiple of 4, entries past M are ignored; w_scale float32
    [ceil(N / 128), ceil(K / 128)]. tile: a name of TILES, by default the choice of `choose_tile`. Raises KernelLimit
    with the reason of `supports`.
    """
    refuse_if(supports(x, w, x_scale=x_scale, w_scale=w_scale, out_dtype=out_dtype))
    m, n = x.shape[0], w.shape[0]
    y = x.new_empty(m, n, dtype=torch.bfloat16)
    if m:
        name = tile or choose_tile(m, n, sms=sm_count(x.device))
        _launch(x[None], w[None], x_scale[None], w_scale[None], None, y[None], "dense", name)
    return y


def grouped(
    x: torch.Tensor,
    w: torch.Tensor,
    ends: torch.Tensor,
    *,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    swiglu: bool = False,
    out_dtype: torch.dtype | None = None,
    tile: str | None = None,
) -> torch.Tensor:
    """y [M, N] bf16: rows ends[g - 1] to ends[g] of x [M, K] times w[g], w [G, N, K].

    Rows past the last group are zero. ends int32 [G] on the device; x_scale as for `linear`, w_scale
    [G, ceil(N / 128), ceil(K / 128)].
    """
    refuse_if(supports(x, w, ends, x_scale=x_scale, w_scale=w_scale, swiglu=swiglu, out_dtype=out_dtype))
    m, (groups, n, _) = x.shape[0], w.shape
    y = x.new_empty(m, n, dtype=torch.bfloat16)
    if m:
        name = tile or choose_tile(m, n, groups=groups, sms=sm_count(x.device))
        _launch(x[None], w, x_scale[None], w_scale, ends, y[None], "ends", name)
    return y


def masked(
    x: torch.Tensor,
    w: torch.Tensor,
    counts: torch.Tensor,
    *,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    expected: int | None = None,
    tile: str | None = None,
) -> torch.Tensor:
    """y [L, max, N] bf16: the first counts[l] rows of x[l], x [L, max, K], times w[l], w [L, N, K].

    The other rows are left unwritten. counts int32 [L] on the device; x_scale [L, ceil(K / 128), max_pad], w_scale
    [L, ceil(N / 128), ceil(K / 128)].
    expected: rows a group that the tile is chosen for, by default all `max`.
    """
    refuse_if(supports(x, w, counts, x_scale=x_scale, w_scale=w_scale, out_dtype=out_dtype))
    slabs, most, n = *x.shape[:2], w.shape[1]
    y = x.new_empty(slabs, most, n, dtype=torch.bfloat16)
    if slabs and most:
        rows = slabs * (expected or most)
        name = tile or choose_tile(rows, n, groups=slabs, sms=sm_count(x.device))
        _launch(x, w, x_scale, w_scale, counts, y, "masked", name)
    return y


def supports(
    x: torch.Tensor,
    w: torch.Tensor,
    bounds: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    swiglu: bool = False,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """None where this call can be run, else why not and what to change. Looks at no value and no address.

    x [M, K], or masked [L, max, K]; w [N, K], or with bounds (ends or counts) [G, N, K].
    """
    if x_scale is None or w_scale is None or not x.dtype == w.dtype == torch.float8_e4m3fn:
        scales = "no scales" if x_scale is None or w_scale is None else "scales"
        return f"x is {x.dtype}, w {w.dtype}, with {scales}. {_KERNEL} multiplies scaled float8_e4m3fn. Quantise both."
    if swiglu or out_dtype not in (None, torch.bfloat16):
        return (
            f"swiglu={swiglu}, out_dtype={out_dtype} are asked for. {_KERNEL} gives plain bfloat16. Apply them after."
        )
    if capability(x.device) != (9, 0):
        found = capability(x.device) or "none"
        return f"x is on {x.device}, compute capability {found}. {_KERNEL} needs Hopper, (9, 0). Use the Triton one."
    return _shape_refusal(x, w, bounds, x_scale, w_scale) or _layout_refusal(x, w, x_scale, w_scale) or _nvrtc_refusal()


_KERNEL = "The CUDA kernel of FP8 products"


def _nvrtc_refusal() -> str | None:
    reason = nvrtc.why_no_nvrtc()
    return f"{_KERNEL} is compiled at its first call. {reason}." if reason else None


def _shape_refusal(
    x: torch.Tensor, w: torch.Tensor, bounds: torch.Tensor | None, x_scale: torch.Tensor, w_scale: torch.Tensor
) -> str | None:
    named = {"x": x, "w": w, "x_scale": x_scale, "w_scale": w_scale} | ({} if bounds is None else {"bounds": bounds})
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in named.items()) + "."
    if (x.dim(), w.dim(), bounds is None) not in ((2, 2, True), (2, 3, False), (3, 3, False)):
        return f"{shapes} {_KERNEL} takes x [M, K] and w [N, K], or w [G, N, K] with ends or counts [G]. Reshape."
    *slabs, rows, k = x.shape
    *groups, n, w_k = w.shape
    blocks_k, blocks_n = math.ceil(k / BLOCK), math.ceil(n / BLOCK)
    if w_k != k or slabs not in ([], groups) or not k or not n:
        return f"{shapes} x and w must agree in K and, masked, in groups; neither K nor N may be 0. Change x or w."
    if list(x_scale.shape[:-1]) != [*slabs, blocks_k] or x_scale.shape[-1] < rows or x_scale.shape[-1] % 4:
        return (
            f"{shapes} One scale belongs to 128 values of a row. Make x_scale {[*slabs, blocks_k, -(-rows // 4) * 4]}."
        )
    if list(w_scale.shape) != [*groups, blocks_n, blocks_k]:
        return f"{shapes} One scale belongs to 128 x 128 values of w. Make w_scale {[*groups, blocks_n, blocks_k]}."
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32:
        return f"x_scale is {x_scale.dtype}, w_scale {w_scale.dtype}. {_KERNEL} scales in float32. Convert them."
    if bounds is not None and (bounds.dtype, list(bounds.shape), bounds.is_contiguous()) != (torch.int32, groups, True):
        return (
            f"{shapes} Ends or counts, here {bounds.dtype}, are one int32 a group. Make them contiguous int32 {groups}."
        )
    return None


def _layout_refusal(x: torch.Tensor, w: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> str | None:
    if w.shape[-2] % 8:
        return f"w {list(w.shape)} gives rows of y off 16 bytes, which bulk stores need. Pad N to a multiple of 8."
    for name, tensor in (("x", x), ("w", w), ("x_scale", x_scale)):
        steps = (tensor.storage_offset(), *tensor.stride()[:-1])
        if tensor.numel() and (tensor.stride(-1) != 1 or any(step * tensor.element_size() % 16 for step in steps)):
            return (
                f"{name} {list(tensor.shape)} has strides {tensor.stride()} and offset {tensor.storage_offset()}. Bulk "
                "copies need the last stride to be 1, the others and the offset multiples of 16 bytes. Copy it so."
            )
    if w_scale.stride(-1) != 1 and w_scale.shape[-1] > 1:
        return f"w_scale has strides {w_scale.stride()}. {_KERNEL} reads its rows. Make it contiguous."
    return None


def _launch(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bounds: torch.Tensor | None,
    y: torch.Tensor,
    layout: str,
    name: str,
) -> None:
    """x [slabs, m, k], w [groups, n, k], x_scale [slabs, k_blocks, m_pad], y [slabs, m, n]; one slab unless masked."""
    if name not in TILES:
        raise ValueError(f"No tile {name!r} among {', '.join(TILES)}.")
    tile = TILES[name]
    if tile.dense_only and layout != "dense":
        raise ValueError(f"Tile {name} is for dense rows, this call has groups. Take one of {', '.join(SPEED)}.")
    (slabs, m, k), (groups, n, _), sms = x.shape, w.shape, sm_count(x.device)
    expected = m if layout != "ends" else math.ceil(m / groups)
    problem = _Problem(
        x_scale.data_ptr(),
        *x_scale.stride()[:2],
        w_scale.data_ptr(),
        *w_scale.stride()[:2],
        bounds.data_ptr() if bounds is not None else None,
        y.data_ptr(),
        *y.stride()[:2],
        *(m, x_scale.shape[2], n, math.ceil(k / BLOCK), groups, raster(tile, expected, n, sms)),
    )
    unit_m, unit_n = tile.unit
    # Each group may leave a unit unfilled, and the rows past the last one count as a group.
    units = (slabs * math.ceil(m / unit_m) + (groups if layout == "ends" else 0)) * math.ceil(n / unit_n)
    ctas = min(sms // tile.cluster, units) * tile.cluster
    x_rows = tile.rows // (2 if tile.share == "x" else 1)
    w_rows = tile.columns // (2 if tile.share == "w" else 1)
    arguments = (
        _map(x, (BLOCK, x_rows, 1), 128),
        _map(w, (BLOCK, w_rows, 1), 128),
        _map(y, (64, 16, 1), 128),
        problem,
    )
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _kernel(tile, layout, x.device.index).launch(ctas, stream, arguments, programmatic=True)


def _map(tensor: torch.Tensor, box: tuple[int, int, int], swizzle: int) -> nvrtc.TensorMap:
    """Tensor map of a tensor [slabs, rows, row], its rows contiguous; box innermost first."""
    sizes, strides = tuple(reversed(tensor.shape)), tuple(reversed(tensor.stride()[:-1]))
    return nvrtc.tensor_map(tensor.data_ptr(), tensor.dtype, sizes, strides, box, swizzle)
