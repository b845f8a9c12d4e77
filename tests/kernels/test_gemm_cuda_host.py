"""The host side of the CUDA FP8 kernel on a CPU: tiles, their choice, refusals, the compiler's cache and errors."""

from __future__ import annotations

import ctypes
import math
import re
from pathlib import Path

import pytest
import torch

from dscompile.kernels import gemm_cuda, nvrtc
from dscompile.kernels.gemm_cuda import TILES, Tile, choose_tile, raster, supports

# Tiles


@pytest.mark.parametrize("name", TILES)
def test_tiles_fit(name: str) -> None:
    tile = TILES[name]
    assert tile.stages >= 3 and tile.shared_bytes <= gemm_cuda.SHARED_BYTES
    assert tile.columns % 16 == 0 and tile.rows % 64 == 0
    # A slot begins in whole swizzle atoms, also where a cluster shares it out.
    assert (tile.rows // tile.cluster) % 8 == 0 and (tile.columns // tile.cluster) % 8 == 0


def test_shared_memory_of_a_tile() -> None:
    """Two warpgroups of 128 x 128: three slots of 48 KB with scales and barriers, and 64 KB for the result."""
    tile = Tile(256, 128, share="x")
    assert tile.stages == 3 and tile.staging_bytes == 256 * 128 * 2
    assert tile.shared_bytes == 3 * (384 * 128 + 260 * 4 + 32 + 16) + 65536
    assert Tile(128, 176).staging_bytes == 128 * 192 * 2  # boxes of 64 columns


def test_a_cluster_computes_two_neighbours() -> None:
    assert Tile(256, 128).unit == (256, 128)
    assert Tile(256, 128, share="x").unit == (256, 256)
    assert Tile(128, 192, share="w").unit == (256, 192)


@pytest.mark.parametrize("rows", [1, 500, 4096, 100_000])
def test_raster_is_positive_and_touches_little(rows: int) -> None:
    tile = Tile(256, 128, share="x")
    height = raster(tile, rows, 7168, 132)
    assert height >= 1
    if rows == 4096:  # 66 units of 256 x 256 in 16 rows: 8 x 8 touch less than 16 x 4 or 4 x 16
        assert height == 8


# What is refused


def arguments(m: int = 64, n: int = 128, k: int = 256, groups: int = 0, slabs: int = 0) -> dict:
    x = torch.zeros(*([slabs] if slabs else []), m, k, dtype=torch.float8_e4m3fn)
    outer = [groups] if groups else []
    return {
        "x": x,
        "w": torch.zeros(*outer, n, k, dtype=torch.float8_e4m3fn),
        "bounds": torch.zeros(groups, dtype=torch.int32) if groups else None,
        "x_scale": torch.zeros(*([slabs] if slabs else []), math.ceil(k / 128), math.ceil(m / 4) * 4),
        "w_scale": torch.zeros(*outer, math.ceil(n / 128), math.ceil(k / 128)),
    }


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for those of a Hopper GPU."""
    monkeypatch.setattr(gemm_cuda, "capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "why_no_nvrtc", lambda: None)


@pytest.mark.parametrize(
    "shape",
    [{}, {"m": 0}, {"m": 3, "n": 8, "k": 400}, {"groups": 3}, {"m": 5, "groups": 2, "slabs": 2}],
    ids=str,
)
def test_supported(shape: dict, hopper: None) -> None:
    assert supports(**arguments(**shape)) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w_scale": None}, "with no scales"),
        ({"x": torch.zeros(64, 256)}, "x is torch.float32, w torch.float8_e4m3fn"),
        ({"swiglu": True}, "swiglu=True"),
        ({"out_dtype": torch.float16}, "out_dtype=torch.float16"),
        ({"w": torch.zeros(128, 384, dtype=torch.float8_e4m3fn)}, "must agree in K"),
        ({"x_scale": torch.zeros(2, 60)}, r"Make x_scale \[2, 64\]"),
        ({"x_scale": torch.zeros(64, 2)}, r"Make x_scale \[2, 64\]"),
        ({"w_scale": torch.zeros(2, 2)}, r"Make w_scale \[1, 2\]"),
        ({"w_scale": torch.zeros(1, 2, dtype=torch.bfloat16)}, "scales in float32"),
        ({"x_scale": torch.zeros(64, 2).T}, r"x_scale \[2, 64\] has strides \(1, 2\)"),
        ({"bounds": torch.zeros(1, dtype=torch.int32)}, r"bounds \[1\]. The CUDA kernel"),
        (
            {"x": torch.zeros(64, 272, dtype=torch.float8_e4m3fn)[:, 8:264]},
            r"x \[64, 256\] has strides \(272, 1\) and offset 8",
        ),
    ],
)
def test_refused(change: dict, words: str, hopper: None) -> None:
    reason = supports(**{**arguments(), **change})
    assert reason is not None and re.search(words, reason), reason


@pytest.mark.parametrize(
    ("shape", "change", "words"),
    [
        ({"n": 130}, {}, "Pad N to a multiple of 8"),
        ({"k": 264}, {}, "multiples of 16 bytes"),
        ({"groups": 3}, {"bounds": None}, "with ends or counts [G]"),
        ({"groups": 3}, {"bounds": torch.zeros(3, dtype=torch.int64)}, "contiguous int32 [3]"),
        ({"groups": 3}, {"bounds": torch.zeros(4, dtype=torch.int32)}, "contiguous int32 [3]"),
        ({"groups": 3, "slabs": 2}, {}, "masked, in groups"),
    ],
    ids=str,
)
def test_refused_shapes(shape: dict, change: dict, words: str, hopper: None) -> None:
    reason = supports(**{**arguments(**shape), **change})
    assert reason is not None and words in reason, reason


def test_other_devices_are_refused_by_a_call() -> None:
    given = arguments()
    with pytest.raises(ValueError, match="Hopper"):
        gemm_cuda.linear(given["x"], given["w"], x_scale=given["x_scale"], w_scale=given["w_scale"])


def test_without_a_compiler_the_reason_says_what_to_install(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "why_no_nvrtc", lambda: "NVRTC is missing: pip install it")
    reason = supports(**arguments())
    assert reason is not None and "pip install" in reason


# The compiler


def test_structures_are_laid_out_as_the_drivers() -> None:
    """Offsets of CUlaunchConfig and CUlaunchAttribute in cuda.h, and the size of CUtensorMap."""
    config, attribute = nvrtc._Config, nvrtc._Attribute
    assert (config.block_x.offset, config.shared.offset, config.stream.offset) == (12, 24, 32)
    assert (config.attributes.offset, config.attribute_count.offset) == (40, 48)
    assert (ctypes.sizeof(attribute), attribute.words.offset, ctypes.sizeof(nvrtc.TensorMap)) == (72, 8, 128)


def test_an_error_shows_the_compilers_log() -> None:
    if nvrtc.why_no_nvrtc():
        pytest.skip("compile_only: NVRTC is not installed")
    with pytest.raises(nvrtc.NvrtcError, match="no_such_name"):
        nvrtc.compile_with_log({"wrong.cu": "__global__ void f() { no_such_name(); }"}, [])


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: ["/nowhere/libnvrtc.so.13"])
    nvrtc._nvrtc.cache_clear()
    try:
        assert "pip install nvidia-cuda-nvrtc" in (nvrtc.why_no_nvrtc() or "")
        with pytest.raises(nvrtc.NvrtcError, match="/nowhere/libnvrtc.so.13"):
            nvrtc.compile_with_log({"a.cu": ""}, [])
    finally:
        nvrtc._nvrtc.cache_clear()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list:
    """A cache of its own, and a compiler that only notes what it is asked."""
    calls: list = []

    def compile_with_log(sources: dict, options: list) -> tuple[bytes, str]:
        calls.append((tuple(sources), tuple(options)))
        return f"binary {len(calls)}".encode(), ""

    monkeypatch.setenv("DSINFRA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "compile_with_log", compile_with_log)
    return calls


def test_the_cache_knows_sources_options_and_compiler(counted: list, monkeypatch: pytest.MonkeyPatch) -> None:
    first = nvrtc.compile_cubin({"a.cu": "x", "b.cuh": "y"}, ["-DA=1"])
    assert nvrtc.compile_cubin({"a.cu": "x", "b.cuh": "y"}, ["-DA=1"]) == first and len(counted) == 1
    nvrtc.compile_cubin({"a.cu": "x", "b.cuh": "z"}, ["-DA=1"])
    nvrtc.compile_cubin({"a.cu": "x", "b.cuh": "y"}, ["-DA=2"])
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 1))
    nvrtc.compile_cubin({"a.cu": "x", "b.cuh": "y"}, ["-DA=1"])
    assert len(counted) == 4
    assert all("--gpu-architecture=sm_90a" in options for _, options in counted)


def test_a_cache_that_cannot_be_written_is_no_error(counted: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSINFRA_CACHE_DIR", "/dev/null/nowhere")
    assert nvrtc.compile_cubin({"a.cu": "x"}, []) == b"binary 1"


# Choosing


@pytest.mark.parametrize(
    ("m", "n", "groups", "name"),
    [
        (4096, 2112, None, "128x176-x"),  # 12 columns of tiles fill three rounds; 11 of 192 leave a tenth empty
        (4096, 24576, None, "128x192"),  # both fill all but a part of the last of many rounds: the faster of the two
        (4096, 7168, None, "256x128"),  # 896 tiles in 7 rounds of 132; 1216 of 128x192 take ten, the last almost empty
        (4096, 1536, None, "128x192"),
        (512, 4096, None, "128x128"),  # one round of 128 tiles instead of half a round of larger ones
        (6559, 4096, 32, "128x192"),
    ],
)
def test_choose_tile(m: int, n: int, groups: int | None, name: str) -> None:
    assert choose_tile(m, n, groups=groups) == name


@pytest.mark.parametrize("groups", [None, 1, 8, 256])
@pytest.mark.parametrize("n", [8, 128, 576, 2112, 7168])
@pytest.mark.parametrize("m", [1, 300, 4096, 34_000])
def test_every_choice_can_be_launched(m: int, n: int, groups: int | None) -> None:
    for sms in (2, 78, 132):
        tile = TILES[choose_tile(m, n, groups=groups, sms=sms)]
        assert groups is None or not tile.dense_only


def test_a_dense_tile_is_refused_for_groups(hopper: None) -> None:
    given = arguments(groups=3)
    x, w, ends = given["x"], given["w"], given["bounds"]
    with pytest.raises(ValueError, match="128x176-x is for dense rows"):
        gemm_cuda.grouped(x, w, ends, x_scale=given["x_scale"], w_scale=given["w_scale"], tile="128x176-x")


def test_an_unknown_tile_lists_the_known_ones(hopper: None) -> None:
    given = arguments()
    with pytest.raises(ValueError, match="No tile '1x1' among 256x128, "):
        gemm_cuda.linear(given["x"], given["w"], x_scale=given["x_scale"], w_scale=given["w_scale"], tile="1x1")
