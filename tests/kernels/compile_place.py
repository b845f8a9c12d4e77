"""Compiles the kernels of placed experts offline, at the sizes of real deployments, and prints their facts as JSON.

A script, run by test_place_compile.py in a process of its own.
"""

import dataclasses
import json
import re

import torch

from dscompile.kernels import launch, place
from tests.kernels.place_cases import CASES


def main() -> None:
    facts = {}
    case = CASES[1]
    counter = torch.zeros(case.experts, dtype=torch.int64)
    for tokens in (128, 4096):
        for policy in place.POLICIES:
            ids = case.ids(tokens, torch.int64)
            with launch.offline() as compiled:
                place.place(ids, *case.maps(), case.slots, case.ranks, policy, counter)
            for kernel in compiled:
                fact = dataclasses.asdict(launch.read_facts(kernel))
                ptx = kernel.asm["ptx"]
                fact["atomics"] = len(re.findall(r"\b(?:red|atom)\.(?!shared)", ptx))
                fact["floats"] = ".f32" in ptx
                facts[f"{policy}-{tokens}/{fact['name']}"] = fact
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
