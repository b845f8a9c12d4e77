"""What NVRTC makes of the FP8 kernel's instances, without a device: registers, spills, products, copies."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from dscompile.kernels import gemm_cuda, nvrtc
from dscompile.kernels.gemm_cuda import LAYOUTS, TILES

pytestmark = pytest.mark.slow

if nvrtc.why_no_nvrtc():
    pytest.skip("compile_only: NVRTC is not installed", allow_module_level=True)


def instances() -> list[tuple[str, str]]:
    """Every tile for dense rows; of those that groups may use, both their layouts too."""
    return [(name, layout) for name in TILES for layout in LAYOUTS if layout == "dense" or not TILES[name].dense_only]


def disassemble(cubin: bytes, folder: Path) -> str:
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="compile_only: nvdisasm comes with Triton")
    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(next(iter(nvidia.__path__))) / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", folder / "kernel.cubin"], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("name", "layout"), instances(), ids=lambda value: value)
def test_instance(name: str, layout: str, tmp_path: Path) -> None:
    tile = TILES[name]
    sources, options = gemm_cuda.program(tile, layout)
    cubin, log = nvrtc.compile_with_log(sources, ["--gpu-architecture=sm_90a", *options, "--ptxas-options=-v"])
    # 168 a thread at the start; setmaxnreg makes that 56 for the producer's warpgroup and 224 for the other two.
    assert re.findall(r"Used (\d+) registers", log) == ["168"], log
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")], log
    assert "warning" not in log.lower(), log
    assert tile.shared_bytes <= gemm_cuda.SHARED_BYTES and tile.stages >= 3

    sass = disassemble(cubin, tmp_path)
    width = tile.columns // tile.across
    waves = tile.rows * tile.across // 128
    copies_of_loop = 128 // (128 if tile.columns % 128 == 0 else tile.columns & -tile.columns)
    kinds = 1 + (waves == 2 and layout != "dense") * 0.5  # a tile that is half empty has a loop of one wave
    assert len(re.findall(rf"QGMMA\.64x{width}x32\.F32\.E4M3\.E4M3", sass)) == 4 * waves * copies_of_loop * kinds
    assert len(re.findall(r"\bFFMA\b", sass)) == width // 2 * waves * copies_of_loop * kinds
    multicasts = len(re.findall(r"UTMALDG\.3D\.MULTICAST", sass))
    assert multicasts == (tile.share != "none") and len(re.findall(r"UTMALDG\.3D", sass)) == 2  # x, w
    assert len(re.findall(r"UBLKCP", sass)) == 1  # x's scales
    assert len(re.findall(r"UTMASTG\.3D", sass)) == tile.rows * tile.across // 128 * (width // 64)
    assert len(re.findall(r"USETMAXREG", sass)) == 2


def test_host_and_device_agree_on_what_is_passed() -> None:
    """Each field of the structure that the host fills lies where the device reads it.

    NVRTC 13.0, which torch 2.11 brings, has no constant offset of a field: a call of a function that exists nowhere
    stays in the program, and fails it, unless the optimiser proves the offsets equal.
    """
    problem = gemm_cuda._Problem
    sources, _ = gemm_cuda.program(TILES["128x128"], "dense")
    headers = {name: sources[name] for name in ("schedule.cuh", "sm90.cuh")}

    def check(size: int, offsets: dict[str, int]) -> None:
        lines = ['#include "schedule.cuh"', 'extern "C" __device__ void lies_elsewhere();']
        lines += [f"static_assert(sizeof(Problem) == {size});", 'extern "C" __global__ void check(Problem problem) {']
        lines.append("    const char* start = reinterpret_cast<char*>(&problem);")
        for name, offset in offsets.items():
            lines.append(f"    if (reinterpret_cast<char*>(&problem.{name}) - start != {offset}) lies_elsewhere();")
        program = {"check.cu": "\n".join([*lines, "}"]), **headers}
        nvrtc.compile_with_log(program, ["--gpu-architecture=sm_90a", "--std=c++17"])

    size, offsets = ctypes.sizeof(problem), {name: getattr(problem, name).offset for name, _ in problem._fields_}
    check(size, offsets)
    with pytest.raises(nvrtc.NvrtcError, match="static assertion failed"):
        check(size + 8, offsets)
    with pytest.raises(nvrtc.NvrtcError, match="Unresolved extern function 'lies_elsewhere'"):
        check(size, offsets | {"raster": offsets["raster"] + 4})
