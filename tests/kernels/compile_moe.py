"""Compiles the kernels around the grouped GEMMs offline, at the widths of real models, and prints their facts as JSON.

A script, run by test_moe_compile.py in a process of its own. Beside the facts of `launch.read_facts`, it counts the
16-byte loads and stores from and to global memory and the warp-wide integer reductions in the PTX.
"""

import dataclasses
import json
import re
from collections.abc import Callable

import torch

from dscompile.kernels import launch, moe, quantize
from dscompile.kernels.activation import gated_activation
from dscompile.kernels.route import route

E = 256


def calls() -> dict[str, Callable[[], object]]:
    """name: a call that compiles one or several kernels; the values don't matter."""
    few, many = torch.zeros(128, 8, dtype=torch.int64), torch.zeros(4096, 8, dtype=torch.int32)
    x = torch.zeros(128, 7168, dtype=torch.bfloat16)
    rows = torch.zeros(32768, 7168, dtype=torch.bfloat16)
    order, position = torch.zeros(32768, dtype=torch.int32), many
    logits, bias = torch.zeros(128, E), torch.zeros(E)
    ends = torch.zeros(E, dtype=torch.int32)
    return {
        "plan-few": lambda: moe.plan(few, E),
        "plan-many": lambda: moe.plan(many, 512),
        "plan-most": lambda: moe.plan(torch.zeros(1 << 18, 8, dtype=torch.int32), E),
        "plan-gather": lambda: moe.plan_and_gather(x, few, E),
        "plan-quantize": lambda: moe.plan_and_gather_quantize(x, few, E),
        "gather-position": lambda: moe.gather_rows(rows[:4096], order, 8, position),
        "gather-order": lambda: moe.gather_rows(rows[:4096], order, 8),
        "combine": lambda: moe.combine(rows, position, torch.zeros(4096, 8), many, E),
        "quantize-few": lambda: quantize.quantize_1x128(x),
        "quantize-many": lambda: quantize.quantize_1x128(rows),
        "quantize-silu": lambda: quantize.silu_mul_quantize_1x128(rows, ends),
        "quantize-position": lambda: quantize.gather_quantize_1x128(rows[:4096], order, 8, position),
        "quantize-order": lambda: quantize.gather_quantize_1x128(rows[:4096], order, 8),
        "combine-bias": lambda: moe.combine(rows, position, None, many, E, None, torch.zeros(E, 7168)),
        "activation": lambda: gated_activation(rows, ends, rows[:E], activation="swiglu_oai", interleaved=True),
        "activation-gelu": lambda: gated_activation(rows, activation="gelu"),
        "route-sigmoid-groups": lambda: route(logits, bias, 8, "sigmoid", 8, 4, "top2", True, 1e-20, 2.5),
        "route-softmax": lambda: route(logits.bfloat16(), None, 8, "softmax"),
        "route-softmax_topk": lambda: route(logits[:, :32].contiguous(), None, 4, "softmax_topk"),
        "route-most": lambda: route(torch.zeros(9, 512), None, 32, "softmax"),
    }


def main() -> None:
    facts = {}
    for name, call in calls().items():
        with launch.offline() as compiled:
            call()
        for kernel in compiled:
            fact = dataclasses.asdict(launch.read_facts(kernel))
            ptx = kernel.asm["ptx"]
            fact["wide_loads"] = len(re.findall(r"ld\.global\S*\.v4\.b32", ptx))
            fact["wide_stores"] = len(re.findall(r"st\.global\S*\.v4\.b32", ptx))
            fact["warp_reductions"] = len(re.findall(r"redux\.sync", ptx))
            facts[f"{name}/{fact['name']}"] = fact
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
