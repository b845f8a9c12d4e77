"""Expert layers: every written form becomes `dsinfra::experts`, what is no expert layer is refused and says why.

Everything runs in float64, where a right rewrite agrees with eager to twelve digits and a wrong one can't hide.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dscompile.passes import experts_joined, refusals
from tests.passes.toy import compile_passes, randn, same_as_eager, stack
from tests.zoo import hf
from tests.zoo.expert_near_misses import NEAR_MISSES, Dropout, Returned
from tests.zoo.experts import LEFT_ALONE, Layer, ToyExperts, grouped_mm

D = ToyExperts.D

FORMS = {
    "plain": Layer(),
    "batched": Layer(products="batched"),
    "batched_in_out_bias": Layer(products="batched", stored="in_out", bias=True),
    "argsort": Layer(sort="argsort"),
    "stable_argsort": Layer(sort="stable"),
    **{f"counts_{form}": Layer(counts=form) for form in ("one_hot", "equal", "scatter_add", "chosen", "searchsorted")},
    **{f"gather_{form}": Layer(gather=form) for form in ("index_select", "gather", "repeated")},
    **{f"unsort_{form}": Layer(unsort=form) for form in ("argsort", "scatter", "rows", "index_add", "scatter_add")},
    **{f"weigh_{form}": Layer(weigh=form) for form in ("flat", "bmm", "einsum")},
    "interleaved": Layer(weights="interleaved"),
    "in_out": Layer(stored="in_out"),
    "gelu": Layer(activation="gelu"),
    "gelu_tanh": Layer(activation="gelu_tanh"),
    "clamped": Layer(activation="oai", weights="interleaved", bias=True, stored="in_out"),
    "bias": Layer(bias=True),
    "sentinels": Layer(sentinels=True),
    "one_choice": Layer(top_k=1),
    "one_choice_flat": Layer(top_k=1, weigh="flat"),
    "one_choice_added": Layer(top_k=1, unsort="index_add"),
    "one_choice_placed": Layer(top_k=1, unsort="rows"),
    "one_choice_batched": Layer(top_k=1, products="batched"),
    "all_experts": Layer(top_k=5),
}


PIECES = {"moe_plan": 1, "moe_gather": 1, "grouped_linear": 3, "moe_combine": 1}  # of gate and up apart


def toy(make: Callable[[], nn.Module] = ToyExperts, seed: int = 0) -> Callable[[], nn.Module]:
    """A recipe for the same float64 module each time."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make().double()

    return build


def sites(reports: list, kind: str = "experts") -> list[Any]:
    return [site for report in reports for site in report.sites if site.kind == kind]


def only(reports: list) -> Any:
    (site,) = sites(reports)
    return site


# ------------------------------------------------------------------ matches


