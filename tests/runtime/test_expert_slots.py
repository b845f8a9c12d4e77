"""Slots made of a store's experts: on one rank here, and what is refused; test_placement_gloo.py moves them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from dscompile.passes.placement import Book
from dscompile.runtime.expert_slots import PlacedExperts
from dscompile.runtime.expert_store import ExpertStore, ExpertStoreError
from tests import ranks
from tests.zoo.expert_parallel import Stack, build, rows
from tests.zoo.experts import Layer, ToyExperts


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with ranks.alone(tmp_path_factory.mktemp("group")):
        yield


def test_a_model_computes_from_its_slots_wherever_experts_are() -> None:
    whole, model, x = build(2), build(2), rows(0, 2, 3)
    store = ExpertStore(model, dist.group.WORLD)
    placed = PlacedExperts(store)
    book = Book.of(placed, "water_filling")
    assert list(book.layers) == ["layers.0", "layers.1"] and (book.ranks, book.policy) == (1, "water_filling")
    assert placed.phy2log.tolist() == [list(range(8))] * 2
    with torch.no_grad():
        assert torch.equal(model(x), whole(x))
        for layer in placed.layers.values():  # as a move would
            for weight in layer.weights:
                weight.copy_(weight.flip(0))
            layer.log2phy.copy_(layer.log2phy.flip(0))
        assert torch.equal(model(x), whole(x))
    state = store.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())
    held = {weight.data_ptr() for layer in placed.layers.values() for weight in layer.weights}
    assert {p.data_ptr() for p in store.parameters()} == held, "one memory, that of the slots"
    assert not any(p.requires_grad for p in store.parameters())


def _meta() -> Stack:
    with torch.device("meta"):
        return Stack(1)


REFUSED = {
    "spare slots for one rank": (lambda: build(1), 1, "Ask for 0 to 0"),
    "biases": (lambda: ToyExperts(Layer(bias=True)), 0, "leave biases out"),
    "gate and up apart": (lambda: ToyExperts(Layer(weights="apart")), 0, "Join gate and up"),
    "transposed": (lambda: ToyExperts(Layer(stored="in_out")), 0, r"Slots hold an expert's \[2F, D\] and \[D, F\]"),
    "nothing loaded": (_meta, 0, "Load its weights first"),
}


@pytest.mark.parametrize(("make", "spare", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_stays_as_it_was(make, spare: int, message: str) -> None:
    store = ExpertStore(make(), dist.group.WORLD)
    before = [id(p) for p in store.parameters()]
    with pytest.raises(ExpertStoreError, match=message):
        PlacedExperts(store, spare)
    assert [id(p) for p in store.parameters()] == before
