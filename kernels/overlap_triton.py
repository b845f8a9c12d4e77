"""The device side of overlap.py, in plain Triton."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """The first statement of a kernel that takes OVERLAP. Nothing that another kernel wrote may be read before it."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
