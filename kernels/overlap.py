"""Launches that are cheap on the host, and of short kernels those that overlap on the device.

At decode a kernel lasts about as long as its launch, on either side. On Hopper a kernel that takes OVERLAP begins with
`begin(OVERLAP)` (programmatic dependent launch): it lets the next kernel be launched at once, and waits until all
results of the one before are there. So what overlaps is launching and nothing else. On the host, Triton's own launch
binds and specialises every argument anew; here the compiled kernel is looked up by what Triton would specialise it for.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from dscompile.kernels.launch import capability, start

_compiled: dict[tuple, tuple[Any, tuple]] = {}  # kernel, device, options and kinds of arguments: kernel, constants


def start_overlapped(kernel: Any, grid: int, device: torch.device, *args: Any, **options: Any) -> None:
    """`launch.start` of `grid` programs on a device.

    args are the kernel's run-time arguments; its constants, all but OVERLAP, and launch options are named.
    """
    overlap = (capability(device) or (0, 0)) >= (9, 0)
    start_known(kernel, grid, device, *args, OVERLAP=overlap, launch_pdl=overlap, **options)


def start_known(kernel: Any, grid: int, device: torch.device, *args: Any, **options: Any) -> None:
    """As `start_overlapped`, of a kernel that takes no OVERLAP, or as its caller says. Gluon's tensor maps are looked
    up by dtype and box: for one kernel and argument, these must settle their layout in shared memory."""
    if device.type != "cuda":
        start(kernel, (grid,), *args, **options)
        return
    key = (id(kernel), device.index, *options.items(), *map(_kind, args))
    found = _compiled.get(key)
    elsewhere = device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        if found is None:
            compiled = kernel[(grid,)](*args, **options)
            _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(args) :])
        else:
            compiled, constants = found
            compiled[(grid, 1, 1)](*args, *constants)


def _kind(x: Any) -> Any:
    """What Triton specialises a kernel for, or finer: dtype and alignment; for integers 1, multiples of 16, width."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16
    if isinstance(x, int):
        return x == 1, x % 16 == 0, x.bit_length() > 31
    if hasattr(x, "block_shape"):
        return x.base.dtype, *x.block_shape
    return type(x)
