"""The host side of the 16-bit CUDA kernel on a CPU: tiles, their choice, refusals, its place among the others."""

from __future__ import annotations

import re

import pytest
import torch

from dscompile.kernels import gemm, gemm_half_cuda, gemm_plan, nvrtc
from dscompile.kernels.gemm_half_cuda import SPEED, TILES, Tile, choose_tile, supports
from dscompile.kernels.gemm_plan import GemmPlan, plan_gemm
from dscompile.kernels.refusals import KernelLimit

BF16 = torch.bfloat16


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for those of a Hopper GPU."""
    monkeypatch.setattr(gemm_half_cuda, "capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "why_no_nvrtc", lambda: None)


def test_shared_memory_of_a_tile() -> None:
    """Four slots of 48 KB beside 32 KB for stores fit, five don't; tiles of 128 x 128 have six of 32 KB."""
    tile = Tile(128, 256, share="x")
    assert tile.stages == 4 and tile.shared_bytes == 4 * (384 * 128 + 32) + 32768 + 48
    assert Tile(128, 128, share="w", turns=True).stages == 6
    assert all(tile.stages >= 4 and tile.shared_bytes <= gemm_half_cuda.SHARED_BYTES for tile in TILES.values())


def test_names_say_what_is_shared() -> None:
    assert list(TILES) == [tile.name for tile in TILES.values()] and set(SPEED) <= set(TILES)
    assert Tile(128, 128, share="w", turns=True).name == "128x128-w-turns"


def test_a_narrow_tile_is_chosen_where_wide_ones_come_in_odd_numbers() -> None:
    assert choose_tile(24576, 2816, groups=64) == "256x128-x"  # eleven columns of 256 leave one CTA without partner
    assert choose_tile(32768, 4096, groups=64) == "128x256-x"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(64, 256), "w": torch.zeros(128, 256)}, "has one dtype"),
        ({"out_dtype": torch.float32}, "y torch.float32"),
        ({"x_scale": torch.zeros(2, 64)}, "with scales"),
        ({"w": torch.zeros(128, 264, dtype=BF16)}, r"takes x \[M, K\]"),
        ({"w": torch.zeros(3, 128, 256, dtype=BF16)}, r"ends \[G\]. Reshape"),
        ({"w": torch.zeros(132, 256, dtype=BF16)}, "multiple of 8"),
        ({"w": torch.zeros(256, 128, dtype=BF16).T}, r"w \(128, 256\) has strides \(1, 128\)"),
        ({"x": torch.zeros(64, 264, dtype=BF16)[:, 4:260]}, r"x \(64, 256\) has strides \(264, 1\)"),
        ({"swiglu": True}, "activate a dense product"),
    ],
)
def test_refused(change: dict, words: str, hopper: None) -> None:
    given = {"x": torch.zeros(64, 256, dtype=BF16), "w": torch.zeros(128, 256, dtype=BF16)}
    assert supports(**given) is None
    reason = supports(**{**given, **change})
    assert reason is not None and re.search(words, reason), reason


@pytest.mark.parametrize(
    ("rows", "ends", "swiglu", "words"),
    [
        (128, torch.zeros(3, dtype=torch.int64), False, r"contiguous int32 \[3\]"),
        (128, torch.zeros(2, dtype=torch.int32), False, r"contiguous int32 \[3\]"),
        (136, torch.zeros(3, dtype=torch.int32), True, "swiglu is True"),
        (136, torch.zeros(3, dtype=torch.int32), False, None),
    ],
)
def test_refused_groups(rows: int, ends: torch.Tensor, swiglu: bool, words: str | None, hopper: None) -> None:
    x, w = torch.zeros(64, 256, dtype=BF16), torch.zeros(3, rows, 256, dtype=BF16)
    reason = supports(x, w, ends, swiglu=swiglu)
    assert reason is None if words is None else reason is not None and re.search(words, reason), reason


def test_masked_groups_are_refused(hopper: None) -> None:
    reason = supports(torch.zeros(3, 8, 64, dtype=BF16), torch.zeros(3, 8, 64, dtype=BF16), torch.zeros(3).int())
    assert reason is not None and "Reshape" in reason


def test_an_unknown_tile_lists_the_known_ones(hopper: None) -> None:
    x = torch.zeros(64, 256, dtype=BF16)
    with pytest.raises(ValueError, match="No tile '1x1' among 128x256, "):
        gemm_half_cuda.linear(x, x, tile="1x1")


def test_a_plan_for_other_devices_is_refused() -> None:
    x, ends = torch.zeros(64, 256, dtype=BF16), torch.tensor([64], dtype=torch.int32)
    with pytest.raises(KernelLimit, match="needs Hopper"):
        gemm.grouped(x, x[None], ends, plan=GemmPlan("half_cuda"))


def test_it_is_chosen_from_a_number_of_rows_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(rows: int, dtype: torch.dtype = BF16, layout: str = "ends") -> str:
        plan_gemm.cache_clear()
        return plan_gemm(64 * rows, 2816, 2048, 64, dtype, layout, False, 132).impl

    try:
        monkeypatch.setattr(gemm_plan, "HALF_CUDA_ROWS", 300)
        assert chosen(384) == "half_cuda" and chosen(384, torch.float16) == "half_cuda"
        others = [chosen(299), chosen(64), chosen(384, torch.float8_e4m3fn), chosen(384, layout="masked")]
        assert "half_cuda" not in others
        monkeypatch.setattr(gemm_plan, "HALF_CUDA_ROWS", None)
        assert chosen(384) == "gluon"
    finally:
        plan_gemm.cache_clear()
