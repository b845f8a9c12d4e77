"""Compiles the GEMM of few tokens offline, in the forms that its plans use, and prints their facts as JSON.

A script, run by test_gemm_small_compile.py in a process of its own, so that another Triton can be put on its path.
"""

import dataclasses
import json

import torch

from dscompile.kernels import launch
from dscompile.kernels.gemm_small_launch import SmallCall, launch_small
from dscompile.kernels.gemm_small_plan import FP8, SmallPlan, small_plan

BF16, FP16 = torch.bfloat16, torch.float16

# name: layout, dtype, groups, swiglu, n_major, plan
VARIANTS = {
    "bf16-8": ("ends", BF16, 64, False, False, small_plan(BF16, 8, 1, 1)),
    "bf16-16-groups": ("ends", BF16, 512, False, False, small_plan(BF16, 16, 1, 1)),
    "bf16-32": ("ends", BF16, 64, False, False, small_plan(BF16, 32, 1, 2)),
    "bf16-64": ("ends", BF16, 64, False, False, small_plan(BF16, 64, 2, 2)),
    "bf16-128": ("ends", BF16, 256, False, False, small_plan(BF16, 128, 2, 2)),
    "bf16-128-dense": ("dense", BF16, 1, False, False, small_plan(BF16, 128, 1, 1)),
    "bf16-8-swiglu": ("ends", BF16, 64, True, False, small_plan(BF16, 8, 2, 1)),
    "bf16-64-swiglu": ("ends", BF16, 64, True, False, small_plan(BF16, 64, 2, 2)),
    "bf16-128-swiglu": ("ends", BF16, 64, True, False, small_plan(BF16, 128, 2, 2)),
    "bf16-8-n-major": ("ends", BF16, 64, False, True, small_plan(BF16, 8, 1, 1)),
    "fp16-16-dense-splits": ("dense", FP16, 1, False, False, small_plan(FP16, 16, 1, 1, splits=3)),
    "fp16-32-masked": ("masked", FP16, 64, False, False, small_plan(FP16, 32, 1, 2)),
    "fp8-8-splits": ("dense", FP8, 1, False, False, small_plan(FP8, 8, 1, 1, splits=4)),
    "fp8-32-masked": ("masked", FP8, 64, False, False, small_plan(FP8, 32, 1, 1)),
    "fp8-64-ends": ("ends", FP8, 256, False, False, small_plan(FP8, 64, 1, 2)),
    "fp8-128-ends": ("ends", FP8, 256, False, False, small_plan(FP8, 128, 1, 2, depth=128)),
    "fp8-128-splits": ("dense", FP8, 1, False, False, small_plan(FP8, 128, 1, 1, splits=4)),
    "fp8-16-swiglu": ("ends", FP8, 64, True, False, small_plan(FP8, 16, 2, 1)),
    "fp8-64-swiglu": ("ends", FP8, 64, True, False, small_plan(FP8, 64, 2, 1, depth=128)),
}


def call(layout: str, dtype: torch.dtype, groups: int, swiglu: bool, n_major: bool) -> SmallCall:
    """256 columns of y, 512 of K, 64 tokens of a batch; the values don't matter."""
    rows, batches = 512 if swiglu else 256, groups if layout == "masked" else 1
    w = torch.zeros((groups, 512, rows) if n_major else (groups, rows, 512)).to(dtype)
    if n_major:
        w = w.transpose(1, 2)
    x = torch.zeros(batches, 64, 512).to(dtype)
    y = torch.zeros(batches, 64, 256, dtype=BF16 if dtype == FP8 else dtype)
    bounds = None if layout == "dense" else torch.zeros(groups, dtype=torch.int32)
    scales = (torch.zeros(batches, 4, 64), torch.zeros(groups, rows // 128, 4)) if dtype == FP8 else (None, None)
    return SmallCall(x, w, y, bounds, *scales, layout, swiglu)


def main() -> None:
    facts = {}
    for name, (layout, dtype, groups, swiglu, n_major, plan) in VARIANTS.items():
        with launch.offline() as compiled:
            launch_small(call(layout, dtype, groups, swiglu, n_major), plan)
        for kernel in compiled:
            fact = launch.read_facts(kernel)
            facts[f"{name}/{fact.name}"] = {**dataclasses.asdict(fact), "plan": _plain(plan)}
    print(json.dumps({"triton": launch.triton_version(), "facts": facts}))


def _plain(plan: SmallPlan) -> dict:
    return {**dataclasses.asdict(plan), "boxes": plan.boxes}


if __name__ == "__main__":
    main()
