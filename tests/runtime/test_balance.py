"""The three balancers and the simulation that they are tried in."""

from __future__ import annotations

import random

import pytest
import torch

from dscompile.runtime import balance, simulate
from dscompile.runtime.balance import Running
from dscompile.runtime.eplb import PlacementError


def test_prefill_balances_tokens_and_attention() -> None:
    draw = random.Random(0)
    lengths = [int(1000 * draw.lognormvariate(0, 1)) + 1 for _ in range(64)]
    found = balance.prefill(lengths, 4)
    assert sorted(r for i in found for r in i.requests) == list(range(64))
    assert sum(i.tokens for i in found) == sum(lengths)
    pairs = [n * (n + 1) / 2 for n in lengths]
    combined = [i.tokens / sum(lengths) + i.attention / sum(pairs) for i in found]
    in_turn = [sum(lengths[g::4]) / sum(lengths) + sum(pairs[g::4]) / sum(pairs) for g in range(4)]
    assert balance.balance(combined) > max(0.97, balance.balance(in_turn) + 0.1)


def test_what_is_cached_costs_no_tokens_but_attention() -> None:
    (one,) = balance.prefill([10], 1, cached=[6])
    assert one.tokens == 4
    assert one.attention == 7 + 8 + 9 + 10  # keys that the four new queries see


def test_all_tokens_or_all_attention() -> None:
    """One long prompt equals many short ones in tokens or in attention, as it is asked."""
    lengths = [64, *[8] * 8]
    assert balance.balance([i.tokens for i in balance.prefill(lengths, 2, attention_weight=0.0)]) == 1.0
    by_attention = balance.prefill(lengths, 2, attention_weight=1.0)
    assert {len(i.requests) for i in by_attention} == {1, 8}


def test_decode_fills_what_runs_and_respects_capacity() -> None:
    running = [Running(4, 4000), Running(1, 1000), Running(0, 0)]
    where = balance.decode([500] * 7, running)
    requests = [r.requests + where.count(g) for g, r in enumerate(running)]
    assert sorted(requests) == [4, 4, 4]
    where = balance.decode([600, 600, 600], [Running(0, 0), Running(0, 500)], capacity=1200)
    assert sorted(where) == [0, 0, 1], "one fits beside the 500 tokens, two where nothing runs"


def test_a_request_that_fits_nowhere_waits() -> None:
    assert balance.decode([900, 300], [Running(0, 500)], capacity=1000) == [-1, 0]


def test_experts_are_placed_by_the_search() -> None:
    weight = torch.tensor([[8.0, 1, 1, 1, 1, 1, 1, 2]])
    placed = balance.experts(weight, 4, 4)
    assert balance.expert_balance(weight, placed, 4).item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balance.prefill([1], 0), "0 instances"),
        (lambda: balance.prefill([-1], 1), "a length of -1"),
        (lambda: balance.prefill([5], 1, cached=[6]), "A prefix is a part of its prompt"),
        (lambda: balance.decode([1], []), "0 instances"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        call()


SMALL = simulate.Setting("small", gpus=8, spare=8, groups=4, nodes=2, experts=32, layers=2, windows=3, choices=1 << 14)


def test_simulation() -> None:
    none, theirs, ours = simulate.run(SMALL)
    assert none.policy == "none" and none.moves == 0
    assert none.balance < theirs.balance < ours.balance
    assert ours.moves > 0 and theirs.moves > 0


def test_every_line_says_that_it_is_simulated() -> None:
    lines = simulate.text((SMALL,), drifts=(0.1,)).splitlines()
    assert len(lines) == 1 + 3 + 8 and all(line.startswith("simulated") for line in lines)


@pytest.mark.parametrize("setting", [simulate.EP32, simulate.EP144], ids=lambda s: s.name)
def test_traces_are_skewed_and_drift(setting: simulate.Setting) -> None:
    first, second, *_ = simulate.trace(setting)
    assert first.shape == (4, 256) and (first.sum(1) == setting.choices).all()
    assert (first.amax(1) / first.mean(1) > 10).all()
    assert not torch.equal(first.argsort(1), second.argsort(1))
