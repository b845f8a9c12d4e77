"""How an operator enters the `dsinfra` namespace: schema, kernel, shape function and autocast rule in one call.

`torch.library.Library` is used rather than `torch.library.custom_op`: decode launches an operator per layer and token,
and custom_op puts several Python frames between the dispatcher and the kernel (its autograd, in-place and
Dynamo-disabling wrappers) where a plain registration has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "dsinfra"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # Operators live as long as this object.


def define(
    name: str, schema: str, *, kernel: Callable[..., Any], fake: Callable[..., Any], autocast: bool = True
) -> None:
    """Register `dsinfra::name`.

    Args:
        schema: arguments and results, from the opening parenthesis on.
        kernel: runs on every device; chooses its implementation itself.
        fake: the shape function, for static and symbolic shapes; it makes the same checks as `kernel`.
        autocast: cast all floating arguments to the autocast dtype where autocast is on (CPU and CUDA). Either way the
            kernel runs with autocast off: a reference in plain PyTorch computes in the dtypes that it chooses. Calls
            with an FP8 argument are left as they are: its scales belong to it.

    Raises:
        RuntimeError: the name is taken (by torch: a second registration is never silent).
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    for device_type in ("cpu", "cuda"):
        _LIBRARY.impl(name, _autocast_kernel(op, device_type, autocast), "Autocast" + device_type.upper())


def define_autograd(name: str, *, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give `dsinfra::name` its gradient; `backward` must be made of traceable operators."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def _autocast_kernel(op: torch._ops.OpOverload, device_type: str, cast: bool) -> Callable[..., Any]:
    def cast_and_call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        casts = cast and not any(isinstance(arg, Tensor) and arg.dtype in _FP8 for arg in args)
        with torch.autocast(device_type, enabled=False):
            return op(*(_cast(arg, device_type, dtype) for arg in args) if casts else args)

    return cast_and_call


def _cast(arg: Any, device_type: str, dtype: torch.dtype) -> Any:
    """As torch's own lower-precision list: floating tensors of that device type, float64 excepted."""
    if not isinstance(arg, Tensor) or arg.device.type != device_type or arg.dtype == torch.float64:
        return arg
    return arg.to(dtype) if arg.is_floating_point() else arg
