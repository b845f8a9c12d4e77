"""Masks: each written form is classified, and nothing is called causal that is not."""

from __future__ import annotations

import pytest
import torch

from dscompile.passes import masks
from dscompile.passes.facts import Evaluate
from dscompile.passes.graph import assignments
from dscompile.passes.refusals import SlidingWindow
from tests.passes.tools import output_of, shadow_of

S, T = 5, 9


def positions(s=S, t=T):
    return torch.arange(s)[:, None] + t - s, torch.arange(t)[None, :]


def causal():
    q, k = positions()
    return k <= q


def packed_that_is_not():
    ids = torch.arange(T)[None].expand(2, -1)
    breaks = torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1
    segment = breaks.cumsum(-1)
    q, k = torch.arange(T)[:, None], torch.arange(T)[None, :]
    batch = torch.arange(2)[:, None, None]
    return ((segment[batch, q] == segment[batch, k]) & (k <= q))[:, None]


def documents():
    segment = (torch.arange(T) >= 4).cumsum(0)
    q, k = torch.arange(T)[:, None], torch.arange(T)[None, :]
    return (segment[q] == segment[k]) & (k <= q)


def filled_in_place():
    mask = torch.zeros(S, T)
    mask.masked_fill_(~causal(), float("-inf"))  # the result is not used: the tensor is
    return mask


def bounded_in_place():
    mask = causal()
    mask[1:3, 2:4] = False
    return mask


CONSTANT = {
    "compare": (causal, S, T, "causal"),
    "tril": (lambda: torch.ones(T, T, dtype=torch.bool).tril(), T, T, "causal"),
    "triu_inf": (lambda: torch.full((T, T), float("-inf")).triu(1), T, T, "causal"),
    "triu_in_place": (lambda: torch.full((T, T), float("-inf")).triu_(1), T, T, "causal"),
    "filled_in_place": (filled_in_place, S, T, "causal"),
    "bounded_in_place": (bounded_in_place, S, T, "operand"),
    "where": (lambda: torch.where(causal(), 0.0, torch.finfo(torch.float32).min), S, T, "causal"),
    "masked_fill": (lambda: torch.zeros(S, T).masked_fill(~causal(), float("-inf")), S, T, "causal"),
    "numbers": (lambda: (1.0 - causal().float()) * torch.finfo(torch.float32).min, S, T, "causal"),
    "expanded": (lambda: causal()[None, None].expand(2, 1, S, T), S, T, "causal"),
    "not_packed": (packed_that_is_not, T, T, "causal"),
    "full": (lambda: torch.ones(S, T, dtype=torch.bool), S, T, "full"),
    "or": (lambda: causal() | (torch.arange(T) >= 0), S, T, "full"),
    "one_row": (lambda: torch.arange(T)[None, :] <= T - 1, 1, T, "full"),
    "strict": (lambda: positions()[1] < positions()[0], S, T, "operand"),
    "top_left": (lambda: torch.arange(T)[None, :] <= torch.arange(S)[:, None], S, T, "operand"),
    "documents": (documents, T, T, "operand"),
    "bias": (lambda: torch.where(causal(), -0.5, float("-inf")), S, T, "operand"),
    "soft": (lambda: torch.where(causal(), 0.0, -50.0), S, T, "operand"),
    "one_hole": (lambda: causal() & ~((positions()[0] == 6) & (positions()[1] == 2)), S, T, "operand"),
}


def classify(fn, args, s, t):
    shadow = shadow_of(lambda *a: fn(*a).clone(), *args)
    node, memory, time = output_of(shadow)
    return masks.classify(Evaluate(memory, assignments(shadow.graph)[0]), node, s, t, time)


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_masks(name):
    fn, s, t, expected = CONSTANT[name]
    assert classify(lambda x: fn(), (torch.ones(1),), s, t).kind == expected


def test_sliding_window_is_refused_by_name():
    def window():
        q, k = positions(T, T)
        return (k <= q) & (k > q - 3)

    with pytest.raises(SlidingWindow, match="3 keys"):
        classify(lambda x: window(), (torch.ones(1),), T, T)


def test_static_cache_length_is_a_prefix():
    def mask(length):
        return (torch.arange(T)[None] <= torch.arange(1)[:, None] + length)[None, None].expand(2, 1, 1, T)

    found = classify(mask, (torch.tensor(3),), 1, T)
    assert found.kind == "length" and found.same_for_all


def test_lengths_of_their_own():
    """One unknown for each request, or two lengths of one unknown: prefixes all the same, but not one."""

    def own(lengths):
        return torch.arange(T)[None, None, None] < lengths[:, None, None, None]

    def shifted(length):
        return torch.arange(T)[None, None, None] < (length + torch.arange(2))[:, None, None, None]

    for mask, given in ((own, torch.tensor([3, 4])), (shifted, torch.tensor(3))):
        found = classify(mask, (given,), 1, T)
        assert found.kind == "length" and not found.same_for_all


def test_static_cache_length_with_positions_that_cancel():
    def mask(length):
        position = torch.arange(1)[None] + length
        breaks = torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1
        same = breaks.cumsum(-1)[:, :, None] == 0
        return same & (torch.arange(T)[None, None] <= position[:, :, None])

    assert classify(mask, (torch.tensor(3),), 1, T).kind == "length"


@pytest.mark.parametrize(
    "name, mask",
    {
        "several_rows": lambda n: torch.arange(T)[None] <= torch.arange(S)[:, None] + n,
        "suffix": lambda n: torch.arange(T)[None] >= n,
        "two_lengths": lambda n: (torch.arange(T)[None] <= n) & (torch.arange(T)[None] <= n * 2),
        "one_position": lambda n: torch.arange(T)[None] == n,
        "data": lambda n: torch.arange(T)[None] + 0.5 <= n.float().sin(),
    }.items(),
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_other_uses_of_a_length_stay_operands(name, mask):
    rows = S if name == "several_rows" else 1
    assert classify(mask, (torch.tensor(3),), rows, T).kind == "operand"


def test_padding_is_an_operand():
    mask = classify(lambda pad: causal()[None] & pad[:, None, :].bool(), (torch.ones(2, T, dtype=torch.int64),), S, T)
    assert mask.kind == "operand" and mask.why
