"""What the compiler makes of the kernels around the grouped GEMMs: spills, wide accesses, warp-wide reductions."""

import pytest

from tests.kernels.compiled import compiled_by


@pytest.fixture(scope="module")
def compiled() -> dict:
    return compiled_by("compile_moe.py")


def test_nothing_spills(compiled: dict) -> None:
    assert len(compiled) == 24
    for key, fact in compiled.items():
        assert fact["spills"] == 0 and fact["stack"] == 0, key
        assert fact["registers"] * 32 * fact["warps"] <= 32768, key  # two programs fit a multiprocessor
        assert fact["warnings"] == [], key


# kernel: 16-byte loads and stores of a program's threads
WIDE = {
    "plan-gather/plan_kernel": (1, 8),
    "gather-position/gather_kernel": (3, 8),  # two of the places
    "gather-order/gather_by_order_kernel": (1, 1),
    "combine/combine_kernel": (2 * 8, 2),
    "combine-bias/combine_kernel": (2 * (8 + 16), 2),
    "activation/activation_kernel": (4, 1),
    "activation-gelu/activation_kernel": (2, 1),
    "quantize-many/quantize_kernel": (2, 0),  # 16 rows of 16 threads, 8 columns each, by 128 threads
    "quantize-silu/quantize_kernel": (4, 0),
}


@pytest.mark.parametrize("key", WIDE)
def test_rows_move_by_16_bytes(key: str, compiled: dict) -> None:
    loads, stores = WIDE[key]
    assert compiled[key]["wide_loads"] == loads and compiled[key]["wide_stores"] >= stores


def test_the_best_expert_is_found_by_warp_wide_reductions(compiled: dict) -> None:
    found = {key: fact["warp_reductions"] for key, fact in compiled.items() if key.startswith("route-")}
    assert len(found) == 4 and all(number >= 2 for number in found.values()), found
