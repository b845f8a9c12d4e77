"""The kernels behind the linear operators on rows of tokens: grouped or dense, 16-bit or FP8, and what each takes.

| operator | implementations, best first |
|---|---|
| `fp8_linear`, `fp8_grouped_linear`, `fp8_grouped_linear_masked` | `hopper`, `triton` |
| `grouped_linear` | `hopper`, `torch`, `triton` |
| `grouped_weight_grad` | `torch` |

`hopper` and `triton` are `dscompile.kernels.gemm`, imported when a CUDA tensor first asks for it: its kernels for that
card, among which it chooses, and its twin for any. `torch` is torch's grouped_mm where it runs at once, in bfloat16 on
Hopper and Blackwell over rows of whole 16 bytes; elsewhere it reads the ends on the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dscompile.lowering.select import YES, Decision, is_real, no, size, table

_ALIGNMENT = 16  # bytes: what a row must be a multiple of, and start at, for torch's grouped_mm and TMA
_MOST_ANSWERS = 1024


# ------------------------------------------------------------------ our kernels


def metadata(
    dtype: torch.dtype, device: torch.device, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> Any:
    """What the kernels' checks read of a tensor, of one that is traced or doesn't exist yet. Storage starts aligned."""
    return SimpleNamespace(
        dtype=dtype,
        device=device,
        is_cuda=device.type == "cuda",
        shape=shape,
        ndim=len(shape),
        dim=lambda: len(shape),
        size=lambda i=None: shape if i is None else shape[i],
        numel=lambda: math.prod(shape),
        stride=lambda i=None: strides if i is None else strides[i],
        storage_offset=lambda: offset,
        element_size=lambda: dtype.itemsize,
        data_ptr=lambda: offset * dtype.itemsize,
    )


def concrete(x: Any) -> Any:
    """A traced tensor's metadata in plain numbers, so that the kernels' own checks install no guards; else itself."""
    if not isinstance(x, Tensor) or is_real(x):
        return x
    shape, strides = tuple(map(size, x.shape)), tuple(map(size, x.stride()))
    return metadata(x.dtype, x.device, shape, strides, size(x.storage_offset()))


def on_cuda(x: Tensor) -> Decision:
    """Whether kernels can be asked about a tensor at all."""
    if x.device.type != "cuda":
        return no(f"the tensors are on {x.device.type}, not cuda")
    if not _cuda_is_present():
        return no("no CUDA device is present, so its limits can't be asked")
    return YES


@functools.cache
def _cuda_is_present() -> bool:
    return torch.cuda.is_available()


def remembered(supports: Callable[..., Decision]) -> Callable[..., Decision]:
    """`supports` with its answers kept for real tensors: it reads nothing but metadata, and eager decode asks it for
    each layer and token. Addresses matter by their alignment alone."""
    answers: dict[tuple, Decision] = {}

    @functools.wraps(supports)
    def ask(*args: Any) -> Decision:
        key: list[Any] = []
        for a in args:
            if isinstance(a, Tensor):
                if not is_real(a):
                    return supports(*args)
                key += a.dtype, a.device, a.shape, a.stride(), a.data_ptr() % _ALIGNMENT
            else:
                key.append(a)
        answer = answers.get(tuple(key))
        if answer is None:
            if len(answers) >= _MOST_ANSWERS:
                answers.clear()
            answer = answers[tuple(key)] = supports(*args)
        return answer

    return ask


def can_wait(x: Tensor) -> bool:
    """Whether a reference may read values on the host: always, except while a CUDA graph is captured."""
    return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def supports_gemm(
    x: Any, w: Any, *, swiglu: bool = False, out_dtype: torch.dtype | None = None, impl: str | None = None
) -> Decision:
    """Whether `kernels.gemm` multiplies rows x, [M,K] or [L,max,K], with w; by `impl`, or by any of its kernels."""
    present = on_cuda(x)
    if not present:
        return present
    from dscompile.kernels import gemm

    if x.dtype == torch.float64:
        return no("the rows are float64, and the kernels compute in float32")
    x, w = concrete(x), concrete(w)
    refusals: list[str | None] = []
    if impl != "triton":
        refusals.append(gemm.gluon_refusal(x, w, swiglu, out_dtype))
    if impl != "hopper" and None not in refusals:
        refusals.append(gemm.triton_refusal(x))
    return YES if None in refusals else no(" ".join(filter(None, refusals)))


@remembered
def _supports_fp8(
    impl: str, x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, last: Any, out_dtype: torch.dtype
) -> Decision:
    """For the three FP8 operators: `last` is a bias, ends or counts, and any of them will do."""
    return supports_gemm(x, w, out_dtype=out_dtype, impl=impl)


def _fp8_linear(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    from dscompile.kernels import gemm

    y = gemm.linear(x, w, x_scale=x_scale, w_scale=w_scale.contiguous(), out_dtype=out_dtype)
    return y if bias is None else y.add_(bias)


def _fp8_grouped(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor, out_dtype: torch.dtype
) -> Tensor:
    from dscompile.kernels import gemm

    w_scale = w_scale.contiguous()
    return gemm.grouped(x, w, ends.contiguous(), x_scale=x_scale, w_scale=w_scale, out_dtype=out_dtype)


def _fp8_masked(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    from dscompile.kernels import gemm

    x_scale, w_scale = x_scale.contiguous(), w_scale.contiguous()
    return gemm.masked(x, w, counts.contiguous(), x_scale=x_scale, w_scale=w_scale, out_dtype=out_dtype)


@remembered
def _supports_grouped(impl: str, x: Tensor, w: Tensor, ends: Tensor) -> Decision:
    return supports_gemm(x, w, impl=impl)


def _grouped(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    from dscompile.kernels import gemm

    return gemm.grouped(x, w, ends.contiguous())


# ------------------------------------------------------------------ torch's grouped_mm


def _torch_refusal(**tensors: Tensor) -> str | None:
    """Why torch's grouped_mm would refuse these, or wait for the ends on the host; None if it runs at once."""
    first = next(iter(tensors.values()))
    present = on_cuda(first)
    if not present:
        return present.reason
    if torch.cuda.get_device_capability(first.device)[0] not in (9, 10):
        return "torch's grouped_mm reads the ends on the host except on Hopper and Blackwell"
    for name, x in tensors.items():
        if x.dtype != torch.bfloat16:
            return f"torch's grouped_mm reads the ends on the host for {x.dtype}"
        if any(size(s) == 0 for s in x.shape):
            return f"{name} {list(x.shape)} is empty"
        row, column = size(x.stride(-2)), size(x.stride(-1))
        rows, columns = size(x.shape[-2]), size(x.shape[-1])
        if not ((column == 1 and row >= columns) or (row == 1 and column >= rows)):
            return (
                f"{name} has strides {row} and {column} for {rows} x {columns}, and torch reads whole rows or columns"
            )
        steps = [row if column == 1 and row >= columns else column, *map(size, x.stride()[:-2])]
        if any(step * x.dtype.itemsize % _ALIGNMENT for step in steps) or concrete(x).data_ptr() % _ALIGNMENT:
            return f"{name} has rows that aren't whole pieces of {_ALIGNMENT} bytes, strides {steps}"
    return None


