"""No interleaving of the exchange's flags lets a rank read what isn't there or write over what isn't read."""

from __future__ import annotations

import pytest

from tests.kernels.exchange_model import Rules, explore

RIGHT = {
    "two CTAs send": Rules(exchanges=2, one_way=True),
    "two ranks": Rules(senders=1, exchanges=2),
    "two receive": Rules(ranks=3, senders=1, exchanges=3, one_way=True),
    "a combine always follows": Rules(senders=1, exchanges=2, paired=True),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str) -> None:
    result = explore(RIGHT[name])
    assert result.violation is None, "\n".join(result.trace)
    assert result.states > 100


WRONG = {
    "no release": (Rules(release=False), "of exchange 0"),
    "arrivals counted without order": (Rules(counts=False), "of exchange 0"),
    "the first CTA raises the flags": (Rules(last=False), "of exchange 0"),
    "no acquire": (Rules(senders=1, acquire=False), "of exchange 0"),
    "no back-flags": (Rules(senders=1, exchanges=2, back_flags=False), "of exchange 2"),
    "freed before it is read": (Rules(senders=1, exchanges=2, frees_after=False), "of exchange 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    rules, expected = WRONG[name]
    result = explore(rules)
    assert result.violation is not None and expected in result.violation, result
    assert result.trace


def test_having_received_does_not_show_that_others_have_read() -> None:
    """A rank that waits for its rows before it sends again has seen every peer's flag, not that the peer has read."""
    assert explore(Rules(senders=1, exchanges=2, back_flags=False, paired=True)).violation is not None


def test_a_missing_rank_is_a_standstill() -> None:
    """Nobody raises flags: the model says so, and the kernels' time limit makes an error of it."""

    result = explore(Rules(senders=0, exchanges=1))
    assert result.violation == "nobody can go on"
