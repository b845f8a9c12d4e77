"""CUDA C++ kernels at run time: NVRTC compiles them, the driver loads and launches them, all through ctypes.

Triton can't express some of Hopper (multicast, tiles of any width, chosen registers), and an extension built with nvcc
would tie a wheel to one torch and one CUDA. NVRTC is a library that torch's CUDA builds bring along; it needs neither a
toolkit nor a GPU, so tests compile the same kernels on a machine without either. Binaries are kept on disk, keyed by
sources, options and compiler. Refuses with a sentence where NVRTC or the driver is missing or says no.

    compile_cubin   sources -> binary, from the cache where it has it
    load            binary -> Kernel, once a device
    Kernel.launch   with clusters and programmatic launch, on a stream, also while it is captured into a graph
    tensor_map      descriptor of a tensor for bulk copies
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import getpass
import glob
import hashlib
import importlib.util
import os
import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["Kernel", "NvrtcError", "TensorMap", "compile_cubin", "load", "nvrtc_version", "tensor_map", "why_no_nvrtc"]


class NvrtcError(RuntimeError):
    """NVRTC or the CUDA driver is missing or refused; the message names what it said and what to do."""


# Finding the compiler


def _candidates() -> list[str]:
    """Where NVRTC may be, best first: $DSINFRA_NVRTC, wheels (torch brings one), the toolkit, the loader's path."""
    found = [os.environ["DSINFRA_NVRTC"]] if os.environ.get("DSINFRA_NVRTC") else []
    spec = importlib.util.find_spec("nvidia")
    for folder in list(spec.submodule_search_locations or []) if spec else []:
        for inside in ("cu*/lib", "cuda_nvrtc/lib"):
            found += sorted(glob.glob(os.path.join(folder, inside, "libnvrtc.so.*")), reverse=True)
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found += sorted(glob.glob(os.path.join(home, "lib64", "libnvrtc.so.*")), reverse=True)
    return [path for path in found if ".alt." not in path] + ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]


@functools.cache
def _nvrtc() -> tuple[ctypes.CDLL | None, str]:
    """The compiler's library, or None and where it was looked for."""
    candidates = _candidates()
    for path in candidates:
        with contextlib.suppress(OSError):
            # The compiler opens this one by its bare name, which the loader finds if it is there already.
            for part in glob.glob(os.path.join(os.path.dirname(path) or ".", "libnvrtc-builtins.so.*")):
                if ".alt." not in part:
                    ctypes.CDLL(part)
            return ctypes.CDLL(path), path
    return None, f"none of {', '.join(candidates)} can be loaded"


def why_no_nvrtc() -> str | None:
    """None where NVRTC can be loaded, else a sentence that says what to install."""
    library, where = _nvrtc()
    if library is not None:
        return None
    return f"NVRTC is missing ({where}): pip install nvidia-cuda-nvrtc, or name the library in DSINFRA_NVRTC"


def _compiler() -> ctypes.CDLL:
    reason = why_no_nvrtc()
    if reason:
        raise NvrtcError(reason)
    library = _nvrtc()[0]
    assert library is not None
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC in use. Raises NvrtcError where there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _compiler().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


# Compiling


def compile_cubin(sources: Mapping[str, str], options: Sequence[str]) -> bytes:
    """Machine code for sm_90a of a program; compiled once for each set of sources, options and compiler.

    sources: file name -> text; the first is compiled, the others are what it may include. options: NVRTC's. The cache
    is :func:`cache_folder`. Raises NvrtcError with the log.
    """
    options = ["--gpu-architecture=sm_90a", "--std=c++17", *options]
    words = [repr(nvrtc_version()), *options, *(word for pair in sources.items() for word in pair)]
    key = hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]
    path = os.path.join(cache_folder(), f"{key}.cubin")
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read()
    cubin, _ = compile_with_log(sources, options)
    with contextlib.suppress(OSError):  # a cache that can't be written is no error
        os.makedirs(cache_folder(), exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_folder(), delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)  # at once, so that no other process sees half a file
    return cubin


def cache_folder() -> str:
    """Where binaries are kept: in the folder of torch's compiler, or where $DSINFRA_CACHE_DIR says.

    Torch's is $TORCHINDUCTOR_CACHE_DIR, by default one of the user's in the temporary folder.
    """
    root = os.environ.get("DSINFRA_CACHE_DIR") or os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not root:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a number without an entry, as in many containers
            user = f"uid_{os.getuid()}"
        user = re.sub(r'[\\/:*?"<>|]', "_", user)
        root = os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")
    return os.path.join(root, "dsinfra_cubin")