@pytest.mark.parametrize("lengths", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_forms(form: Layer, lengths: bool) -> None:
    calls = [(randn(2, n, D, seed=n),) for n in (7, 11)][: 1 + lengths]
    reports = same_as_eager(toy(partial(ToyExperts, form)), *calls, lengths=lengths)
    assert len(reports) == 1, "one graph serves both lengths"
    assert only(reports).matched, only(reports)
    assert reports[0].op_counts == {"experts": 1, "route": 1}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_gradients(form: Layer) -> None:
    """Of tokens, router, weights and biases, through the operator's own formula."""
    (report,) = same_as_eager(toy(partial(ToyExperts, form)), (randn(2, 7, D),), train=True)
    assert report.op_counts.get("experts") == 1 and not report.op_counts.get("grouped_mm")


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_sizes_that_coincide(shape: tuple[int, int], top_k: int) -> None:
    """One token, or as many tokens as choices or experts: dimensions can't be told apart by their sizes."""
    written = ({}, {"unsort": "rows", "weigh": "flat"}, {"products": "batched", "weigh": "bmm"})
    for form in (Layer(top_k=top_k, **how) for how in written):
        reports = same_as_eager(toy(partial(ToyExperts, form)), (randn(*shape, D),))
        assert only(reports).matched, only(reports)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_op_counts(count: int) -> None:
    layers = [toy(seed=i) for i in range(count)]
    (report,) = same_as_eager(stack(lambda: nn.Linear(D, D, dtype=torch.float64), *layers))
    assert report.op_counts == ({"experts": count, "route": count} if count else {})
    assert [s.module_path for s in sites([report])] == [f"layers.{i + 1}" for i in range(count)]


def test_report_names_line_form_and_kernel() -> None:
    site = only(same_as_eager(toy()))
    assert re.fullmatch(r"zoo/experts\.py:\d+", site.source)
    assert site.form == "grouped, E 5, top-2, F 20, silu" and site.kernel == "reference"


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_bfloat16_products_of_torch(train: bool) -> None:
    """`torch._grouped_mm`, float32 weights of the sum: one rounding where the model has several."""

    class Native(ToyExperts):
        D, F = 32, 16

        def by_group(self, ends: torch.Tensor):  # type: ignore[no-untyped-def]
            return lambda rows, weight: torch._grouped_mm(rows, weight.transpose(1, 2), ends)

        def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
            return super().combine(z.float(), weight_TK.float(), perm, x).to(x.dtype)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Native().bfloat16()
    x = randn(2, 8, 32).bfloat16().requires_grad_(train)
    compiled, reports = compile_passes(module, "aot_eager")
    with torch.set_grad_enabled(train):
        ours, eager = compiled(x), module(x)
    assert only(reports).matched, only(reports)
    torch.testing.assert_close(ours, eager, rtol=3e-2, atol=3e-2)
    if train:
        ours.float().square().sum().backward()
        assert x.grad is not None and bool(x.grad.isfinite().all())


def test_given_ids_may_name_no_expert() -> None:
    """Ids at or past E, masked as expert parallelism does: they add nothing."""

    class Given(ToyExperts):
        def forward(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return self.experts(x, idx, weight)

    idx = torch.tensor([[0, 5], [4, 2], [5, 5], [3, 0]])
    call = (randn(4, D), idx, randn(4, 2, seed=3))
    reports = same_as_eager(toy(partial(Given, Layer(sentinels=True))), call)
    assert only(reports).matched, only(reports)


@pytest.mark.parametrize("masked", [True, False])
def test_the_bias_of_rows_of_no_expert(masked: bool) -> None:
    """Clamped ids give such rows the last expert's bias: only a mask behind it takes them out."""

    class Given(ToyExperts):
        def forward(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return self.experts(x, idx, weight)

        def mlp(self, rows, product, ids):  # type: ignore[no-untyped-def]
            z = super().mlp(rows, product, ids.clamp(max=self.E - 1))
            return z.masked_fill((ids >= self.E).unsqueeze(-1), 0.0) if masked else z

    idx = torch.tensor([[0, 5], [4, 2], [5, 5], [3, 0]])
    call = (randn(4, D), idx, randn(4, 2, seed=3))
    site = only(same_as_eager(toy(partial(Given, Layer(bias=True))), call))
    assert site.matched == masked and site.refusal == ("" if masked else "CombineForm")


def test_bins_up_to_the_number_of_experts() -> None:
    """`histc(max=E)` counts an id E to the last expert: the same only where no id can be E."""

    class Wide(ToyExperts):
        def ends(self, idx_TK: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
            counts = torch.histc(idx_TK.reshape(-1).double(), bins=self.E, min=0, max=self.E)
            return counts.cumsum(0, dtype=torch.int32)

    class Given(Wide):
        def forward(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return self.experts(x, idx, weight)

    assert only(same_as_eager(toy(Wide))).matched
    idx = torch.tensor([[0, 4], [4, 2], [1, 3], [3, 0]])
    refused = only(same_as_eager(toy(Given), (randn(4, D), idx, randn(4, 2, seed=3))))
    assert refused.refusal == "GroupEnds"


class Given(ToyExperts):
    """Ids and weights are arguments: nothing is known of them."""

    def forward(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.experts(x, idx, weight)


def test_ones_at_ids_that_may_occur_twice_count_them_once() -> None:
    """A top-k's ids differ within a row; those of an argument may not, and then one row of x is left out."""
    idx = torch.tensor([[0, 1], [4, 2], [1, 3], [3, 0]])
    call = (randn(4, D), idx, randn(4, 2, seed=3))
    refused = only(same_as_eager(toy(partial(Given, Layer(counts="chosen"))), call))
    assert refused.refusal == "GroupEnds"


@pytest.mark.parametrize("wrong", ["dim", "value", "filled"])
def test_ones_set_otherwise_are_no_counts(wrong: str) -> None:
    class Other(ToyExperts):
        def ends(self, idx_TK: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
            T, E = idx_TK.shape[0], self.E
            if wrong == "dim":
                counts = torch.zeros(E, T, dtype=torch.int64).scatter_(0, idx_TK.t(), 1).t().sum(0)
                counts = torch.zeros(T, E, dtype=torch.int64).scatter_(0, idx_TK % T, 1).sum(0) * 0 + counts
            elif wrong == "value":
                counts = torch.zeros(T, E, dtype=torch.int64).scatter_(1, idx_TK, 2).sum(0) // 2
            else:
                counts = torch.zeros(T, E, dtype=torch.int64).fill_(0).scatter_(1, idx_TK, 1).sum(0)
            return counts.cumsum(0, dtype=torch.int32)

    refused = only(same_as_eager(toy(Other)))
    assert refused.refusal in ("GroupEnds", "MutatedOperand"), refused


def test_one_choice_placed_into_the_result_itself() -> None:
    """`y[perm] = z` has no node of its own in Dynamo's graph: the value is named behind it."""

    class Placed(ToyExperts):
        def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
            y = torch.empty_like(x)
            y[perm] = z * weight_TK.reshape(-1)[perm].unsqueeze(-1)
            return y

    site = only(same_as_eager(toy(partial(Placed, Layer(top_k=1))), train=True, inner=LEFT_ALONE))
    assert site.matched, site

    class Twice(Placed):
        def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
            y = super().combine(z, weight_TK, perm, x)
            y[0] = 1
            return y

    assert only(same_as_eager(toy(partial(Twice, Layer(top_k=1))))).refusal == "UnboundValue"


def test_weights_that_the_graph_converts_are_joined_once() -> None:
    """Gate and up stored in float32 and multiplied in float64: the joined copy is of the values multiplied."""

    class Converted(ToyExperts):
        def mlp(self, rows, product, ids):  # type: ignore[no-untyped-def]
            gate, up = product(rows, self.w_gate.double()), product(rows, self.w_up.to(torch.float64))
            return product(self.activate(gate, up), self.w_down)

    def build() -> nn.Module:
        module = toy(partial(Converted, Layer(weights="apart")))()
        module.w_gate.data, module.w_up.data = module.w_gate.data.float(), module.w_up.data.float()
        return module

    site = only(same_as_eager(build))
    assert site.matched and site.decision.startswith("gate and up joined once"), site


@pytest.mark.parametrize("stored", ["out_in", "in_out"])
def test_gate_and_up_apart(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights are joined once in inference; in training on each call, where that is a small part of the work, and
    else multiplied apart."""
    apart = toy(partial(ToyExperts, Layer(weights="apart", stored=stored)))  # type: ignore[arg-type]
    (report,) = same_as_eager(apart)
    assert report.op_counts == {"experts": 1, "route": 1}
    assert only([report]).decision.startswith("gate and up joined once")
    (report,) = same_as_eager(apart, train=True)
    assert only([report]).decision == "gate and up multiplied apart"
    assert {name: n for name, n in report.op_counts.items() if name != "route"} == PIECES
    monkeypatch.setattr(experts_joined, "JOIN_ROWS", 3)
    (report,) = same_as_eager(apart, train=True)
    assert report.op_counts.get("experts") == 1 and "on each call" in only([report]).decision


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_between_products_apart(activation: str) -> None:
    form = Layer(weights="apart", activation=activation, sentinels=True, top_k=1)  # type: ignore[arg-type]
    (report,) = same_as_eager(toy(partial(ToyExperts, form)), train=True)
    assert only([report]).decision == "gate and up multiplied apart"


def test_an_activation_that_is_not_written_apart() -> None:
    """The operator alone clamps; the refusal says so, and the layer stays as it was."""
    form = Layer(weights="apart", activation="oai")
    refused = only(same_as_eager(toy(partial(ToyExperts, form)), train=True, inner=LEFT_ALONE))
    assert refused.refusal == "SeparateGateUp" and "swiglu_oai" in refused.reason


def test_ids_of_no_expert_apart() -> None:
    """Ids at or past E: their rows add nothing, and no gradient flows through them."""
    idx = torch.tensor([[0, 5], [4, 2], [5, 5], [3, 0]])
    call = (randn(4, D), idx, randn(4, 2, seed=3))
    reports = same_as_eager(toy(partial(Given, Layer(weights="apart", sentinels=True))), call, train=True)
    assert only(reports).decision == "gate and up multiplied apart"


def test_a_joined_weight_follows_its_parts() -> None:
    module = toy(partial(ToyExperts, Layer(weights="apart")))().requires_grad_(False)
    compiled, reports = compile_passes(module)
    x = randn(2, 7, D)
    torch.testing.assert_close(compiled(x), module(x))
    module.w_up.mul_(-2)
    torch.testing.assert_close(compiled(x), module(x))
    assert only(reports).matched and len(reports) == 1


def test_one_layer_used_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = toy()()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x + self.layer(x))

    (report,) = same_as_eager(Tied, train=True)
    assert report.op_counts["experts"] == 2


def test_checkpointed_layers() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([toy(seed=i)() for i in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=False)
            return x

    (report,) = same_as_eager(Checkpointed, train=True)
    assert [s.matched for s in sites([report])] == [True, True]


def test_counts_may_be_used_elsewhere() -> None:
    """Loads of the experts leave the layer: only they are still computed beside the operator."""

    class Loads(ToyExperts):
        def ends(self, idx_TK: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
            self.loads = torch.histc(ids_M.double(), bins=self.E, min=0, max=self.E - 1)
            return self.loads.cumsum(0, dtype=torch.int32)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x), self.loads

    (report,) = same_as_eager(toy(Loads))
    assert report.op_counts == {"experts": 1, "route": 1}


def test_the_result_may_be_changed_in_place() -> None:
    class Shared(ToyExperts):
        def experts(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return super().experts(x, idx, weight).add_(x)

    (report,) = same_as_eager(toy(Shared))
    assert report.op_counts == {"experts": 1, "route": 1}


# ------------------------------------------------------------------ near misses


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("module", NEAR_MISSES, ids=lambda m: m.__name__)
def test_near_misses(module: type[ToyExperts], train: bool) -> None:
    site = only(same_as_eager(toy(module), (randn(2, 6, D),), train=train, inner=LEFT_ALONE if train else ""))
    assert not site.matched and site.refusal in NEAR_MISSES[module].split("|"), site
    assert site.reason and re.search(r"\.py:\d+", site.source)


@pytest.mark.parametrize("module", [m for m in NEAR_MISSES if m is not Returned], ids=lambda m: m.__name__)
def test_near_misses_beside_real_layers(module: type[ToyExperts]) -> None:
    """The layers around a refused one are lowered: no proof is taken from one layer for another."""
    expected = [True, False, True]
    reports = same_as_eager(stack(toy(), toy(module, 1), toy(seed=2)), (randn(2, 6, D),))
    assert [s.matched for s in sorted(sites(reports), key=lambda s: s.module_path)] == expected


def test_active_dropout_is_refused() -> None:
    compiled, reports = compile_passes(toy(Dropout)().train(), LEFT_ALONE)
    compiled(randn(2, 6, D).requires_grad_())
    assert only(reports).refusal == "ExpertDropout"
    assert only(same_as_eager(lambda: toy(Dropout)().eval())).matched, "the same module in evaluation draws nothing"


@pytest.mark.parametrize("where", ["rows", "hidden", "results"])
def test_stopped_gradients_are_refused(where: str) -> None:
    class Stopped(ToyExperts):
        def gathered(self, x: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
            rows = super().gathered(x, perm)
            return rows.detach() if where == "rows" else rows

        def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            h = super().activate(gate, up)
            return h.detach() if where == "hidden" else h

        def combine(self, z, weight_TK, perm, x):  # type: ignore[no-untyped-def]
            return super().combine(z.detach() if where == "results" else z, weight_TK, perm, x)

    assert not only(same_as_eager(toy(Stopped), train=True, inner=LEFT_ALONE)).matched
    assert only(same_as_eager(toy(Stopped))).matched, "without gradients there is nothing to stop"


def test_stopped_gradients_of_operands_are_kept() -> None:
    """A detached weight or routing weight is an operand like any other: no gradient passes it, as in the model."""

    class Frozen(ToyExperts):
        def experts(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return super().experts(x, idx, weight.detach())

    (report,) = same_as_eager(toy(Frozen), train=True)
    assert report.op_counts.get("experts") == 1


def test_views_without_gradients_are_kept() -> None:
    """A transposed weight and flattened routing weights that were made under no_grad: no gradient reaches them."""

    class Frozen(ToyExperts):
        def by_group(self, ends: torch.Tensor):  # type: ignore[no-untyped-def]
            def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
                with torch.no_grad():
                    weight = weight.transpose(1, 2)
                return grouped_mm(rows, weight, ends)

            return product

        def experts(self, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                weight = weight.reshape(-1)
            return super().experts(x, idx, weight)

    (report,) = same_as_eager(toy(Frozen), train=True)
    assert report.op_counts.get("experts") == 1


def test_a_loop_over_experts_that_were_hit() -> None:
    """Transformers' own loop: Dynamo ends the graph at the question which experts were hit."""
    module, x = hf.build_model("deepseek_v3", experts="eager").model.layers[-1].mlp, randn(2, 5, 128).float()
    compiled, reports = compile_passes(module)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)
    site = only(reports)
    assert site.refusal == "DataDependentLoop" and "grouped_mm" in site.hint and ".py:" in site.source


def test_every_refusal_is_covered() -> None:
    from tests.passes import test_experts_loop, test_recognize_router

    named = {*NEAR_MISSES.values(), *(r for _, r in test_experts_loop.REFUSED.values())}
    named |= {r for _, r in test_recognize_router.REFUSED.values()}
    covered = {word for names in named for word in names.split("|")}
    found = [c for c in vars(refusals).values() if isinstance(c, type) and issubclass(c, refusals.LayerRefusal)]
    here = {
        "LayerRefusal",
        "SeparateGateUp",
        "ExpertsApart",
        "ExpertDropout",
        "DataDependentLoop",
    }  # each has a test of its own
    assert {c.__name__ for c in found} - covered == here
