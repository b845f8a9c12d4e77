"""Ids of experts that no product computes: which they are, and how a layer keeps its products from them.

Such ids are at or past the number E of experts with weights: experts that return their tokens (LongCat's), or rows of
another rank. A batched product reads a weight for every id, so that models give it another number there and take out
what it computes: by a mask over its results, or by weights that are zero. The operator adds nothing for an id at or
past E, and computes nothing: it is given the ids from before.
"""

from __future__ import annotations

from torch import fx

from dscompile.passes.experts_meanings import Outside, Within
from dscompile.passes.experts_values import Indices, arg, bounds, name
from dscompile.passes.graph import is_tensor


def routed_ids(
    indices: Indices, source: fx.Node, experts: int, returned: Outside | None, masks: list[Outside]
) -> fx.Node | None:
    """The ids of which those at or past E have no product; None if nothing says so of any.

    Args:
        indices: reads them.
        source: the ids of the products, [T, K] in flat order.
        experts: E, how many of them have weights.
        returned: which ids the results are replaced for, by their tokens.
        masks: which ids results, or routing weights, are zero for.
    """
    before = unmapped(indices, source, experts)
    if returned is not None:
        own = returned.source
        agree = returned.groups == experts and own in (source, before)
        return own if agree and (own is source or indices.natural(own)) else None
    zeroed = any((mask.source, mask.groups) == (before, experts) for mask in masks)
    return before if before is not None and zeroed and indices.natural(before) else None


def unmapped(indices: Indices, source: fx.Node, experts: int) -> fx.Node | None:
    """The ids that ``source`` holds where they are below E, those at or past it having got another number.

    ``ids.clamp(max=E - 1)``, ``ids.masked_fill(ids >= E, 0)`` or ``where(ids >= E, 0, ids)``; else None.
    """
    kind, at = name(source), indices.memory.position[source]
    if kind in ("clamp", "clamp_max"):
        low, most = bounds(source)
        return _flat(indices, arg(source, 0), at) if most == experts - 1 and low in (None, 0) else None
    if kind == "masked_fill":
        condition, kept = arg(source, 1), arg(source, 0)
    elif kind == "where" and len(source.args) == 3:
        condition = arg(source, 0)
        kept = arg(source, 2 if isinstance(indices.read(condition, at), Outside) else 1)
    else:
        return None
    mask = indices.read(condition, at)
    turned = isinstance(mask, Outside) or kind == "where" and isinstance(mask, Within)
    if not turned or (mask.groups, mask.order) != (experts, None) or not is_tensor(kept):
        return None
    shapes = {indices.shape(node) for node in (condition, kept, source)}
    return mask.source if len(shapes) == 1 and _flat(indices, kept, at) is mask.source else None


def by_row(indices: Indices, mask: fx.Node, found: Outside | Within, values: fx.Node) -> bool:
    """Whether a mask that was read as ``found`` meets each row of ``values``, not their columns."""
    own, whole, rows = indices.shape(mask), indices.shape(values), indices.count(found.source)
    lead = 1 if own[:1] == (rows,) else 2
    if len(own) != len(whole) or own[:lead] != whole[:lead]:
        return False
    if lead == 2 and tuple(t * k for t, k in zip(*own[:2], strict=True)) != rows:
        return False
    return indices.repeats(mask) or all(set(size) == {1} for size in own[lead:])


def _flat(indices: Indices, node: fx.Node, at: int) -> fx.Node | None:
    """The ids that ``node`` holds in flat order, all of them."""
    found = indices.ids(node, at)
    return found.source if found is not None and found.order is None and found.most is None else None
