"""The self-check: each operator made wrong on purpose is found, at its site and alone; a right one costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dscompile import measure, verify
from dscompile.backend import dsinfra
from dscompile.config import Config
from dscompile.errors import VerifyError
from dscompile.lowering import select
from dscompile.lowering.ops import experts as ops_experts
from dscompile.passes import absorb, recognize_mla
from dscompile.report import CompileReport
from tests.passes.test_quantize_weights import MLP, build, rows
from tests.passes.toy import D, S, Toy, randn, same_as_eager, stack, toy
from tests.zoo import by_name
from tests.zoo.experts import Layer, ToyExperts


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


class Compiled:
    """A module compiled under verify, and its reports."""

    def __init__(self, module: Any, **options: Any):
        self.reports: list[CompileReport] = []
        options = {"inner": "eager", "verify": True, **options}

        def backend(gm: torch.fx.GraphModule, inputs: list) -> Any:
            return dsinfra(gm, inputs, options=options, sink=self.reports.append)

        self.call = torch.compile(module, backend=backend)

    @property
    def sites(self) -> list[Any]:
        return [site for report in self.reports for site in report.sites]

    @property
    def note(self) -> str:
        return self.reports[-1].records[-1].note


def sabotage(monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[[Any], Any], only: int | None = None) -> list:
    """Lets one operator's implementation return changed results: at every call, or at the one of that number."""
    run, calls = select.Table.run, []

    def wrong(self: select.Table, *args: Any) -> Any:
        found = run(self, *args)
        if self.op != op:
            return found
        calls.append(args)
        return found if only is not None and len(calls) - 1 != only else change(found)

    monkeypatch.setattr(select.Table, "run", wrong)
    return calls


def first(factor: float) -> Callable[[Any], Any]:
    """The first result scaled, of an operator with one or several."""
    return lambda out: (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor


def experts(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return ToyExperts(Layer()).to(dtype)


def absorbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absorb.heuristics, "prefer_absorbed", lambda **sizes: (True, "as the test wants it"))


# ------------------------------------------------------------------ wrong operators are found

X, TOKENS = (2, S, D), (2, S, 24)
WRONG: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, str, Callable, str]] = {
    "mla": (lambda: Toy(dtype=torch.float32), X, torch.float32, "mla", first(1.001), "mla"),
    "mla in bfloat16": (lambda: Toy(dtype=torch.bfloat16), X, torch.bfloat16, "mla", first(1.05), "mla"),
    "mla, one row": (
        lambda: Toy(dtype=torch.float32),
        X,
        torch.float32,
        "mla",
        lambda out: (out[0].index_fill(2, torch.tensor([3]), 0.0), out[1]),
        "mla",
    ),
    "mla, not a number": (lambda: Toy(), X, torch.float64, "mla", first(float("nan")), "mla"),
    "mla_decode": (lambda: Toy(), X, torch.float64, "mla_decode", first(1.001), "mla"),
    "experts": (experts, TOKENS, torch.float32, "experts", first(1.001), "experts"),
    "experts, one token": (
        experts,
        TOKENS,
        torch.float32,
        "experts",
        lambda y: y.index_fill(0, torch.tensor([7]), 0.0),
        "experts",
    ),
    "route, weights": (experts, TOKENS, torch.float32, "route", lambda o: (o[0], o[1] * 1.01), "route"),
    "route, choice": (experts, TOKENS, torch.float32, "route", lambda o: ((o[0] + 1) % 5, o[1]), "route"),
    "route, pairs": (experts, TOKENS, torch.float32, "route", lambda o: (o[0], o[1].flip(-1)), "route"),
}