def _supports_torch_grouped(x: Tensor, w: Tensor, ends: Tensor) -> Decision:
    refusal = _torch_refusal(x=x, w=w)
    return no(refusal) if refusal else YES


def _torch_grouped(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    y = torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=ends)
    past = torch.arange(x.shape[0], device=x.device, dtype=torch.int32) >= ends[-1]
    return y.masked_fill_(past.unsqueeze(1), 0.0).contiguous()  # torch leaves those rows as they were allocated


def _supports_torch_weight_grad(dy: Tensor, x: Tensor, ends: Tensor) -> Decision:
    refusal = _torch_refusal(dy=dy, x=x)
    return no(refusal) if refusal else YES


def _torch_weight_grad(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(dy.t(), x, offs=ends).contiguous()


# ------------------------------------------------------------------ tables


def _register(op: str, impl: str, run: Callable[..., Tensor]) -> None:
    supports = _supports_grouped if op == "grouped_linear" else _supports_fp8
    table(op).register(impl, functools.partial(supports, impl), run)


def register_fp8_linear() -> None:
    """Add `hopper` and `triton` to the table of `fp8_linear`."""
    for impl in ("hopper", "triton"):
        _register("fp8_linear", impl, _fp8_linear)


def register_fp8_grouped_linear() -> None:
    """Add `hopper` and `triton` to the tables of `fp8_grouped_linear` and `fp8_grouped_linear_masked`."""
    for impl in ("hopper", "triton"):
        _register("fp8_grouped_linear", impl, _fp8_grouped)
        _register("fp8_grouped_linear_masked", impl, _fp8_masked)


def register_grouped_linear() -> None:
    """Add `hopper`, `torch` and `triton` to the table of `grouped_linear`, `torch` to that of `grouped_weight_grad`."""
    _register("grouped_linear", "hopper", _grouped)
    table("grouped_linear").register("torch", _supports_torch_grouped, _torch_grouped)
    _register("grouped_linear", "triton", _grouped)
    table("grouped_weight_grad").register("torch", _supports_torch_weight_grad, _torch_weight_grad)
