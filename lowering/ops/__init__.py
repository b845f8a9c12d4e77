"""The operators of the `dsinfra` namespace; importing this package registers them with torch.

Each module holds one operator, or a few that share their arguments: schema, checks and shape function, the
plain-PyTorch reference that computes it on any device, its autograd and FLOP formulas, and the registration of its
implementations in `lowering.select`.
"""

from dscompile.lowering.ops import (
    exchange,
    experts,
    fp8_experts,
    fp8_grouped_linear,
    fp8_linear,
    grouped_linear,
    mixed_linear,
    mla,
    mla_cache,
    mla_decode,
    permute,
    placement,
    quantize,
    route,
)

__all__ = [
    "exchange",
    "experts",
    "fp8_experts",
    "fp8_grouped_linear",
    "fp8_linear",
    "grouped_linear",
    "mixed_linear",
    "mla",
    "mla_cache",
    "mla_decode",
    "permute",
    "placement",
    "quantize",
    "route",
]
