"""What NVRTC makes of the 16-bit CUDA kernel's instances, without a device: registers, spills, products, copies."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from dscompile.kernels import gemm_half_cuda, nvrtc
from dscompile.kernels.gemm_half_cuda import SPEED, TILES

pytestmark = pytest.mark.slow

if nvrtc.why_no_nvrtc():
    pytest.skip("compile_only: NVRTC is not installed", allow_module_level=True)

# Every tile for groups with and without SwiGLU; dense rows and the other dtype for what is chosen by itself.
INSTANCES = [(name, "ends", torch.bfloat16, swiglu) for name in TILES for swiglu in (False, True)]
INSTANCES += [(name, "dense", torch.float16, False) for name in SPEED]


def disassemble(cubin: bytes, folder: Path) -> str:
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="compile_only: nvdisasm comes with Triton")
    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(next(iter(nvidia.__path__))) / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", folder / "kernel.cubin"], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("name", "layout", "dtype", "swiglu"), INSTANCES, ids=str)
def test_instance(name: str, layout: str, dtype: torch.dtype, swiglu: bool, tmp_path: Path) -> None:
    tile = TILES[name]
    sources, options = gemm_half_cuda.program(tile, layout, dtype, swiglu)
    cubin, log = nvrtc.compile_with_log(
        sources, ["--gpu-architecture=sm_90a", "--std=c++17", *options, "--ptxas-options=-v"]
    )
    # 168 a thread at the start; setmaxnreg makes that 56 for the producer's warpgroup and 224 for the other two.
    assert re.findall(r"Used (\d+) registers", log) == ["168"], log
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")], log
    assert "warning" not in log.lower(), log  # products that the compiler makes wait for one another are one
    assert tile.shared_bytes <= gemm_half_cuda.SHARED_BYTES and tile.stages >= 4

    sass = disassemble(cubin, tmp_path)
    waves = tile.rows // (64 if tile.turns else 128)
    loops = 3 if waves == 2 else 1  # waves of products in all: a tile that is half empty has a loop of one wave
    kind = "" if dtype == torch.float16 else ".BF16"
    assert len(re.findall(rf"HGMMA\.64x{tile.columns}x16\.F32{re.escape(kind)} ", sass)) == 4 * loops
    loads, multicasts = len(re.findall(r"UTMALDG\.3D", sass)), len(re.findall(r"UTMALDG\.3D\.MULTICAST", sass))
    assert loads == tile.rows // 64 + 2
    assert multicasts == {"none": 0, "x": tile.rows // 64, "w": 2}[tile.share]
    boxes = tile.columns // (128 if swiglu else 64)
    assert len(re.findall(r"UTMASTG\.3D", sass)) == waves * boxes
    assert len(re.findall(r"USETMAXREG", sass)) == 2
