"""real_rotation: a product of complex numbers that is read as real pairs -> the same product in real arithmetic.

Before:  view_as_real(view_as_complex(x) * table)               x real [..., n, 2], table complex
After:   stack([x0 * c - x1 * s, x0 * s + x1 * c], -1)          c, s = the table's real and imaginary part

Rotary embeddings are written so by DeepSeek, Llama and torchtitan. Inductor has no code for complex numbers: it calls
ATen for the product and writes x out and reads the result back around it; in real arithmetic all of it fuses into its
neighbours. *Exact*: the four products and two sums that define a complex product.

Refuses a product that is read as a complex number as well, and a result whose strides would differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import fx

from dscompile.passes import commits
from dscompile.passes.bind import expressions, packed
from dscompile.passes.emit import Emitter
from dscompile.passes.graph import module_path, settle, source_line, torch_call
from dscompile.passes.record import PassRecord, Site

aten = torch.ops.aten
NAME = "real_rotation"


def run(module: fx.GraphModule) -> PassRecord:
    """Rewrites every such product in the graph and in the bodies of its higher-order operators."""
    record = PassRecord(NAME)
    for child in module.modules():
        if not isinstance(child, fx.GraphModule):
            continue
        products = [node for node in child.graph.nodes if _is_product(node)]
        for node in products:
            site = _site(node)
            if commits.current().permitted() and _rewrite(node, site):
                record.sites.append(site)
        settle([child] if products else [])
    return record


def _is_product(node: fx.Node) -> bool:
    """A complex product, and every reader of it takes it as pairs of real numbers."""
    if torch_call(node) not in ("mul", "multiply") or len(node.args) != 2 or node.kwargs:
        return False
    values = [x.meta.get("example_value") if isinstance(x, fx.Node) else None for x in node.args]
    if not all(isinstance(v, torch.Tensor) and v.is_complex() for v in values):
        return False
    return bool(node.users) and all(torch_call(user) == "view_as_real" for user in node.users)


def _rewrite(product: fx.Node, site: Site) -> bool:
    """Replaces the pairs that are read from ``product``; leaves the graph as it was if they could not be the same."""
    e = Emitter(product)
    before = next(iter(product.users)).meta["example_value"]
    try:
        (x, y), (c, s) = (_parts(e, factor) for factor in product.args)
        real = e.call(aten.sub.Tensor, e.call(aten.mul.Tensor, x, c), e.call(aten.mul.Tensor, y, s))
        imaginary = e.call(aten.add.Tensor, e.call(aten.mul.Tensor, x, s), e.call(aten.mul.Tensor, y, c))
        pairs = _stacked(e, real, imaginary, product.meta["example_value"])
    except Exception:  # ATen refuses it, for example view_as_real of a conjugate
        e.undo()
        return False
    if _layout(pairs.meta["example_value"]) != _layout(before):
        e.undo()
        return False
    readers = [user for user in product.users if user not in e.made]
    for reader in readers:
        reader.replace_all_uses_with(pairs)
    commits.current().add([site], [(reader, pairs) for reader in readers], e.made)
    return True


def _parts(e: Emitter, node: object) -> tuple[fx.Node, fx.Node]:
    """Real and imaginary part of a factor; read where the product reads it, so that no write comes in between."""
    assert isinstance(node, fx.Node)
    if torch_call(node) == "view_as_complex":
        pairs = node.args[0]
    elif torch_call(node) == "unsqueeze" and len(node.args) == 2 and not node.kwargs:
        real, imaginary = _parts(e, node.args[0])
        return e.call(aten.unsqueeze.default, real, node.args[1]), e.call(
            aten.unsqueeze.default, imaginary, node.args[1]
        )
    else:
        pairs = e.call(aten.view_as_real.default, node)
    return e.call(aten.select.int, pairs, -1, 0), e.call(aten.select.int, pairs, -1, 1)


def _stacked(e: Emitter, real: fx.Node, imaginary: fx.Node, like: torch.Tensor) -> fx.Node:
    """[..., 2], the other dimensions in memory in the order that they have in ``like``."""
    dims = range(like.dim())
    for order in itertools.permutations(dims):  # the first is the order of the dimensions themselves
        shape = [like.shape[i] for i in order]
        if _strides(shape, expressions(like.stride(i) for i in order)) == _strides(shape, packed(shape)):
            both = [e.call(aten.permute.default, part, order) for part in (real, imaginary)]
            back = [*(order.index(i) for i in dims), like.dim()]
            return e.call(aten.permute.default, e.call(aten.stack.default, both, -1), back)
    raise ValueError("the product is no dense tensor")


def _layout(value: torch.Tensor) -> tuple[object, ...]:
    return value.dtype, value.device, expressions(value.shape), _strides(value.shape, expressions(value.stride()))


def _strides(shape: Sequence[int | torch.SymInt], strides: Sequence[object]) -> list[object]:
    """Strides, to compare; of dimensions of length 1 they mean nothing."""
    return [s for n, s in zip(expressions(shape), strides, strict=True) if n != 1]


def _site(node: fx.Node) -> Site:
    return Site(
        kind="rotation",
        module_path=module_path(node),
        source=source_line(node),
        matched=True,
        form="product of complex numbers",
        kernel="real arithmetic, which Inductor fuses with what surrounds it",
        node=node.name,
    )