@pytest.mark.parametrize(
    ("case", "strict"), [*((case, False) for case in WRONG), ("mla", True), ("experts", True), ("route, choice", True)]
)
def test_a_wrong_operator_is_found(
    case: str, strict: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make, shape, dtype, op, change, kind = WRONG[case]
    if op == "mla_decode":
        absorbed(monkeypatch)
    sabotage(monkeypatch, op, change)
    module, x = make(), randn(*shape, dtype=dtype)
    compiled = Compiled(module, strict=strict)
    if strict:
        with pytest.raises(Exception) as caught:
            compiled.call(x)
        error = getattr(caught.value, "inner_exception", None) or caught.value
        assert isinstance(error, VerifyError)
        for words in (f"`{op}`", "for (top) at ", ".py:", "the bar ", "A wrong rewrite is not used", "{'fuel': "):
            assert words in str(error), error
        return
    torch.testing.assert_close(compiled.call(x), module(x), rtol=0, atol=0)  # the original, to the last bit
    wrong = {site.kind for site in compiled.sites if site.refusal == "WrongResult"}
    assert wrong == {kind}, [(s.kind, s.refusal, s.errors) for s in compiled.sites]
    assert all(not site.matched for site in compiled.sites)
    assert not {"mla", "mla_decode", "experts", "route"} & compiled.reports[0].op_counts.keys()
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"`{op}`" in said and "The graph runs as it was" in said


def test_the_wrong_one_of_three_sites_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three: errors don't add up from site to site, and the two others are only withdrawn with it."""
    sabotage(monkeypatch, "mla", first(1.001), only=1)
    module, x = stack(Toy, lambda: Toy(1), lambda: Toy(2))().float(), randn(*X, dtype=torch.float32)
    compiled = Compiled(module)
    torch.testing.assert_close(compiled.call(x), module(x), rtol=0, atol=0)
    assert [s.refusal for s in compiled.sites] == ["Withdrawn", "WrongResult", "Withdrawn"]
    errors = [s.errors["verify"] for s in compiled.sites]
    assert errors[1] > 5e-4 and errors[0] < 1e-5 > errors[2]


def test_a_quantised_layer_has_a_wider_bar_and_is_found_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = build(MLP()), rows(32, 128)
    right = Compiled(module, fp8="block", inner="aot_eager")
    right.call(x)
    assert {s.refusal for s in right.sites} == {"", "KeptPrecise"} or all(s.matched for s in right.sites)
    measured = [s.errors["verify"] for s in right.sites if "verify" in s.errors]
    assert measured and all(0.005 < e < measure.FP8_BAR for e in measured)
    torch._dynamo.reset()
    sabotage(monkeypatch, "fp8_linear", first(1.5))
    wrong = Compiled(module, fp8="block", inner="aot_eager")
    torch.testing.assert_close(wrong.call(x), module(x))
    assert "WrongResult" in {s.refusal for s in wrong.sites}


@pytest.mark.parametrize(
    ("kind", "make", "shape"), [("mla", Toy, X), ("experts", experts, TOKENS)], ids=["mla", "experts"]
)
def test_a_wrong_gradient_is_found(kind: str, make: Callable, shape: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = make(), []
    x = randn(*shape, dtype=next(module.parameters()).dtype).requires_grad_()
    with torch.enable_grad():
        compiled = Compiled(module)
        compiled.call(x)
        assert all(s.matched for s in compiled.sites) and compiled.sites[0].errors["verify"] < 1e-5
        torch._dynamo.reset()
        if kind == "mla":
            calls = sabotage(monkeypatch, "mla_backward", first(1.01))
        else:
            right = ops_experts.gated_backward
            monkeypatch.setattr(
                ops_experts, "gated_backward", lambda *args: calls.append(args) or first(1.01)(right(*args))
            )
        wrong = Compiled(module)
        wrong.call(x)
    assert calls, "the backward ran"
    (bad,) = [s for s in wrong.sites if s.refusal == "WrongResult"]
    assert bad.kind == kind and "the gradient of" in bad.reason


def test_an_operator_that_raises_is_not_compared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def change(out: Any) -> Any:
        raise MemoryError("none left")

    sabotage(monkeypatch, "mla", change, only=0)
    compiled = Compiled(Toy())
    compiled.call(randn(*X))
    assert "not checked" in compiled.note and "none left" in compiled.note
    assert "the graph is used unchecked" in caplog.text
    torch._dynamo.reset()
    sabotage(monkeypatch, "mla", change, only=0)
    with pytest.raises(Exception, match="The graph can't be verified.*none left.*Without verify"):
        Compiled(Toy(), strict=True).call(randn(*X))


# ------------------------------------------------------------------ right ones cost nothing


class Cached(Toy):
    """Writes its latent into a cache, counts its calls, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, S, 16, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q_nope, q_rope, latent, k_rope = self.parts(x)
        self.cache[..., :12] += latent
        self.cache[..., 12:].copy_(k_rope.squeeze(1))
        self.calls.add_(1)
        k_nope, v = self.up(self.cache[..., :12])
        return self.dropout(self.finish(q_nope, q_rope, k_nope, self.cache[..., 12:].unsqueeze(1), v))


def test_state_advances_once_and_the_random_state_is_untouched() -> None:
    eager, ours, x = Cached(), Cached(), randn(*X)
    compiled = Compiled(ours)
    results = []
    for module, call in ((eager, eager), (ours, compiled.call)):
        torch.manual_seed(3)
        results.append((call(x.clone()), torch.rand(3), module.cache.clone(), module.calls.clone()))
    torch.testing.assert_close(results[1], results[0])
    assert ours.calls == 1 and compiled.sites[0].matched and compiled.sites[0].errors["verify"] < 1e-12


def test_inputs_that_share_memory_share_it_in_the_copies() -> None:
    """Two views of one tensor: what is written through one is read through the other."""

    def forward(self: Toy, x: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        whole.mul_(2)
        return Toy.forward(self, x)

    whole = randn(4, S, D)
    same_as_eager(lambda: toy(forward=forward)(), (whole[:2].clone(), whole.clone()))
    copy, module = whole.clone(), toy(forward=forward)()
    compiled = Compiled(module)
    y, expected = compiled.call(copy[:2], copy), Toy().forward(whole[:2] * 2)
    torch.testing.assert_close(y, expected)
    assert compiled.sites[0].errors.get("verify", 0.0) < 1e-12 and torch.equal(copy, 2 * whole)


def test_a_parameter_that_the_graph_writes_is_written_once() -> None:
    def forward(self: Toy, x: torch.Tensor) -> torch.Tensor:
        y = Toy.forward(self, x)
        self.o.weight += 1
        return y

    module, before = toy(forward=forward)(), Toy().o.weight.clone()
    compiled = Compiled(module)
    compiled.call(randn(*X))
    assert compiled.sites[0].matched
    torch.testing.assert_close(module.o.weight.detach(), before + 1)


def test_it_runs_once_a_graph_and_only_with_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    run = verify.run
    monkeypatch.setattr(verify, "run", lambda *args: runs.append(args) or run(*args))
    compiled, x = Compiled(Toy()), randn(*X)
    for _ in range(3):
        compiled.call(x)
    assert len(runs) == 1
    Compiled(lambda x: x + 1).call(x)  # nothing was rewritten
    Compiled(Toy(), verify=False).call(x)
    assert len(runs) == 1


def test_symbolic_lengths() -> None:
    compiled, module = Compiled(Toy()), Toy()
    for length in (S, S + 3, S + 8):
        x = randn(2, length, D)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled.call(x), module(x))
    assert [s.errors["verify"] < 1e-12 for s in compiled.sites] == [True]


def test_bodies_of_checkpoints_are_compared() -> None:
    layer = toy(forward=lambda self, x: checkpoint(lambda x: Toy.forward(self, x), x, use_reentrant=False))
    with torch.enable_grad():
        compiled = Compiled(stack(layer, layer)())
        compiled.call(randn(*X).requires_grad_())
    assert [s.errors["verify"] < 1e-11 for s in compiled.sites] == [True, True]


def test_inference_mode_and_autocast() -> None:
    with torch.inference_mode():
        compiled = Compiled(Toy())
        compiled.call(randn(*X))
        assert compiled.sites[0].errors["verify"] < 1e-12
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        compiled = Compiled(Toy(dtype=torch.float32))
        compiled.call(randn(*X, dtype=torch.float32))
        assert 1e-4 < compiled.sites[0].errors["verify"] < 2e-2  # bfloat16's rounding, not float32's


def test_every_form_of_a_site_is_compared_with_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """mla becomes mla_decode: compared is what runs in the end, once."""
    absorbed(monkeypatch)
    calls = sabotage(monkeypatch, "mla", lambda out: out)
    compiled = Compiled(Toy())
    compiled.call(randn(*X))
    assert compiled.note.startswith("1 of 1 replaced values compared") and not calls
    assert [r.name for r in compiled.reports[0].rewrites] == [recognize_mla.NAME, absorb.NAME]


BAR = measure.BARS[torch.bfloat16]


@pytest.mark.parametrize(
    "name", ["deepseek_v3/static_decode", pytest.param("deepseek_v3/train_autocast", marks=pytest.mark.slow)]
)
def test_a_real_model(name: str) -> None:
    from dscompile import report
    from tests.models.harness import run_case

    report.clear()
    run_case(by_name(name), {"inner": "eager", "verify": True})
    sites = [site for one in report.reports() for site in one.sites]
    beyond = [(s.kind, s.refusal, s.reason, s.errors) for s in sites if not s.matched or s.errors["verify"] > BAR]
    assert sites and not beyond


def test_weights_in_front_of_the_ids_that_were_chosen() -> None:
    """With one expert a token nothing normalises the weights: they are replaced before the ids are there."""

    def layer(x: torch.Tensor, gate: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
        weight, idx = torch.topk((x @ gate.t()).softmax(-1), 1)
        ids = idx.reshape(-1)
        rows = x.repeat_interleave(1, 0)
        g, up = torch.bmm(w_gate_up[ids], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        z = torch.bmm(w_down[ids], (torch.nn.functional.silu(g) * up).unsqueeze(-1)).squeeze(-1)
        return z * weight

    compiled = Compiled(layer, strict=True)
    inputs = randn(5, 8), randn(6, 8), randn(6, 14, 8), randn(6, 8, 7)
    torch.testing.assert_close(compiled.call(*inputs), layer(*inputs))
    assert compiled.note.startswith("3 of 3 replaced values compared")


# ------------------------------------------------------------------ the yardstick


def test_the_worst_row_decides() -> None:
    x = randn(1000, 8)
    y = x.clone()
    y[17] *= 1.5
    assert measure.error(y, x) > 0.1 > (y - x).norm() / x.norm() * 2
    assert measure.error(x, x) == 0 and measure.error(x[:1], x) == measure.WRONG
    tiny = torch.cat([x, torch.full((1, 8), 1e-30, dtype=x.dtype)])
    assert measure.error(tiny + 1e-20, tiny) < 1e-12  # a row of almost nothing is measured by the others


def test_rows_that_the_original_lost_are_left_out() -> None:
    x, nan = randn(4, 3), float("nan")
    lost = x.index_fill(0, torch.tensor([1]), nan)
    assert measure.error(x, lost) == 0 and measure.error(lost, x) == measure.WRONG


def test_the_option() -> None:
    assert Config.of(None, {"verify": True}).verify and not Config.of().verify
