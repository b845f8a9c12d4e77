"""Coordinate pull-back: data movement of every kind must lead back to the element that PyTorch itself reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dscompile.passes.graph import assignments
from dscompile.passes.prove import Pull, unravel
from dscompile.passes.refusals import MutatedOperand
from tests.passes.tools import output_of, shadow_of


def fills(x):
    y = x.new_empty(2, 4, 9)
    y[..., :6].copy_(x)
    y[..., 6:].copy_(x[..., :1].expand(-1, -1, 3))
    return y.transpose(1, 2)


def overwritten(x):
    y = x.new_empty(2, 4, 6)
    y.copy_(x)
    y[:, 1] = x[:, 2]
    return y.clone()


MOVES = {
    "view": lambda x: x.view(8, 6),
    "transpose": lambda x: x.transpose(0, 2),
    "permute": lambda x: x.permute(2, 0, 1).contiguous(),
    "slice": lambda x: x[:, 1:, ::2],
    "negative_slice": lambda x: x[:, -2:],
    "select": lambda x: x[:, -1],
    "split": lambda x: torch.split(x, [2, 4], -1)[1],
    "split_equal": lambda x: torch.split(x, 4, -1)[1],
    "chunk": lambda x: x.chunk(4, -1)[2],
    "tensor_split": lambda x: x.tensor_split((2, -1), -1)[2],
    "tensor_split_parts": lambda x: torch.cat([x.tensor_split(4, -1)[i] for i in (3, 1)], -1),
    "unbind": lambda x: x.unbind(1)[3],
    "cat": lambda x: torch.cat([x[..., 4:], x, x[..., :1]], -1),
    "cat_of_one": lambda x: torch.cat([x.unsqueeze(1), x.unsqueeze(1)[:, 1:]], 1).view(2, 4, 6),
    "stack": lambda x: torch.stack([x, x], 1)[:, 0],
    "expand": lambda x: x[:, :1].expand(2, 5, 6),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "flatten": lambda x: x.flatten(1).unflatten(1, (3, 8)),
    "squeeze": lambda x: x[:1].squeeze(0).unsqueeze(-1),
    "fills": fills,
    "overwritten": overwritten,
    "rotate_half": lambda x: torch.cat([x[..., 3:], x[..., :3]], -1).reshape(2, 4, 2, 3).transpose(-1, -2),
}


def pulled(fn, x, dynamic=None):
    """(values read through the pull-back, values computed) at every element of the result."""
    shadow = shadow_of(fn, x, dynamic=dynamic)
    node, memory, time = output_of(shadow)
    expected = fn(x).reshape(-1)
    sizes = assignments(shadow.graph)[0]
    pull = Pull(memory, sizes)
    coords = unravel(np.arange(expected.numel()), tuple(fn(x).shape))
    read = torch.full_like(expected, torch.nan)
    for end in pull.walk(pull.points(node, coords, time)):
        assert end.node.op == "placeholder"
        read[torch.from_numpy(end.index)] = x[tuple(torch.from_numpy(c.copy()) for c in end.coords)]
    return read, expected


@pytest.mark.parametrize("name", MOVES)
def test_pull_back_reads_what_torch_reads(name):
    read, expected = pulled(MOVES[name], torch.randn(2, 4, 6))
    assert torch.equal(read, expected)


def test_a_computing_operator_ends_the_walk():
    shadow = shadow_of(lambda x: (x * 2).transpose(0, 1), torch.randn(3, 4))
    node, memory, time = output_of(shadow)
    (end,) = (pull := Pull(memory, assignments(shadow.graph)[0])).walk(
        pull.points(node, unravel(np.arange(12), (4, 3)), time)
    )
    assert end.node.target is torch.ops.aten.mul.Tensor


def test_an_unfilled_part_is_not_read_through():
    def partly(x):
        y = x.new_empty(2, 4, 6)
        y[..., :3].copy_(x[..., :3])
        return y.clone()

    shadow = shadow_of(partly, torch.randn(2, 4, 6))
    node, memory, time = output_of(shadow)
    pull = Pull(memory, assignments(shadow.graph)[0])
    with pytest.raises(MutatedOperand, match="nothing was copied into"):
        pull.walk(pull.points(node, unravel(np.arange(48), (2, 4, 6)), time))


def test_a_result_changed_in_place_is_not_taken_for_what_it_was():
    def scaled(x):
        y = x @ x.t()
        y.mul_(2)
        return y.transpose(0, 1).clone()

    shadow = shadow_of(scaled, torch.randn(3, 3))
    node, memory, time = output_of(shadow)
    pull = Pull(memory, assignments(shadow.graph)[0])
    with pytest.raises(MutatedOperand, match="changed in place"):
        pull.walk(pull.points(node, unravel(np.arange(9), (3, 3)), time))


def test_a_cast_that_may_alias_an_overwritten_tensor_is_refused():
    def ambiguous(x):
        y = x.to(torch.float32)  # aliases x for float32 input
        x.add_(1)
        return y.transpose(0, 1)

    shadow = shadow_of(ambiguous, torch.randn(3, 4))
    node, memory, time = output_of(shadow)
    pull = Pull(memory, assignments(shadow.graph)[0])
    with pytest.raises(MutatedOperand):
        pull.walk(pull.points(node, unravel(np.arange(12), (4, 3)), time))


def test_versions_count_writes():
    def update(cache, new):
        before = cache.clone()
        cache.index_copy_(0, torch.tensor([1]), new)
        return before + cache

    shadow = shadow_of(update, torch.randn(3, 4), torch.randn(1, 4))
    _, memory, time = output_of(shadow)
    cache = next(n for n in shadow.graph.nodes if n.op == "placeholder" and memory.writes.get(n))
    (write,) = memory.writes[cache]
    assert memory.version(cache, write.position) == 0
    assert memory.version(cache, write.position + 1) == 1
    assert not memory.unchanged(cache, 0, time)
