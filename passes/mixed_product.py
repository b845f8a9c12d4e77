"""mixed_product: a float32 product of two upcast 16-bit tensors -> ``dsinfra::mixed_linear`` of the tensors themselves.

Before:  linear(x.float(), w.float())             x [..., K], w [N, K] bfloat16 or float16
After:   mixed_linear(x, w)                       cuBLAS with 16-bit operands and a float32 result

Routers compute their logits so. As written, both operands are copied into twice their bytes at each call, and the
product runs outside the tensor cores. *Exact*: the product of two 16-bit numbers has at most 22 significant bits and is
a float32; it is accumulated in float32 in either form, in another order (and by tensor cores truncated, not rounded).

On CUDA only; refuses operands that anything else reads in float32 (it might write them), and a bias.
"""

from __future__ import annotations

import torch
from torch import fx

from dscompile.lowering.ops.mixed_linear import HALVES
from dscompile.passes import commits
from dscompile.passes.emit import Emitter
from dscompile.passes.graph import module_path, settle, source_line, torch_call
from dscompile.passes.record import PassRecord, Site

aten = torch.ops.aten
NAME = "mixed_product"
_CASTS = {"to", "type", "float", "_to_copy"}
_VIEWS = {"view", "reshape", "flatten"}


def run(module: fx.GraphModule) -> PassRecord:
    """Rewrites every such product in the graph and in the bodies of its higher-order operators."""
    record = PassRecord(NAME)
    for child in module.modules():
        if not isinstance(child, fx.GraphModule):
            continue
        products = [node for node in child.graph.nodes if is_product(node)]
        for node in products:
            if commits.current().permitted():
                record.sites.append(_site(node))
                _rewrite(node, record.sites[-1])
        settle([child] if products else [])
    return record


def is_product(node: fx.Node) -> bool:
    """``linear`` without a bias in float32, of two tensors that were just cast from the same 16-bit dtype."""
    if torch_call(node) != "linear" or not node.users or node.kwargs or node.args[2:] not in ((), (None,)):
        return False
    result = node.meta.get("example_value")
    if not isinstance(result, torch.Tensor) or result.dtype != torch.float32 or not _supported(result):
        return False
    x, w = (_half(operand, node) for operand in node.args[:2])
    return x is not None and x == w and node.args[1].meta["example_value"].dim() == 2  # type: ignore[union-attr]


def _supported(result: torch.Tensor) -> bool:
    return result.is_cuda


def _half(node: object, product: fx.Node) -> torch.dtype | None:
    """The 16-bit dtype that a float32 operand was cast from, if nothing reads it on the way but ``product``."""
    reader = product
    while isinstance(node, fx.Node) and set(node.users) == {reader} and torch_call(node) in _CASTS | _VIEWS:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        value = source.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.dtype in HALVES:
            return value.dtype
        reader, node = node, source
    return None


def _rewrite(product: fx.Node, site: Site) -> None:
    """The float32 operands are rounded back, which changes no bit, and Inductor drops both casts."""
    e = Emitter(product)
    x, w = product.args[:2]
    half = _half(x, product)
    x, w = (e.call(aten.to.dtype, operand, half) for operand in (x, w))
    leading = [e.size(x, i) for i in range(e.rank(x) - 1)]
    flat = x if len(leading) == 1 else e.call(aten.reshape.default, x, [-1, e.size(x, e.rank(x) - 1)])
    y = e.call(torch.ops.dsinfra.mixed_linear.default, flat, w)
    if len(leading) != 1:
        y = e.call(aten.reshape.default, y, [*leading, e.size(w, 0)])
    product.replace_all_uses_with(y)
    commits.current().add([site], [(product, y)], e.made)


def _site(node: fx.Node) -> Site:
    return Site(
        kind="product",
        module_path=module_path(node),
        source=source_line(node),
        matched=True,
        form="linear of two tensors cast to float32",
        kernel="cuBLAS with 16-bit operands and a float32 result",
        node=node.name,
    )
