"""Models with their experts spread over processes: outputs, gradients, lengths, weights, as on one process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import expert_parallel_checks as checks
from tests.ranks import Ranks, ranks

ONE_LAYER = {"num_hidden_layers": 1}
MODELS = {
    "deepseek_v3": (2, {**ONE_LAYER, "first_k_dense_replace": 0}, 5),
    "qwen3_moe": (4, ONE_LAYER, 0),
    "mixtral": (2, ONE_LAYER, 0),
}
SHAPES = ((2, 5), (1, 2), (1, 3), (3, 2))  # batch and length of each rank
PRELOAD = [
    "dscompile.backend",
    "tests.zoo.hf",
    "tests.zoo.experts",
    "safetensors.torch",
    *(f"transformers.models.{name}.modeling_{name}" for name in MODELS),
]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks(4, tmp_path_factory.mktemp("ranks"), PRELOAD) as started:
        yield started


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_training_is_that_of_one_process(four: Ranks, name: str) -> None:
    size, overrides, between = MODELS[name]
    decisions = four.run(checks.check_model, size, name, SHAPES, overrides)
    said = f"{8 // size} of 8 experts on each of {size} ranks, capacity 40, slices of whole weights"
    shared = f", {between} other operators during the dispatch" if between else ""
    assert decisions[0] == [said + shared] * overrides["num_hidden_layers"]


@pytest.mark.parametrize("kind", ["checkpoint", "stored", "asked for"])
def test_rows_in_fp8_travel_in_fp8_with_the_same_bits(four: Ranks, kind: str) -> None:
    own = "its own weights" if kind == "stored" else "slices of whole weights"
    for told, without in four.run(checks.check_fp8, kind)[:2]:
        spread, sent = told
        assert spread.startswith(f"expert_parallel: 4 of 8 experts on each of 2 ranks, capacity 40, {own}")
        assert sent.startswith("fp8_dispatch: rows travel in FP8, 264 bytes each instead of 512")
        assert without == [spread]


def test_token_counts_vary_without_recompiling_and_a_rank_may_have_none(four: Ranks) -> None:
    assert four.run(checks.check_lengths, 2)[:2] == [1, 2]  # rank 1 has none once, for which Dynamo makes a graph


def test_a_rank_without_tokens_trains_its_experts(four: Ranks) -> None:
    four.run(checks.check_empty_training, 4)


def test_a_model_on_meta_loads_its_own_experts_trains_and_saves_all(four: Ranks, tmp_path: Path) -> None:
    for found in four.run(checks.check_store, str(tmp_path)):
        assert found["meta"] and found["shapes"] == [[2, 40, 24], [2, 24, 20]] * 2
        assert found["weights"] == {f"layers.{i}.{name}": 8 for i in range(2) for name in ("w_gate_up", "w_down")}
        assert all("its own weights" in decision for decision in found["decisions"])
        assert found["ops"]["experts"] == 2 and "gather_experts" not in found["ops"]


def test_a_whole_model_gives_back_the_memory_of_other_ranks_experts(four: Ranks) -> None:
    for before, after in four.run(checks.check_store_of_a_whole_model)[:2]:
        assert after == before // 2
