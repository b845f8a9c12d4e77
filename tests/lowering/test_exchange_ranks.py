"""Dispatch and combine between processes: uneven, empty and skewed ranks, gradients, halves, agreement of ranks."""

from collections.abc import Iterator

import pytest
import torch

from tests.lowering import exchange_checks as checks
from tests.ranks import Ranks, ranks


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks(4, tmp_path_factory.mktemp("ranks"), ["dscompile.lowering.ops"]) as started:
        yield started


COUNTS = {
    "even": ([5, 5, 5, 5], None),
    "uneven-and-empty": ([7, 0, 3, 1], None),
    "all-empty": ([0, 0, 0, 0], None),
    "skewed-to-one-rank": ([6, 6, 2, 6], 2),
    "skewed-to-itself": ([4, 0, 0, 0], 0),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("counts", "skew"), COUNTS.values(), ids=COUNTS)
def test_the_layer_is_that_of_one_process(four: Ranks, size: int, counts: list[int], skew: int | None) -> None:
    four.run(checks.check_layer, size, counts[:size], skew)


@pytest.mark.parametrize("size", [2, 4])
def test_each_token_has_one_row_at_each_rank_in_the_order_of_its_source(four: Ranks, size: int) -> None:
    four.run(checks.check_rows, size)


@pytest.mark.parametrize("size", [1, 4])
def test_quantised_rows_arrive_as_they_were_sent(four: Ranks, size: int) -> None:
    four.run(checks.check_quantised, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_exchanges_may_be_open_at_once(four: Ranks, dtype: torch.dtype) -> None:
    four.run(checks.check_halves, dtype)


def test_whole_weights_and_their_gradient(four: Ranks) -> None:
    four.run(checks.check_whole_weights)


def test_every_rank_hears_what_the_others_say(four: Ranks) -> None:
    four.run(checks.check_everybody)


@pytest.mark.parametrize(
    ("field", "values"),
    [("capacity", (4, 5)), ("experts", (8, 16)), ("dtype", ("torch.float32", "torch.float64")), ("width", (16, 8))],
)
def test_ranks_that_mean_different_things_say_so_before_they_exchange(four: Ranks, field: str, values: tuple) -> None:
    usual, other = values
    for message in four.run(checks.check_disagreement, field):
        assert message.startswith(f"dispatch_start: {field} differs within the group")
        assert f"rank 1 has {usual}, rank 2 has {other}, rank 3 has {usual}" in message
