"""What the compiler makes of the GEMM of few tokens, without a device: instructions, registers, shared memory.

With the installed Triton, and with another one if DSINFRA_TRITON_NEWEST names a folder that holds it
(`pip install --target FOLDER triton`).
"""

import pytest

from tests.kernels.compiled import compiled_by_either

pytestmark = pytest.mark.slow

HOPPER_SHARED = 232448  # bytes a CTA may have
KINDS = {"bf16": "k16.f32.bf16.bf16", "fp16": "k16.f32.f16.f16", "fp8": "k32.f32.e4m3.e4m3"}
BYTES = {"bf16": 2, "fp16": 2, "fp8": 1}


@pytest.fixture(scope="module", params=["installed", "newest"])
def compiled(request: pytest.FixtureRequest) -> dict:
    return compiled_by_either("compile_gemm_small.py", request.param)


def products(compiled: dict) -> dict[str, dict]:
    found = {key: fact for key, fact in compiled["facts"].items() if fact["name"] == "gemm_small_kernel"}
    assert len(found) == 19, list(compiled["facts"])
    return found


def test_products(compiled: dict) -> None:
    """Each consumer multiplies its blocks of a stage, in steps of 16 (32) k, by its columns: none is wasted."""
    for key, fact in products(compiled).items():
        dtype, plan = key.split("-")[0], fact["plan"]
        steps = plan["depth"] * BYTES[dtype] // 32
        shape = f"m64n{plan['tokens']}{KINDS[dtype]}"
        assert fact["wgmma"] == [shape] * (plan["consumers"] * plan["blocks"] * steps), key
        assert fact["warnings"] == [], key


def test_loads(compiled: dict) -> None:
    """Boxes of 128 bytes a row (64 rows of weights if they run along N): nothing but TMA feeds the tensor cores."""
    for key, fact in products(compiled).items():
        dtype, plan = key.split("-")[0], fact["plan"]
        across = plan["depth"] * BYTES[dtype] // 128
        weights = plan["boxes"] * (1 if "n-major" in key else across)
        assert fact["tma_loads"] == weights + across + (plan["depth"] // 128 if dtype == "fp8" else 0), key
        assert fact["tma_stores"] == 0, key


def test_resources(compiled: dict) -> None:
    for key, fact in products(compiled).items():
        assert fact["spills"] == 0 and fact["stack"] == 0, key
        assert fact["shared"] <= HOPPER_SHARED, key
        assert fact["warps"] == 4 * (fact["plan"]["consumers"] + 1), key


def test_join(compiled: dict) -> None:
    found = [fact for fact in compiled["facts"].values() if fact["name"] == "gemm_small_join_kernel"]
    assert len(found) == 3
    for fact in found:
        assert fact["spills"] == 0 and fact["stack"] == 0 and fact["registers"] <= 128