def compile_with_log(sources: Mapping[str, str], options: Sequence[str]) -> tuple[bytes, str]:
    """Compiles without the cache; (machine code, the compiler's log). `--ptxas-options=-v` puts resources into it."""
    library = _compiler()
    name, *headers = sources
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(sources[header].encode() for header in headers))
    names = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers))
    source = sources[name].encode()
    code = library.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), len(headers), texts, names)
    if code:
        raise NvrtcError(f"NVRTC could not take up {name}: {library.nvrtcGetErrorString(code).decode()}")
    try:
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        code = library.nvrtcCompileProgram(program, len(options), flags)
        log = _result(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if code:
            error = library.nvrtcGetErrorString(code).decode()
            raise NvrtcError(f"NVRTC {nvrtc_version()} could not compile {name} with {list(options)}: {error}\n{log}")
        return _result(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _result(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


# The driver


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NvrtcError(f"No CUDA driver ({error}): kernels can be compiled here, but not run.") from error


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise NvrtcError(f"{what}: the CUDA driver answers {(text.value or b'an unknown error').decode()} ({code}).")


def _ensure_context(device: int) -> None:
    """A thread that has not used CUDA yet has no context; give it the one that torch uses."""
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "Asking for the current context")
    if not context.value:
        code = _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        _check(code, f"Taking the context of device {device}")
        _check(_driver().cuCtxSetCurrent(context), f"Setting the context of device {device}")


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: its number, and a union of 64 bytes that begins with these words."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("words", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
_MAX_DYNAMIC_SHARED_SIZE = 8
_RELAXED_CAPTURE = 2


class Kernel:
    """A kernel loaded on one device, with its threads a CTA, CTAs a cluster and bytes of dynamic shared memory."""

    def __init__(self, cubin: bytes, name: str, device: int, *, threads: int, cluster: int, shared: int) -> None:
        self.name, self.device = name, device
        self.threads, self.cluster, self.shared = threads, cluster, shared
        _ensure_context(device)
        mode = ctypes.c_int(_RELAXED_CAPTURE)  # so that a first call inside a graph capture may load
        _check(_driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "Relaxing the capture mode")
        try:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), f"Loading {name}")
            _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"Finding {name}")
            code = _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE, shared)
            _check(code, f"Giving {name} {shared} bytes of shared memory")
        finally:
            _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        self.function = function

    def launch(self, ctas: int, stream: int, arguments: Sequence[Any], *, programmatic: bool = False) -> None:
        """Enqueue on `stream` a grid of that many CTAs, a multiple of the cluster.

        arguments: ctypes values and structures, passed by value. programmatic: the kernel may start while those before
        it still run, and waits for them itself before it touches memory.
        """
        _ensure_context(self.device)
        attributes = (_Attribute * 2)()
        attributes[0].id, attributes[0].words[:3] = _CLUSTER_DIMENSION, (self.cluster, 1, 1)
        attributes[1].id, attributes[1].words[0] = _PROGRAMMATIC_STREAM_SERIALIZATION, int(programmatic)
        config = _Config(ctas, 1, 1, self.threads, 1, 1, self.shared, stream, attributes, 2)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        code = _driver().cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None)
        _check(code, f"Launching {self.name} with {ctas} CTAs of {self.threads} threads in clusters of {self.cluster}")


_loaded: dict[tuple, Kernel] = {}
_loading = threading.Lock()


def load(sources: Mapping[str, str], options: Sequence[str], name: str, device: int, **shape: int) -> Kernel:
    """The kernel `name` of a program on a device, compiled and loaded at the first call. Threads wait for one another.

    shape: threads, cluster and shared of `Kernel`.
    """
    key = (tuple(sources.items()), tuple(options), name, device)
    with _loading:
        if key not in _loaded:
            _loaded[key] = Kernel(compile_cubin(sources, options), name, device, **shape)
        return _loaded[key]


# Tensor maps


class TensorMap(ctypes.Structure):
    """CUtensorMap: 128 bytes, at a multiple of 64 in the kernel's parameters, where the driver copies them."""

    _fields_ = [("words", ctypes.c_uint64 * 16)]


_ELEMENTS = {torch.float8_e4m3fn: (0, 1), torch.uint8: (0, 1), torch.bfloat16: (9, 2), torch.float32: (7, 4)}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


@functools.lru_cache(maxsize=8192)  # a map is a pure function of these numbers, and encoding one takes microseconds
def tensor_map(
    pointer: int,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> TensorMap:
    """Descriptor by which bulk copies move boxes of a tensor; all tuples go from the innermost dimension out.

    sizes and box in elements; strides in elements, the innermost (1) left out; swizzle: 0, 32, 64 or 128 bytes. What
    lies outside the sizes reads as zero and is not written. Raises NvrtcError naming the tensor if the driver refuses.
    """
    number, width = _ELEMENTS[dtype]
    rank = len(sizes)
    buffer = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
    address = -(-ctypes.addressof(buffer) // 64) * 64  # the driver wants it aligned
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address),
        number,
        rank,
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*(stride * width for stride in strides)),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*(1 for _ in box)),
        0,  # not interleaved
        _SWIZZLES[swizzle],
        2,  # reads of L2 in 128 bytes
        0,  # zeros outside
    )
    what = f"A tensor map of {dtype} sizes {sizes} strides {strides} box {box} (innermost first) at {pointer:#x}"
    _check(code, what)
    return TensorMap.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(TensorMap)))
