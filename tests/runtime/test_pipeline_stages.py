"""Stages cut from unmodified models: equal to the whole, its own parameters under their own names, and refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import dscompile
from dscompile.pipeline import CannotCut
from tests.zoo import hf

LAYERS = {"num_hidden_layers": 3}
MODELS = {
    "deepseek_v3": {},
    "minicpm3": {"tie_word_embeddings": False},
    "gpt_oss": {"attention": "eager"},  # finds its masks by the index of a layer
    "qwen3_moe": {},
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_stages_one_after_the_other_are_the_model(name: str) -> None:
    model = hf.build_model(name, **LAYERS, **MODELS[name])
    stages = dscompile.pipeline_stages(model, 2)
    ids = hf.tokens(2, 6)
    hidden = stages[0](ids)
    assert hidden.shape == (2, 6, 128)
    assert torch.equal(stages[1](hidden), model(ids, use_cache=False).logits)
    own = dict(model.named_parameters())
    named = [(key, p) for stage in stages for key, p in stage.named_parameters()]
    assert sorted(key for key, _ in named) == sorted(own)
    assert all(p is own[key] for key, p in named)


def test_a_model_without_a_head_and_stages_of_given_lengths() -> None:
    model = hf.build_model("deepseek_v3", num_hidden_layers=4).model
    stages = dscompile.pipeline_stages(model, 3, layers=(1, 2, 1))
    assert [stage.span for stage in stages] == [range(1), range(1, 3), range(3, 4)]
    x = hf.tokens(1, 4)
    with torch.no_grad():
        assert torch.equal(stages[2](stages[1](stages[0](x))), model(x, use_cache=False).last_hidden_state)
    assert "layers 1 to 2, first=False, last=False" in repr(stages[1])


def test_odd_layers_go_to_the_first_stages_and_a_checkpoint_of_the_whole_loads() -> None:
    with torch.device("meta"):
        model = hf.build_model("deepseek_v3", num_hidden_layers=5, size=SimpleNamespace(name="micro", device="meta"))
    stages = dscompile.pipeline_stages(model, 3)
    assert [len(stage.span) for stage in stages] == [2, 2, 1]
    whole = hf.build_model("deepseek_v3", num_hidden_layers=5)
    missing = stages[1].load_state_dict(whole.state_dict(), strict=False, assign=True).missing_keys
    assert not missing and not any(p.is_meta for p in stages[1].parameters())


class Decoder(nn.Module):
    """Has what a decoder of transformers has, and something between the layers if asked."""

    def __init__(self, scale: float = 1.0, tied: bool = False, pairs: bool = False, encoder: bool = False):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=encoder)
        self.embed_tokens, self.norm = nn.Embedding(8, 4), nn.LayerNorm(4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.shared = nn.Parameter(torch.ones(4)) if tied else None
        self.scale, self.pairs = scale, pairs

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, use_cache: bool = False
    ) -> SimpleNamespace:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x if self.scale == 1.0 else x * self.scale
        for layer in self.layers:
            x = layer(x)[0] if self.pairs else layer(x)
        return SimpleNamespace(last_hidden_state=self.norm(x))


def test_any_module_of_that_form_is_cut() -> None:
    model, x = Decoder(), torch.tensor([[1, 2]])
    first, last = dscompile.pipeline_stages(model, 2)
    assert torch.equal(last(first(x)), model(x).last_hidden_state)


@pytest.mark.parametrize(
    ("model", "stages", "said"),
    [
        (Decoder(), 3, "3 stages of 2 layers.*Ask for 1 to 2"),
        (Decoder(), 0, "0 stages of 2 layers"),
        (Decoder(scale=2.0), 2, "changes the hidden states outside of its layers"),
        (Decoder(pairs=True), 2, "return more than one tensor"),
        (Decoder(tied=True), 2, r"shared \[4\] is used by stages \[0, 1\]"),
        (Decoder(encoder=True), 2, "an encoder and a decoder"),
        (nn.Sequential(nn.Linear(2, 2)), 1, "no list `layers` in Sequential, but 0 .Linear."),
    ],
    ids=["too many", "none", "scaled", "pairs", "tied", "encoder", "no layers"],
)
def test_refusals(model: nn.Module, stages: int, said: str) -> None:
    with pytest.raises(CannotCut, match=said):
        dscompile.pipeline_stages(model, stages)


def test_layers_that_do_not_sum_up() -> None:
    with pytest.raises(CannotCut, match=r"layers=\[1, 2\] for 2 stages of 2 layers"):
        dscompile.pipeline_stages(Decoder(), 2, layers=(1, 2))
