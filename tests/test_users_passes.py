"""A user's own Inductor passes beside ours: which run, in which order, how often, and what is left set afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._inductor import config, custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from torch._inductor.utils import fresh_cache

from dscompile.lowering import inductor
from tests.passes.toy import D, S, Toy, randn

HOOKS = (
    "pre_grad_custom_pass",
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "_pre_fusion_custom_pass",
    "_post_fusion_custom_pass",
)


class Fails(Exception):
    pass


@pytest.fixture(autouse=True)
def empty_caches() -> Iterator[None]:
    """A compilation that is served from a cache runs no pass."""
    with fresh_cache():
        yield
    torch._dynamo.reset()


class Named(CustomGraphPass):
    """A pass that notes that it ran, with a name for the caches."""

    def __init__(self, name: str, ran: list[str]):
        self.name, self.ran = name, ran

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.ran.append(self.name)

    def uuid(self) -> str:
        return self.name


def noting(name: str, ran: list[str]) -> Callable[[Any], Any]:
    """A bare function for a hook: without a name for the caches."""

    def note(graph: Any) -> Any:
        ran.append(name)
        return graph if "fusion" in name else None  # those of the scheduler return its nodes

    return note


def small(x: torch.Tensor) -> torch.Tensor:
    return x @ x  # products alone, forward and backward: nothing for a C++ compiler to do


def step(backend: str, function: Callable, x: torch.Tensor, **settings: Any) -> torch.Tensor:
    """One forward and backward; -> the gradient."""
    torch._dynamo.reset()
    x = x.clone().requires_grad_()
    torch.compile(function, backend=backend, **settings)(x).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("place", ["config", "options"])
def test_every_hook_runs_as_with_inductor_alone(place: str) -> None:
    ran: dict[str, list[str]] = {}
    for backend in ("inductor", "dsinfra"):
        hooks = {hook: noting(hook, ran.setdefault(backend, [])) for hook in HOOKS}
        with config.patch(hooks if place == "config" else {}):
            step(backend, small, torch.ones(4, 4), options=hooks if place == "options" else None)
    assert ran["dsinfra"] == ran["inductor"] and set(HOOKS) == set(ran["inductor"])


def test_hooks_of_the_moment_when_the_backward_is_compiled() -> None:
    """Inductor compiles a backward when it first runs, with the passes that are set then; so do we."""
    ran: dict[str, list[str]] = {}
    for backend in ("inductor", "dsinfra"):
        names = ran.setdefault(backend, [])
        torch._dynamo.reset()
        x = torch.ones(4, 4, requires_grad=True)
        with config.patch(inductor.HOOK, noting("forward", names)):
            loss = torch.compile(small, backend=backend)(x)
        with config.patch(inductor.HOOK, noting("backward", names)):
            loss.sum().backward()
    assert ran["dsinfra"] == ran["inductor"] == ["forward", "backward"]


@pytest.mark.skipif(not inductor.TAKES_LISTS, reason="versions: a torch whose hooks hold several passes")
def test_lists_of_passes_and_passes_that_ask_for_inference() -> None:
    ran: dict[str, list[str]] = {}

    class Aware(custom_graph_pass.CustomInferenceAwareGraphPass):
        def __init__(self, names: list[str]):
            self.names = names

        def __call__(self, graph: torch.fx.Graph, is_inference: bool) -> None:
            self.names.append(f"inference={is_inference}")

        def uuid(self) -> str:
            return "aware"

    for backend in ("inductor", "dsinfra"):
        names = ran.setdefault(backend, [])
        with config.patch(inductor.HOOK, [Named("a", names), Aware(names), Named("b", names)]):
            step(backend, small, torch.ones(4, 4))
    assert ran["dsinfra"] == ran["inductor"] == 2 * ["a", "inference=False", "b"]


def test_a_torch_with_one_pass_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "TAKES_LISTS", False)
    ran: list[str] = []
    stamp = inductor.Stamp("ours")
    alone, beside = inductor.stamped(None, stamp), inductor.stamped(Named("a", ran), stamp)
    assert alone is stamp and alone.uuid() == "dsinfra:ours"
    assert beside.uuid() == ("a", "dsinfra:ours")
    assert inductor.stamped(beside, inductor.Stamp("new")).uuid() == ("a", "dsinfra:new")
    assert inductor.stamped(noting("b", ran), stamp).uuid() is None  # as without us: not cached
    with config.patch(inductor.HOOK, Named("a", ran)):
        step("dsinfra", small, torch.ones(4, 4))
    assert ran == ["a", "a"]


def test_a_pattern_of_the_users_is_applied() -> None:
    """Also to what stands around our operators: the user's pass sees the rewritten graph."""
    patterns = PatternMatcherPass()
    register_replacement(
        lambda x: torch.ops.aten.sin.default(x),
        lambda x: torch.ops.aten.cos.default(x),
        [torch.ones(2, S, D, dtype=torch.float64)],
        fwd_only,
        patterns,
    )
    seen: list[str] = []

    def own(graph: torch.fx.Graph) -> None:
        patterns.apply(graph)
        seen.extend(str(node.target) for node in graph.nodes)
        raise Fails  # before code is generated: that would be most of the test's time

    attention = Toy()
    with torch.no_grad(), pytest.raises(Exception, match="Fails"):
        torch.compile(lambda x: attention(x).sin(), backend="dsinfra", options={inductor.HOOK: own})(randn(2, S, D))
    assert {"dsinfra.mla.default", "aten.cos.default"} <= set(seen) and "aten.sin.default" not in seen


@pytest.mark.parametrize("fails", [False, True], ids=["compiles", "raises"])
@pytest.mark.parametrize("place", ["config", "options"])
def test_nothing_is_left_set(place: str, fails: bool) -> None:
    def own(graph: torch.fx.Graph) -> None:
        if fails:
            raise Fails

    hooks = {inductor.HOOK: own, "max_autotune": False, "triton.cudagraphs": False}
    with config.patch({inductor.HOOK: own} if place == "config" else {}):
        before, digest = config.get_config_copy(), config.get_hash()
        expected = pytest.raises(Exception, match="Fails") if fails else contextlib.nullcontext()
        with expected:
            step("dsinfra", small, torch.ones(4, 4), options=hooks if place == "options" else {})
        assert config.get_config_copy() == before and config.get_hash() == digest
        assert getattr(config, inductor.HOOK) is (own if place == "config" else None)
