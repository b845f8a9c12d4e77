"""Compiles every specialisation of the MLA decode kernels offline and prints their facts as JSON, one entry a kernel.

A script, run by test_mla_decode_compile.py in a process of its own, so that another Triton can be put on its path.
"""

import dataclasses
import json

import torch

from dscompile.kernels import launch, mla_cache
from dscompile.kernels.mla_decode import mla_decode

# name: implementation, capability, dtype, paged, masked, splits (None: dealt by lengths); "fp8" in it: a float8 cache;
# other widths of latent and rope behind them
VARIANTS = {
    "gluon-paged": ("gluon", (9, 0), torch.bfloat16, True, False, None),
    "gluon-paged-mask": ("gluon", (9, 0), torch.bfloat16, True, True, 1),
    "gluon-paged-splits": ("gluon", (9, 0), torch.bfloat16, True, False, 32),
    "gluon-paged-float16": ("gluon", (9, 0), torch.float16, True, False, None),
    "gluon-plain": ("gluon", (9, 0), torch.bfloat16, False, False, 1),
    "gluon-plain-mask": ("gluon", (9, 0), torch.bfloat16, False, True, None),
    "gluon-plain-mask-splits": ("gluon", (9, 0), torch.float16, False, True, 3),
    "fp8-triton": ("triton", (9, 0), torch.bfloat16, True, False, None),
    "triton-hopper": ("triton", (9, 0), torch.bfloat16, False, True, 2),
    "triton-ampere": ("triton", (8, 0), torch.bfloat16, True, False, None),
    "triton-consumer": ("triton", (8, 6), torch.float16, True, True, 2),
    "triton-consumer-float32": ("triton", (8, 6), torch.float32, False, False, 2),
    "triton-consumer-320": ("triton", (8, 6), torch.bfloat16, True, False, None, 320, 32),
    "triton-widest": ("triton", (8, 6), torch.bfloat16, False, False, 2, 1024, 64),
}


def arguments(
    dtype: torch.dtype, paged: bool, masked: bool, fp8: bool = False, latent: int = 512, rope: int = 64
) -> tuple:
    """A call of three queries and 16 heads over 200 keys a request, or four pages; the values don't matter."""
    q_latent, q_rope = (torch.zeros(2, 3, 16, width, dtype=dtype) for width in (latent, rope))
    cache = torch.zeros(*((8, 64) if paged else (2, 200)), latent + rope, dtype=dtype)
    table = torch.zeros(2, 4, dtype=torch.int32) if paged else None
    mask = torch.ones(1, 3, 256 if paged else 200, dtype=torch.bool) if masked else None
    seqlens = torch.zeros(2, dtype=torch.int32)
    if fp8:
        pool = torch.zeros(*cache.shape[:2], 656, dtype=torch.uint8)
        latent, k_rope, scales = mla_cache.views(pool, 512, 64, dtype)
        return q_latent, q_rope, latent, k_rope, seqlens, mask, table, 0.1, True, scales
    return q_latent, q_rope, cache[..., :latent], cache[..., latent:], seqlens, mask, table, 0.1, True


def main() -> None:
    facts = {}
    for name, (impl, capability, dtype, paged, masked, splits, *widths) in VARIANTS.items():
        with launch.offline(capability) as compiled:
            mla_decode(*arguments(dtype, paged, masked, "fp8" in name, *widths), impl=impl, splits=splits)
        for kernel in compiled:
            fact = launch.read_facts(kernel)
            facts[f"{name}/{fact.name}"] = dataclasses.asdict(fact)
    print(json.dumps({"triton": launch.triton_version(), "facts": facts}))


if __name__ == "__main__":
    main()
