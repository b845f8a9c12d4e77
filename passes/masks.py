"""What a mask lets a query see, proved element by element.

A boolean or additive mask over (query i, key j) is one of

- ``full``: every key; ``causal``: ``j <= i + T - S`` (bottom-right aligned);
- ``length``: one query row whose visible keys are a prefix, its length known only to the device (a static cache);
- ``operand``: anything that could not be shown, handed to the kernel as it is.

A constant sliding window is refused by name. All elements are evaluated; above ``ELEMENT_LIMIT`` elements only the
first, second and last request of the batch are, each whole. *Exact*: only a proved mask is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from dscompile.passes.facts import HIGH, LOW, Evaluate, Flag, Number, Pick, Truth, Unknown, Value, complement
from dscompile.passes.prove import Array
from dscompile.passes.refusals import Refusal, SlidingWindow

ELEMENT_LIMIT = 1 << 26
HIDDEN = -1.0e4  # an additive mask at or below this hides the key in float16 and wider


@dataclass(frozen=True)
class Mask:
    """``kind`` as above; ``node`` is the mask where it has to be kept or counted; ``why`` says why it is kept.

    ``same_for_all``: of the kind ``length``, every request of the batch is proved to have one and the same.
    """

    kind: str
    node: fx.Node | None = None
    boolean: bool = True
    why: str = ""
    same_for_all: bool = False


def classify(
    evaluate: Evaluate,
    node: fx.Node,
    queries: int,
    keys: int,
    time: int,
    *,
    labels: str = "bhst",
    inverted: bool = False,
) -> Mask:
    """Kind of the mask ``node``, broadcastable to scores with these ``labels``; ``inverted`` if True hides."""
    boolean = node.meta["val"].dtype == torch.bool
    try:
        kind, same = _kind(evaluate, node, (queries, keys), time, labels, inverted)
        return Mask(kind, node, boolean, same_for_all=same)
    except Unknown as why:
        return Mask("operand", node, boolean, str(why))
    except SlidingWindow:
        raise
    except Refusal as why:
        return Mask("operand", node, boolean, why.found)


def _kind(
    evaluate: Evaluate, node: fx.Node, plane: tuple[int, int], time: int, labels: str, inverted: bool
) -> tuple[str, bool]:
    """-> the kind of all planes, and whether they are one ``length``, every plane having been looked at."""
    shape = evaluate.sizes.shape(node)
    if len(shape) > len(labels):
        raise Unknown(f"it has {len(shape)} dimensions")
    labels = labels[len(labels) - len(shape) :]
    lead = {c: n for c, n in zip(labels, shape, strict=True) if c not in "st"}
    planes = int(np.prod(list(lead.values()), dtype=np.int64))
    per_plane = int(np.prod(shape, dtype=np.int64)) // max(planes, 1)
    chosen = np.arange(planes)
    if planes * per_plane > ELEMENT_LIMIT:
        chosen = np.unique([0, min(1, planes - 1), planes - 1])
        if len(chosen) * per_plane > ELEMENT_LIMIT:
            raise Unknown(f"{plane[0]} x {plane[1]} elements are too many to prove")
    kinds = set()
    for one in chosen:
        fixed = dict(zip(lead, np.unravel_index(one, tuple(lead.values())), strict=True)) if lead else {}
        kinds.add(_plane(evaluate, node, labels, fixed, plane, time, inverted))
    names = {kind for kind, _ in kinds}
    if len(names) != 1:
        raise Unknown("it differs between requests or heads")
    return names.pop(), len(kinds) == 1 and len(chosen) == planes


def _plane(
    evaluate: Evaluate, node: fx.Node, labels: str, fixed: dict, plane: tuple[int, int], time: int, inverted: bool
) -> tuple[str, bytes]:
    """Kind of one [S, T] plane of the mask, and what its length is, if that is its kind: bounds of one unknown."""
    shape = dict(zip(labels, evaluate.sizes.shape(node), strict=True))
    rows, cols = shape.get("s", 1), shape.get("t", 1)
    at = {"s": np.arange(rows)[:, None], "t": np.arange(cols)[None, :]}
    at |= {c: np.full((1, 1), x) for c, x in fixed.items()}
    seen = _visible(evaluate.at(node, tuple(at[c] for c in labels), (rows, cols), time), inverted)
    if isinstance(seen, Truth) and seen.constant.all():
        seen = Flag(seen.always)
    if isinstance(seen, Flag):
        return _constant_kind(np.broadcast_to(seen.value, plane), *plane), b""
    low, high, ident = (np.broadcast_to(x, plane)[0] for x in (seen.low, seen.high, seen.ident))
    if plane[0] == 1 and _is_prefix(low, high, ident):
        return "length", b"".join(np.ascontiguousarray(x).tobytes() for x in (low, high, ident))
    raise Unknown("it depends on a length or position that only the device knows")


def _visible(value: Value, inverted: bool) -> Truth | Flag:
    """Which elements let the key be seen."""
    if isinstance(value, Pick):
        if _shown(value.yes).all() and not _shown(value.no).any():
            return value.cond
        raise Unknown("an additive mask with several levels")
    if isinstance(value, (Truth, Flag)):
        return complement(value) if inverted else value
    if isinstance(value, Number) and value.known:
        shown = _shown(value.const)
        return Flag(~shown if inverted else shown)
    raise Unknown("an additive mask that depends on an input")


def _shown(added: Array) -> Array:
    if not ((added == 0) | (added <= HIDDEN)).all():
        raise Unknown("an additive mask with a finite bias")
    return added == 0


def _constant_kind(seen: Array, queries: int, keys: int) -> str:
    if seen.all():
        return "full"
    distance = np.arange(keys)[None, :] - (np.arange(queries)[:, None] + keys - queries)
    if (seen == (distance <= 0)).all():
        return "causal"
    width = int(seen[-1].sum())
    if (seen == ((distance <= 0) & (distance > -width))).all():
        raise SlidingWindow(f"the mask is a sliding window of {width} keys")
    raise Unknown("it is constant, but neither full nor causal")


def _is_prefix(low: Array, high: Array, ident: Array) -> bool:
    """True if {j : low_j <= x < high_j} is a prefix for every x: bounds only tighten with j, one unknown."""
    named = ident[(low > LOW) | (high < HIGH)]
    return bool((np.diff(low) >= 0).all() and (np.diff(high) <= 0).all() and (named == named[0]).all())
