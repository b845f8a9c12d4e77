"""Which parameters are an expert layer's, and what a store refuses; whole models test what it does over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from dscompile.runtime.expert_store import ExpertStore, ExpertStoreError, expert_weights
from tests import ranks
from tests.zoo.expert_parallel import build, rows
from tests.zoo.experts import Layer, ToyExperts


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with ranks.alone(tmp_path_factory.mktemp("group")):
        yield


def holding(**shapes: tuple[int, ...]) -> nn.Module:
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return module


LAYERS = {
    "joint": ToyExperts(),
    "apart": ToyExperts(Layer(weights="apart")),
    "in-out": ToyExperts(Layer(stored="in_out")),
    "biases": ToyExperts(Layer(bias=True)),
}
OTHERS = {
    "linear": nn.Linear(4, 4),
    "two-projections-of-heads": holding(w_uk=(4, 8, 16), w_uv=(4, 12, 16)),  # H, N or V, C
    "convolution": nn.Conv1d(4, 8, 3),
    "different-experts": holding(up=(4, 12, 8), down=(5, 8, 6)),
    "no-pair": holding(a=(4, 6, 8), b=(4, 8, 6)),
    "attention": nn.MultiheadAttention(8, 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_weights_of_a_layer(name: str) -> None:
    module = LAYERS[name]
    assert expert_weights(module) == [n for n, _ in module.named_parameters(recurse=False)]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_layer(name: str) -> None:
    assert expert_weights(OTHERS[name]) == []


def test_a_model_without_expert_layers() -> None:
    with pytest.raises(ExpertStoreError, match="Linear has no module with the weights of expert layers"):
        ExpertStore(nn.Linear(4, 4), "world")


def test_the_model_reads_what_it_did_and_its_state_dict_keeps_its_names() -> None:
    model, whole = build(), build()
    parameters = [id(p) for p in model.parameters()]
    store = ExpertStore(model, "world")
    assert sorted(map(id, model.parameters())) == sorted(parameters)
    assert store.state_dict().keys() == whole.state_dict().keys()
    x = rows(0, 1, 4)
    assert torch.equal(model(x), whole(x))
    half = {name: value / 2 for name, value in whole.state_dict().items()}
    store.load(half)
    assert all(torch.equal(value, half[name]) for name, value in store.state_dict().items())


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    model, state = build(), build().state_dict()
    store = ExpertStore(model, "world")
    doubled = {name: value * 2 for name, value in state.items()}
    with pytest.raises(ExpertStoreError, match=r"has no \['layers.0.w_down'\] and the model no \['extra'\]"):
        store.load({**{n: v for n, v in doubled.items() if n != "layers.0.w_down"}, "extra": torch.zeros(1)})
    with pytest.raises(ExpertStoreError, match=r"w_down is \[7, 24, 20\] in the checkpoint and \[8, 24, 20\]"):
        store.load({**doubled, "layers.0.w_down": doubled["layers.0.w_down"][:7]})
    assert all(torch.equal(value, state[name]) for name, value in store.state_dict().items())
