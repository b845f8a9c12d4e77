"""Micro-batches between processes: outputs as without, the same bits in both orders, other batches on each rank."""

from collections.abc import Iterator

import pytest

from tests.passes import microbatch_checks as checks
from tests.ranks import Ranks, ranks

PRELOAD = [
    "dscompile.backend",
    "tests.passes.microbatch_checks",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks(2, tmp_path_factory.mktemp("ranks"), PRELOAD) as started:
        yield started


def test_overlapped_is_to_the_bit_sequential_and_within_the_bar_eager(two: Ranks) -> None:
    overrides = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    found = two.run(checks.check_model, "deepseek_v3", overrides, (4, 2))
    for rank, (form, overlapped, sequential) in enumerate(found):
        assert form.startswith(f"{(4, 2)[rank]} requests along dimension 0 of the inputs")
        layer = ["dispatch_start", "dispatch_wait", "combine_start", "combine_wait"]
        assert sequential == layer * 2
        assert sorted(overlapped) == sorted(sequential)
        assert overlapped.index("combine_start") > 2 and overlapped[:3].count("dispatch_start") == 2
