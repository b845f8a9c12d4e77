"""Compiles specialisations of the GEMM kernels offline and prints their facts as JSON, one entry a kernel.

A script, run by test_gemm_compile.py in a process of its own, so that another Triton can be put on its path.
"""

import dataclasses
import json

import torch

from dscompile.kernels import launch
from dscompile.kernels.gemm_plan import gluon_plan, triton_plan
from tests.kernels.gemm_cases import FP8, Case, make

BF16, FP16 = torch.bfloat16, torch.float16
BASE = Case((3, 200, 0, 9), n=256, k=256)
DENSE = Case((300,), n=256, k=256, layout="dense")

# name: capability, case, bm, bn; "triton" chooses its tiles itself
GLUON = {
    "bf16-128x256": (BASE, 128, 256),
    "bf16-128x128": (BASE, 128, 128),
    "bf16-64x256": (BASE, 64, 256),
    "bf16-64x128": (BASE, 64, 128),
    "bf16-128x256-dense": (DENSE, 128, 256),
    "bf16-128x256-masked": (BASE.with_(layout="masked"), 128, 256),
    "bf16-128x256-swiglu": (BASE.with_(swiglu=True), 128, 256),
    "bf16-64x256-swiglu": (BASE.with_(swiglu=True), 64, 256),
    "bf16-128x256-kn": (BASE.with_(kn=True), 128, 256),
    "bf16-128x256-kn-swiglu": (BASE.with_(kn=True, swiglu=True), 128, 256),
    "fp16-128x256": (BASE.with_(dtype=FP16), 128, 256),
    "fp8-128x256": (BASE.with_(dtype=FP8), 128, 256),
    "fp8-128x128": (BASE.with_(dtype=FP8), 128, 128),
    "fp8-64x128": (BASE.with_(dtype=FP8), 64, 128),
    "fp8-64x256": (BASE.with_(dtype=FP8), 64, 256),
    "fp8-128x256-dense": (DENSE.with_(dtype=FP8), 128, 256),
    "fp8-128x128-dense": (DENSE.with_(dtype=FP8), 128, 128),
    "fp8-128x256-masked": (BASE.with_(dtype=FP8, layout="masked"), 128, 256),
}
TRITON = {
    "hopper-bf16": ((9, 0), BASE),
    "hopper-fp8": ((9, 0), BASE.with_(dtype=FP8)),
    "ampere-bf16-swiglu": ((8, 0), BASE.with_(swiglu=True)),
    "ada-fp8-masked": ((8, 9), BASE.with_(dtype=FP8, layout="masked")),
    "consumer-fp16-dense": ((8, 6), DENSE.with_(dtype=FP16)),
    "consumer-fp32": ((8, 6), BASE.with_(dtype=torch.float32)),
}


def main() -> None:
    facts = {}
    for name, (case, bm, bn) in GLUON.items():
        with launch.offline() as compiled:
            make(case, "cpu").run(gluon_plan(bm, bn, case.dtype))
        facts[f"gluon-{name}"] = dataclasses.asdict(launch.read_facts(*compiled))
    for name, (capability, case) in TRITON.items():
        with launch.offline(capability) as compiled:
            make(case, "cpu").run(triton_plan(sum(case.sizes), case.n, case.dtype, case.swiglu))
        facts[f"triton-{name}"] = dataclasses.asdict(launch.read_facts(*compiled))
    print(json.dumps({"triton": launch.triton_version(), "facts": facts}))


if __name__ == "__main__":
    main()
