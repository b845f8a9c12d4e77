"""A compiled DeepSeek-V3 on four processes: its experts follow a load that drifts, and one rank dies on the way."""

from pathlib import Path

from tests.models import placement_checks as checks
from tests.ranks import ranks

PRELOAD = ["dscompile.backend", "tests.zoo.hf", "transformers.models.deepseek_v3.modeling_deepseek_v3"]


def test_a_running_model_is_rebalanced_and_survives_a_death_in_a_move(tmp_path: Path) -> None:
    with ranks(4, tmp_path, PRELOAD) as started:
        found = started.outcomes(checks.serves_and_moves)
    assert found[3] == (False, "gone")
    for fine, one in found[:3]:
        assert fine, one
        assert one["worst"] < 1e-5, "relative to the unplaced model's, both in float32"
        assert one["phases"] == {"before", "during", "after"} and one["under_way"] >= 2
        assert sum(one["moves"]) >= 4 and one["placement"] == found[0][1]["placement"]
        assert one["graphs"] == 1, "no plan compiles anything"
        assert one["sites"].count(("placement", True)) == one["sites"].count(("expert_parallel", True)) == 1
        assert one["ops"]["place_counted"] == one["ops"]["experts"] == 1
        assert one["state"], "the state dict is that of the model without slots, wherever experts are"
        assert one["addresses"], "captured graphs hold them"
        assert "the old placement stays in force" in one["death"]
