"""All that depends on a Triton version: what is installed, what it is called there, launching, and compiling offline.

Triton's Gluon renames something in most releases, and torch pins the release a user gets. Kernels take the moving names
from here and nowhere else. Importing this file never fails: without Triton those names are None and `has_triton` and
`has_gluon` say so. Works with Triton 3.6 (torch 2.11 to 2.13) to 3.9; `has_gluon` refuses older ones, whose
warp_specialize takes other arguments.

    name here     3.6                               3.7               3.8               3.9
    tma_load      tma.async_copy_global_to_shared   =                 tma.async_load    =
    tma_store     tma.async_copy_shared_to_global   =                 tma.async_store   =
    cta_barrier   gl.thread_barrier                 gl.barrier        =                 =
    aggregate     core._aggregate                   =                 =                 gluon.aggregate

`offline` compiles for Hopper on a machine without a GPU, through the same host code that launches, and `read_facts`
reads off the result what a test can hold a kernel to: registers, spills, shared memory, tensor-core and TMA
instructions.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import dataclass_transform

try:
    import triton
except ImportError:  # torch's CPU builds bring none
    triton = None
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import tma
    from triton.language import core
except ImportError:  # no Triton, or one older than Gluon
    gluon = gl = tma = core = None

__all__ = [
    "KernelFacts",
    "aggregate",
    "capability",
    "cta_barrier",
    "has_gluon",
    "has_triton",
    "interpreting",
    "offline",
    "read_facts",
    "sm_count",
    "start",
    "tma_load",
    "tma_store",
    "triton_version",
]


# What is installed


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """(major, minor) of the importable Triton, or None."""
    if triton is None:
        return None
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def has_triton() -> bool:
    """Whether kernels in plain Triton can be defined here. Says nothing of a device."""
    return triton is not None


@functools.cache
def has_gluon() -> bool:
    """Whether Triton has Gluon for Hopper in the form our kernels are written in."""
    return gl is not None and (triton_version() or (0, 0)) >= (3, 6)


@functools.cache
def interpreting() -> bool:
    """Whether `triton.jit` makes interpreted functions, which run on CPU tensors (TRITON_INTERPRET=1 at import)."""
    return has_triton() and bool(triton.knobs.runtime.interpret)


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability that a launch on tensors of `device` is compiled for; None where nothing can be launched."""
    if _offline is not None:
        return _offline.capability
    if device.type != "cuda":
        return None
    properties = _properties(device)
    return properties.major, properties.minor


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for the CPU of the interpreter or of `offline`."""
    return _properties(device).multi_processor_count if device.type == "cuda" else 1


# Names that move

tma_load: Any = getattr(tma, "async_load", None) or getattr(tma, "async_copy_global_to_shared", None)
tma_store: Any = getattr(tma, "async_store", None) or getattr(tma, "async_copy_shared_to_global", None)
cta_barrier: Any = getattr(gl, "barrier", None) or getattr(gl, "thread_barrier", None)


@dataclass_transform()
def aggregate(cls: Any) -> Any:
    """Class decorator: a record of device values, its fields given by position, usable inside a kernel."""
    names = tuple(cls.__annotations__)

    def constructor(self: Any, *values: Any) -> None:
        if len(values) != len(names):
            raise TypeError(f"{cls.__name__} got {len(values)} values. Its fields are {', '.join(names)}. Pass each.")
        for name, value in zip(names, values):
            setattr(self, name, value)

    # Releases before 3.9 want it spelled out. The mark keeps them from refusing a plain function in a kernel's hash.
    marked: Any = constructor
    marked.__triton_builtin__ = True
    cls.__init__ = marked
    return (getattr(gluon, "aggregate", None) or core._aggregate)(cls)


# Launching, and compiling offline


@dataclass
class _Offline:
    capability: tuple[int, int]
    compiled: list


_offline: _Offline | None = None  # while a block of `offline` is open


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a jitted kernel; under `offline`, compile it instead."""
    if _offline is None:
        kernel[grid](*args, **options)
    else:
        _offline.compiled.append(kernel.warmup(*args, grid=grid, **options))


@contextlib.contextmanager
def offline(capability: tuple[int, int] = (9, 0)) -> Iterator[list]:
    """Inside the block, `start` compiles for a GPU of that capability and appends the result to the list given.

    So the host code that production runs is what gets compiled, with CPU tensors in place of CUDA ones. Needs neither a
    GPU nor CUDA: Triton's wheel brings the assembler.
    """
    global _offline
    from triton.runtime.driver import driver

    before, driver._active = driver._active, _offline_driver(capability)
    _offline = _Offline(capability, [])
    try:
        yield _offline.compiled
    finally:
        driver._active, _offline = before, None


def _offline_driver(capability: tuple[int, int]) -> Any:
    """Just enough of a driver for `JITFunction.warmup`: a target and no device."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver

    arch = 10 * capability[0] + capability[1]

    class OfflineDriver(GPUDriver):
        def __init__(self) -> None:  # GPUDriver's own asks torch for a device
            self.get_current_device = lambda: -arch  # Triton caches kernels by device: no real one has this number
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: capability

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Callable:
            raise RuntimeError("A kernel is being compiled offline: there is no device to time it on.")

    return OfflineDriver()


@dataclass(frozen=True)
class KernelFacts:
    """What the compiler made of a kernel. Spills and stack are in bytes a thread, shared memory in bytes a CTA."""

    name: str
    registers: int
    spills: int
    stack: int
    shared: int
    warps: int
    wgmma: tuple[str, ...]  # each tensor-core instruction in program order, such as m64n256k16.f32.bf16.bf16
    tma_loads: int
    tma_stores: int
    warnings: tuple[str, ...]  # of the assembler; one on wgmma means that it was serialised


def read_facts(kernel: Any) -> KernelFacts:
    """Facts about a compiled kernel, from its PTX, its binary and a second, verbose run of Triton's own assembler."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx, arch = kernel.asm["ptx"], kernel.metadata.target.arch
    gpu = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        binary, source = os.path.join(folder, "k.cubin"), os.path.join(folder, "k.ptx")
        with open(binary, "wb") as file:
            file.write(kernel.asm["cubin"])
        with open(source, "w") as file:
            file.write(ptx)
        usage = _output(os.path.join(_tools(), "cuobjdump"), "-res-usage", binary)
        log = _output(get_ptxas(arch).path, "-v", gpu, source, "-o", os.path.join(folder, "v.cubin"))
    registers, stack = _numbers(r"REG:(\d+) STACK:(\d+)", usage)
    return KernelFacts(
        name=kernel.metadata.name,
        registers=registers,
        spills=sum(_numbers(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)),
        stack=stack,
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        wgmma=tuple(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\S+)", ptx)),
        tma_loads=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        tma_stores=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global", ptx)),
        warnings=tuple(re.findall(r"warning\s*: (.*)", log)),
    )


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"No {pattern!r} in the tool's output: {text[-2000:]}")
    return [int(group) for group in found.groups()]


def _tools() -> str:
    from triton.backends import nvidia

    return os.path.join(os.path.dirname(nvidia.__file__), "bin")


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout
