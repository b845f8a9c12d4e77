"""GEMM of token rows with weights: the one entry to its kernels, for 16-bit types and for block-scaled FP8.

Dense (`linear`), by groups of consecutive rows whose ends are known on the device only (`grouped`), and by groups with
room for more rows than they hold (`masked`). `gemm_plan.plan_gemm` picks the kernel and its tiles from the sizes:

    gluon     gemm_gluon.py         Hopper, rows on the tensor cores' M side: prefill, training
    small     gemm_small.py         Hopper, weights on the M side: few rows a group, as at decode
    cuda      gemm_cuda.py          Hopper, FP8 with many rows
    torch     gemm_torch.py         what torch has for 16-bit types, where that is faster
    triton    gemm_triton.py        any CUDA GPU with the dtype, and the interpreter

Nothing is padded and nothing is synchronised with the host: groups may change from replay to replay of a CUDA graph.
Results are bitwise repeatable. A scale of FP8 stands for 1 x 128 of x or 128 x 128 of w, and multiplies in float32.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

import torch

from dscompile.kernels import launch
from dscompile.kernels.gemm_checks import FP8, check, check_bounds, gluon_refusal, triton_refusal
from dscompile.kernels.gemm_launch import Call, launch_gluon, launch_triton
from dscompile.kernels.gemm_plan import IMPLS, GemmPlan, plan_gemm
from dscompile.kernels.refusals import BadArguments, KernelLimit

_OTHERS = {
    "small": "dscompile.kernels.gemm_small",
    "cuda": "dscompile.kernels.gemm_cuda",
    "torch": "dscompile.kernels.gemm_torch",
}


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    plan: GemmPlan | None = None,
    checked: bool = False,
) -> torch.Tensor:
    """y [M, N] = x w^T.

    Args:
        x: [M, K] bfloat16, float16 or float32, or float8_e4m3fn with scales.
        w: [N, K] in x's dtype; either dimension may be the contiguous one.
        x_scale: float32 [ceil(K/128), M_pad], M_pad = M rounded up to 4, contiguous; as kernels/quantize.py makes it.
        w_scale: float32 [ceil(N/128), ceil(K/128)], contiguous.
        out_dtype: of y; x's own when None, bfloat16 for FP8.
        plan: kernel and tiles; chosen when None.
        checked: the caller has seen to all that BadArguments would say.

    Raises:
        BadArguments: shapes, dtypes or devices that don't fit together.
        KernelLimit: no kernel, or not the planned one, takes the call here.
    """
    if not checked:
        check(x, w, 2, 2, x_scale, w_scale, out_dtype)
    if w_scale is not None:
        w_scale = w_scale.unsqueeze(0)
    return _run(_Request(x, w.unsqueeze(0), None, x_scale, w_scale, "dense", False, out_dtype), len(x), plan)


def grouped(
    x: torch.Tensor,
    w: torch.Tensor,
    ends: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    swiglu: bool = False,
    out_dtype: torch.dtype | None = None,
    plan: GemmPlan | None = None,
    checked: bool = False,
) -> torch.Tensor:
    """y [M, N]: rows ends[g-1] .. ends[g] - 1 of x by w[g]^T, or silu(gate) * up of both halves of that if swiglu.

    Args:
        x: [M, K], as for `linear`.
        w: [G, N, K] in x's dtype, any group stride, either of the last dimensions contiguous; [G, 2N, K] if swiglu,
            the gate's rows first.
        ends: [G] int32 on the device, ascending; group 0 starts at row 0. Rows from ends[G-1] on give zeros.
        x_scale: as for `linear`.
        w_scale: float32 [G, ceil(N/128), ceil(K/128)], contiguous.
        swiglu: both products are accumulated in float32 and only what leaves is rounded. Not for FP8.
        out_dtype, plan, checked: as for `linear`.

    Raises:
        BadArguments, KernelLimit: as `linear`.
    """
    if not checked:
        check(x, w, 2, 3, x_scale, w_scale, out_dtype)
        check_bounds("ends", ends, x, w)
        if swiglu and w.shape[1] % 2:
            raise BadArguments(f"w is {tuple(w.shape)}. With swiglu its rows are gate over up: pass an even number.")
    return _run(_Request(x, w, ends, x_scale, w_scale, "ends", swiglu, out_dtype), len(x), plan)


def masked(
    x: torch.Tensor,
    w: torch.Tensor,
    counts: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    expected: int | None = None,
    plan: GemmPlan | None = None,
    checked: bool = False,
) -> torch.Tensor:
    """y [L, max, N]: the first counts[l] rows of x[l] by w[l]^T. Other rows of y are not written.

    Args:
        x: [L, max, K], dtypes as for `linear`.
        w: [L, N, K], as for `grouped`.
        counts: [L] int32 on the device, 0 to max.
        x_scale: float32 [L, ceil(K/128), max_pad], max_pad = max rounded up to 4, contiguous.
        w_scale: as for `grouped`.
        expected: rows that a group is likely to have, all `max` when None; only the speed depends on it.
        out_dtype, plan, checked: as for `linear`.

    Raises:
        BadArguments, KernelLimit: as `linear`.
    """
    if not checked:
        check(x, w, 3, 3, x_scale, w_scale, out_dtype)
        check_bounds("counts", counts, x, w)
        if x.shape[0] != w.shape[0]:
            raise BadArguments(f"x is {tuple(x.shape)}, w {tuple(w.shape)}. A group has its own weight. Pass as many.")
    rows = x.shape[0] * (x.shape[1] if expected is None else min(expected, x.shape[1]))
    return _run(_Request(x, w, counts, x_scale, w_scale, "masked", False, out_dtype, expected), rows, plan)


# Which kernel


@dataclass
class _Request:
    """A call with its arguments checked; w is [G, N, K]."""

    x: torch.Tensor
    w: torch.Tensor
    bounds: torch.Tensor | None
    x_scale: torch.Tensor | None
    w_scale: torch.Tensor | None
    layout: str
    swiglu: bool
    out_dtype: torch.dtype | None
    expected: int | None = None  # rows of a masked group

    def refusal(self, impl: str) -> str | None:
        """Why the kernel can't take the call, or None."""
        if impl == "gluon":
            return gluon_refusal(self.x, self.w, self.swiglu, self.out_dtype)
        if impl == "triton":
            return triton_refusal(self.x)
        module = _other(impl)
        if module is None:
            return f"There is no kernel {impl!r} here. Use one of {', '.join(map(repr, IMPLS))}."
        return module.supports(*self._tensors(), swiglu=self.swiglu, **self._options())

    def run(self, plan: GemmPlan) -> torch.Tensor:
        """The result, by a kernel that doesn't refuse the call."""
        if plan.impl in _OTHERS:
            name, own = {
                "dense": ("linear", {}),
                "ends": ("grouped", {"swiglu": self.swiglu}),
                "masked": ("masked", {"expected": self.expected}),
            }[self.layout]
            return getattr(_other(plan.impl), name)(*self._tensors(), **own, **self._options())
        x = self.x
        y = self.empty()
        capacity = x.shape[1] if self.layout == "masked" else 0
        call = Call(
            x.flatten(0, -2),
            self.w,
            y.flatten(0, -2),
            self.bounds,
            self.x_scale,
            self.w_scale,
            self.layout,
            capacity,
            self.swiglu,
        )
        with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
            (launch_gluon if plan.impl == "gluon" else launch_triton)(call, plan)
        return y

    def empty(self) -> torch.Tensor:
        """The result's memory."""
        dtype = self.out_dtype or (torch.bfloat16 if self.x.dtype == FP8 else self.x.dtype)
        return torch.empty((*self.x.shape[:-1], self.columns), dtype=dtype, device=self.x.device)

    @property
    def columns(self) -> int:
        return self.w.shape[1] // 2 if self.swiglu else self.w.shape[1]

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        """As the entries take them."""
        return (self.x, self.w[0]) if self.bounds is None else (self.x, self.w, self.bounds)

    def _options(self) -> dict[str, object]:
        scale = self.w_scale[0] if self.w_scale is not None and self.bounds is None else self.w_scale
        return {"x_scale": self.x_scale, "w_scale": scale, "out_dtype": self.out_dtype}

    def key(self) -> tuple:
        """All that a choice and a refusal depend on."""
        tensors = (t for t in (self.x, self.w, self.x_scale, self.w_scale) if t is not None)
        seen = tuple((t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in tensors)
        device = self.x.device
        return seen, device, launch.capability(device), self.layout, self.swiglu, self.out_dtype, self.expected


@functools.cache
def _other(impl: str) -> ModuleType | None:
    """The module of a kernel that is optional, if there is one."""
    name = _OTHERS.get(impl)
    return importlib.import_module(name) if name and importlib.util.find_spec(name) else None


_chosen: dict[tuple, GemmPlan] = {}


def _run(request: _Request, rows: int, plan: GemmPlan | None) -> torch.Tensor:
    """`rows` is how many the groups are expected to have together."""
    if request.x.numel() == 0 or request.w.numel() == 0:
        return request.empty().zero_()
    if plan is not None:
        if refusal := request.refusal(plan.impl):
            raise KernelLimit(refusal)
        return request.run(plan)
    key = request.key()
    plan = _chosen.get(key)
    if plan is None:
        if len(_chosen) >= 4096:  # of shapes that change from call to call
            _chosen.clear()
        plan = _chosen[key] = _choose(request, rows)
    return request.run(plan)


def _choose(request: _Request, rows: int) -> GemmPlan:
    """The best plan whose kernel takes the call."""
    x, w = request.x, request.w
    size = (rows, request.columns, w.shape[2], len(w), x.dtype, request.layout, request.swiglu)
    available, refusals = IMPLS, []
    while available:
        plan = plan_gemm(*size, launch.sm_count(x.device), available)
        refusal = request.refusal(plan.impl)
        if refusal is None:
            return plan
        refusals.append(f"{plan.impl}: {refusal}")
        available = tuple(impl for impl in available if impl != plan.impl)
    raise KernelLimit(" ".join(refusals))
