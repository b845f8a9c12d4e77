"""The tiers a test can belong to beyond plain CPU, and the form of a skip: `pytest.skip("TIER: why")`.

A skip says what was not tested here, so each names one of these; the summary counts them, and a skip without a tier
fails the run (tests/conftest.py).
"""

TIERS = {
    "gpu": "one CUDA device",
    "hopper": "a CUDA device of compute capability 9.0",
    "multi_gpu": "several CUDA devices of one host",
    "interpreter": "Triton's interpreter: TRITON_INTERPRET=1 from the start of the process",
    "compile_only": "Triton's compiler for sm_90a, without a device",
    "versions": "another version of transformers or Triton, in the folder that a DSINFRA_* variable names",
    "browser": "Chromium, and playwright to drive it",
    "packaging": "pip and setuptools, to build the package",
}


def tier_of(reason: str) -> str | None:
    """The tier that a skip's reason names, or None when it names none."""
    tier = reason.removeprefix("Skipped: ").partition(":")[0].strip()
    return tier if tier in TIERS else None
