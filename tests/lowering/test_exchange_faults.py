"""A rank that dies or stalls: every other rank gets an error that names it, and none hangs."""

from pathlib import Path

import pytest

from tests.lowering import exchange_checks as checks
from tests.ranks import ranks

SAYS = {"dies": "rank 1 has died", "stalls": "rank 1 is alive but stalls: it didn't come within 3 s"}


@pytest.mark.parametrize("what", SAYS)
def test_every_other_rank_names_the_lost_one(tmp_path: Path, what: str) -> None:
    with ranks(4, tmp_path, ["dscompile.lowering.ops"]) as started:
        outcomes = started.outcomes(checks.check_lost, what, timeout=60)
    assert outcomes[1] == ((False, "gone") if what == "dies" else (True, ("", 0.0)))
    for rank in (0, 2, 3):
        fine, result = outcomes[rank]
        assert fine, result
        message, waited = result
        assert "dispatch_start" in message and SAYS[what] in message, message
        if what == "stalls":
            assert "it has entered 4 exchanges, the last combine_start" in message
        assert waited < 10
