"""real_rotation: a product of complex numbers that is read as real pairs -> the same product in real arithmetic.

Before:  view_as_real(view_as_complex(x) * table)               x real [..., n, 2], table complex
After:   x * c + x.flip(-1) * s * [-1, 1]                       c, s = the table's real and imaginary part

Rotary embeddings are written so by DeepSeek, Llama and torchtitan. Inductor has no code for complex numbers: it calls
ATen for the product and writes x out and reads the result back around it; in real arithmetic all of it fuses into its
neighbours: one formula for both parts, for two that are stacked would each be computed for every element that they
are joined with. *Exact*: the four products and two sums that define a complex product; a - b is a + b * -1.

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
        x, table = (_pairs(e, factor) for factor in product.args)
        c, s = (e.call(aten.slice.Tensor, table, -1, part, part + 1) for part in (0, 1))
        real = x.meta["example_value"]
        sign = e.call(aten.arange.start_step, -1, 2, 2, dtype=real.dtype, device=real.device)
        crossed = e.call(aten.mul.Tensor, e.call(aten.mul.Tensor, e.call(aten.flip.default, x, [-1]), s), sign)
        turned = e.call(aten.add.Tensor, e.call(aten.mul.Tensor, x, c), crossed)
        pairs = _laid_out(e, turned, product.meta["example_value"])
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


def _pairs(e: Emitter, node: object) -> fx.Node:
    """A factor as pairs [..., 2]; read where the product reads it, so that no write comes in between."""
    assert isinstance(node, fx.Node)
    if torch_call(node) == "view_as_complex":
        pairs = node.args[0]
        assert isinstance(pairs, fx.Node)
        # Its last size may be a symbol that is known to be 2: here the number takes its place.
        return e.call(aten.expand.default, pairs, [-1] * (pairs.meta["example_value"].dim() - 1) + [2])
    if torch_call(node) == "unsqueeze" and len(node.args) == 2 and isinstance(node.args[1], int) and not node.kwargs:
        place = node.args[1]
        return e.call(aten.unsqueeze.default, _pairs(e, node.args[0]), place if place >= 0 else place - 1)
    return e.call(aten.view_as_real.default, node)


def _laid_out(e: Emitter, pairs: fx.Node, like: torch.Tensor) -> fx.Node:
    """[..., 2], the other dimensions in memory in the order that they have in ``like``."""
    dims = range(like.dim())
    for order in itertools.permutations(dims):  # the first is the order of the dimensions themselves
        shape = [like.shape[i] for i in order]
        if _strides(shape, expressions(like.stride(i) for i in order)) == _strides(shape, packed(shape)):
            dense = e.call(aten.contiguous.default, e.call(aten.permute.default, pairs, [*order, like.dim()]))
            return e.call(aten.permute.default, dense, [*(order.index(i) for i in dims), like.dim()])
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
