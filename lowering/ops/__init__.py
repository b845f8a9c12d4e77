"""The operators of the `dsinfra` namespace; importing this package registers them with torch.

Each module holds one operator: its schema, checks and shape function, the plain-PyTorch reference that computes it on
any device, its autograd and FLOP formulas, and the registration of its implementations in `lowering.select`.
"""

from dscompile.lowering.ops import mla, mla_decode

__all__ = ["mla", "mla_decode"]
