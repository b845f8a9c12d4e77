"""What the compiler makes of the GEMM kernels, without a device: instructions, registers, spills, shared memory.

With the installed Triton, and with another one if DSINFRA_TRITON_NEWEST names a folder that holds it
(`pip install --target FOLDER triton`).
"""

import pytest

from tests.kernels.compiled import compiled_by_either

pytestmark = pytest.mark.slow

HOPPER_SHARED = 232448  # bytes a CTA may have
CONSUMER_SHARED = 101376


@pytest.fixture(scope="module", params=["installed", "newest"])
def facts(request: pytest.FixtureRequest) -> dict:
    return compiled_by_either("compile_gemm.py", request.param)["facts"]


def named(facts: dict, start: str) -> dict[str, dict]:
    found = {key: fact for key, fact in facts.items() if key.startswith(start)}
    assert found, f"no kernel {start} among {list(facts)}"
    return found


def test_gluon_instructions(facts: dict) -> None:
    """A step of 128 bytes is four products deep: one N-wide series a consumer, or two 128 wide with FP8."""
    for key, fact in named(facts, "gluon").items():
        _, dtype, tile, *_ = key.split("-")
        bm, bn = map(int, tile.split("x"))
        wide = 128 if dtype == "fp8" else bn
        kind = {"bf16": "k16.f32.bf16.bf16", "fp16": "k16.f32.f16.f16", "fp8": "k32.f32.e4m3.e4m3"}[dtype]
        assert set(fact["wgmma"]) == {f"m64n{wide}{kind}"}, key
        series = bn // wide if dtype == "fp8" else 2  # 16 bits: the first step is written out ahead of the loop
        assert len(fact["wgmma"]) == 4 * series * bm // 64, key
        assert fact["tma_loads"] >= 2 and fact["tma_stores"] >= bm // 64, key
        assert fact["warnings"] == [], key


def test_gluon_resources(facts: dict) -> None:
    """Two consumers and a loader start with 168 registers each and trade them; one consumer has enough anyway."""
    for key, fact in named(facts, "gluon").items():
        assert (fact["registers"], fact["warps"]) in ((168, 12), (232, 8)), key
        assert fact["spills"] == 0 and fact["stack"] == 0, key
        assert fact["shared"] <= HOPPER_SHARED, key


def test_triton_resources(facts: dict) -> None:
    for key, fact in named(facts, "triton").items():
        assert fact["spills"] == 0 and fact["stack"] == 0, key
        assert fact["shared"] <= CONSUMER_SHARED, key
