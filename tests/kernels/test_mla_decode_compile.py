"""What the compiler makes of the MLA decode kernels, without a device: instructions, registers, spills, shared memory.

With the installed Triton, and with another one if DSINFRA_TRITON_NEWEST names a folder that holds it
(`pip install --target FOLDER triton`).
"""

import pytest

from tests.kernels.compiled import compiled_by_either

pytestmark = pytest.mark.slow

HOPPER_SHARED = 232448  # bytes a CTA may have
CONSUMER_SHARED = 101376
NEWEST_STACK = 32  # bytes a thread that the assembler of Triton 3.9 keeps there where 3.6's keeps none
WIDEST_SPILLS = 512  # bytes: 16 rows of 1024 columns and their queries are more than the registers of 8 warps
DEALT = ("gluon-paged", "gluon-paged-float16", "gluon-plain-mask")  # by lengths, on the device


@pytest.fixture(scope="module", params=["installed", "newest"])
def compiled(request: pytest.FixtureRequest) -> dict:
    return compiled_by_either("compile_mla_decode.py", request.param)


def named(compiled: dict, start: str, kernel: str) -> dict[str, dict]:
    found = {key: fact for key, fact in compiled["facts"].items() if key.startswith(start) and fact["name"] == kernel}
    assert found, f"no kernel {kernel} under {start} among {list(compiled['facts'])}"
    return found


def stack(compiled: dict) -> int:
    """Bytes that may lie on the stack where 3.6 leaves none there."""
    return NEWEST_STACK if tuple(compiled["triton"]) > (3, 8) else 0


def test_gluon_instructions(compiled: dict) -> None:
    """36 products of depth 16 for the scores; 4 of a page's 64 keys in each of the two halves of the output."""
    facts = named(compiled, "gluon", "mla_decode_gluon_kernel")
    assert len(facts) == 7
    for key, fact in facts.items():
        kind = "f16.f16" if "float16" in key or key.startswith("gluon-plain-mask-splits") else "bf16.bf16"
        count = {shape: fact["wgmma"].count(f"{shape}.f32.{kind}") for shape in ("m64n64k16", "m64n256k16")}
        assert count == {"m64n64k16": 36, "m64n256k16": 8} and len(fact["wgmma"]) == 44, key
        assert fact["tma_loads"] == 18 and fact["tma_stores"] == 0, key  # 9 boxes of 64 columns, queries and a page
        assert fact["warnings"] == [], key


def test_gluon_resources(compiled: dict) -> None:
    """Where lengths deal the work, Triton 3.9's assembler keeps a stretch's bounds on the stack, outside the loop."""
    for key, fact in named(compiled, "gluon", "mla_decode_gluon_kernel").items():
        assert fact["registers"] == 168 and fact["warps"] == 12, key
        most = stack(compiled) if key.split("/")[0] in DEALT else 0
        assert fact["spills"] <= most and fact["stack"] <= most, key
        assert fact["shared"] <= HOPPER_SHARED, key


def test_triton_resources(compiled: dict) -> None:
    facts = named(compiled, "triton", "mla_decode_triton_kernel") | named(compiled, "fp8", "mla_decode_triton_kernel")
    assert len(facts) == 7
    for key, fact in facts.items():
        most = stack(compiled) if key.startswith("fp8") else WIDEST_SPILLS if "widest" in key else 0
        assert fact["spills"] <= most and fact["stack"] <= most, key
        assert fact["shared"] <= CONSUMER_SHARED, key


def test_combine_resources(compiled: dict) -> None:
    for key, fact in named(compiled, "", "combine_splits_kernel").items():
        most = stack(compiled) if "float32" in key else 0
        assert fact["spills"] <= most and fact["stack"] <= most and fact["registers"] <= 168, key
