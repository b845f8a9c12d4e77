"""What NVRTC makes of the exchange kernels, without a device: registers, spills, flags, bulk copies, arguments."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from dscompile.kernels import exchange_launch, nvrtc
from dscompile.kernels.exchange import Spec
from tests.kernels.exchange_emulator import KERNELS
from tests.kernels.test_gemm_cuda_compile import disassemble

if nvrtc.why_no_nvrtc():
    pytest.skip("compile_only: NVRTC is not installed", allow_module_level=True)

SPECS = {
    "fp8": Spec(4, 4096, 7168, 8, 256, quantized=True),
    "bf16": Spec(8, 4096, 7168, 8, 256),
    "fp16": Spec(2, 128, 2048, 6, 64, dtype="float16", index="int32"),
}


@pytest.mark.parametrize("name", SPECS)
def test_kernels(name: str, tmp_path: Path) -> None:
    sources, options = exchange_launch.program(SPECS[name])
    options = ("--gpu-architecture=sm_90a", "--std=c++17", *options, "--ptxas-options=-v")
    cubin, log = nvrtc.compile_with_log(sources, options)
    assert "warning" not in log.lower(), log
    assert set(re.findall(r"Compiling entry function '(\w+)'", log)) == set(KERNELS)
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert set(spilled) == {("0", "0", "0")}, log
    threads = {kernel: exchange_launch.kernel_shape(SPECS[name], kernel)[0] for kernel in KERNELS}
    entries = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", log, flags=re.DOTALL)
    assert len(entries) == len(KERNELS)
    for kernel, registers in entries:
        assert int(registers) * threads[kernel] <= 65536, f"{kernel}: {registers} registers"
    by_kernel = functions(disassemble(cubin, tmp_path))
    assert set(by_kernel) == set(KERNELS)
    for kernel, sass in by_kernel.items():
        check_orders(kernel, sass, quantized=SPECS[name].quantized)


def functions(sass: str) -> dict[str, str]:
    parts = re.split(r"\.text\.(\w+):", sass)
    return dict(zip(parts[1::2], parts[2::2]))


def check_orders(kernel: str, sass: str, *, quantized: bool) -> None:
    """Flags are raised with a fence of the whole system before, polled strongly; bulk copies carry the rows."""
    raises, polls = len(re.findall(r"RED\w*\.E\.MAX\.64\.STRONG\.SYS", sass)), "LDG.E.64.STRONG.SYS" in sass
    fences = len(re.findall(r"MEMBAR\.\w+\.SYS", sass))
    if kernel == "plan":
        assert not raises and not polls and not fences
        return
    assert raises >= 1 and fences >= raises, f"{kernel}: {raises} flags, {fences} fences"
    assert polls == (kernel != "release"), kernel
    loads, stores = len(re.findall(r"UBLKCP\.S\.G", sass)), len(re.findall(r"UBLKCP\.G\.S", sass))
    sends = {"dispatch_start", "dispatch_start_planning", "combine_start"}
    assert loads == (kernel in sends), f"{kernel}: {loads} bulk loads"
    assert stores == (kernel in sends) * (2 if quantized and kernel != "combine_start" else 1), f"{kernel}: {stores}"
    if kernel in sends:
        assert "F2FP.SATFINITE.E4M3" in sass or not (quantized and kernel != "combine_start")
        assert re.search(r"UTMACMDFLUSH|DEPBAR\.LE", sass), f"{kernel} doesn't wait for its stores"


def test_host_and_device_agree_on_what_is_passed() -> None:
    job = exchange_launch._Job
    checks = [f"static_assert(sizeof(Job) == {ctypes.sizeof(job)});"]
    for name, kind in job._fields_:
        checks.append(f"static_assert(sizeof(Job::{name}) == {ctypes.sizeof(kind)});")
        checks.append(f"static_assert(alignof(decltype(Job::{name})) == {ctypes.alignment(kind)});")
    names = ", ".join(f".{name} = {{}}" for name, _ in job._fields_)
    checks.append(f"__device__ Job in_order() {{ return Job{{{names}}}; }}")  # C++20 takes no other order
    sources, options = exchange_launch.program(SPECS["bf16"])
    headers = {name: sources[name] for name in ("exchange.cuh", "peers.cuh", "sm90.cuh")}
    program = {"check.cu": '#include "exchange.cuh"\n' + "\n".join(checks), **headers}
    _, log = nvrtc.compile_with_log(program, ["--gpu-architecture=sm_90a", "--std=c++20", *options])
    assert not log
