"""What the compiler makes of the kernels of placed experts: launches, spills, and that they are integers only."""

import pytest

from tests.kernels.compiled import compiled_by


@pytest.fixture(scope="module")
def compiled() -> dict:
    return compiled_by("compile_place.py")


def test_nothing_spills(compiled: dict) -> None:
    for key, fact in compiled.items():
        assert fact["spills"] == 0 and fact["stack"] == 0, (key, fact)
        assert fact["warnings"] == [], key
        assert not fact["floats"], f"{key} computes in floats, whose sums depend on their order"


LAUNCHES = {
    "round_robin-128": ["round_robin_kernel"],
    "water_filling-128": ["filled_kernel"],
    "round_robin-4096": ["round_robin_kernel"],
    "water_filling-4096": ["histogram_kernel", "scan_kernel", "fill_kernel", "replica_kernel"],
}


def test_both_at_once_are_one_launch_at_decode(compiled: dict) -> None:
    assert list(compiled) == [f"{call}/{name}" for call, names in LAUNCHES.items() for name in names]


def test_only_counting_by_blocks_needs_atomics(compiled: dict) -> None:
    assert {key.split("/")[1] for key, fact in compiled.items() if fact["atomics"]} == {"round_robin_kernel"}
