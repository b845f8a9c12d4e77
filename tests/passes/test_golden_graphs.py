"""What each pass does to the graphs of the toys, as golden texts that a person has read.

A text holds Dynamo's graph and, for each pass that changed it, the lines that it took away and wrote. Values are named
by their operator and a number that stays with them, so that a rewrite shows as the few lines it is. `make golden`
accepts new texts.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx, nn

from dscompile.passes import pipeline
from tests import golden
from tests.passes.toy import D, Toy, randn, sdpa, toy
from tests.zoo.experts import Layer, ToyExperts
from tests.zoo.near_misses import Softcap
from tests.zoo.reference_form import ReferenceMLA
from tests.zoo.toy import Form, ToyMLA

LENGTHS = {"dynamic": True}  # of torch.compile


class Labels:
    """A name for each value: its operator and a number, kept from pass to pass."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, str] = {}
        self.counts: Counter[str] = Counter()

    def __call__(self, node: fx.Node) -> str:
        if node not in self.known:
            kind = target(node)
            if node.op in ("placeholder", "get_attr"):
                kind = re.sub(r"^[Ll]_|self_|modules_|parameters_|buffers_|_$", "", str(node.target))
            self.counts[kind] += 1
            self.known[node] = f"%{kind}" + (f".{self.counts[kind]}" if self.counts[kind] > 1 else "")
        return self.known[node]


def target(node: fx.Node) -> str:
    """What the node calls, as people call it."""
    if node.op in ("placeholder", "output"):
        return node.op
    if isinstance(node.target, str):
        return node.target
    if hasattr(node.target, "_schema"):
        return str(node.target).removesuffix(".default").replace(".", "::", 1)
    return getattr(node.target, "__name__", str(node.target))


def lines(module: fx.GraphModule, labels: Labels) -> list[str]:
    """A line a node: name, shape, dtype, call."""
    found = []
    for node in module.graph.nodes:
        if node.op == "output":
            found.append(f"return {text(node.args[0], labels)}")
            continue
        value = node.meta.get("example_value")
        shape = f": {short(value.dtype)}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
        if node.op == "placeholder":
            found.append(f"{labels(node)}{shape}")
            continue
        arguments = [text(a, labels) for a in node.args]
        arguments += [f"{k}={text(v, labels)}" for k, v in node.kwargs.items()]
        found.append(f"{labels(node)}{shape} = {target(node)}({', '.join(arguments)})")
    return found


def text(value: Any, labels: Labels) -> str:
    """An argument: values by their names, numbers that no platform prints alike rounded."""
    if isinstance(value, fx.Node):
        return labels(value)
    if isinstance(value, (list, tuple)):
        inside = ", ".join(text(v, labels) for v in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, slice):
        return ":".join("" if v is None else text(v, labels) for v in (value.start, value.stop, value.step))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")


class Recorder:
    """Observes the passes of one compilation."""

    def __init__(self) -> None:
        self.labels = Labels()
        self.parts: list[str] = []
        self.before: list[str] = []

    def observe(self, name: str, stage: str, module: fx.GraphModule) -> None:
        if name == "shadow":
            return
        found = lines(module, self.labels)
        if stage == "before":
            if not self.parts:
                self.parts += ["Dynamo's graph", *(f"  {line}" for line in found)]
            self.before = found
            return
        changes = [x for x in difflib.ndiff(self.before, found) if x[0] in "+-"]
        if changes:
            self.parts += ["", f"{name}:", *(f"  {x[0]} {x[2:]}" for x in changes)]

    def text(self) -> str:
        """With symbolic sizes numbered in the order in which they occur."""
        found = "\n".join(self.parts)
        symbols = list(dict.fromkeys(re.findall(r"\bs\d+\b", found)))
        return re.sub(r"\bs\d+\b", lambda m: f"s{symbols.index(m[0])}", found)


def graphs(model: nn.Module, calls: list[tuple], train: bool, fp8: str | None, settings: dict[str, Any]) -> str:
    """The text of every graph that the calls compile."""
    recorders: list[Recorder] = []

    def backend(module: fx.GraphModule, inputs: list) -> Callable:
        recorders.append(Recorder())
        outcome = pipeline.run(module, inputs, strict=True, observe=recorders[-1].observe, fp8=fp8)
        sites = [
            f"{s.kind} {'lowered: ' + s.form if s.matched else s.refusal + ': ' + s.reason}" for s in outcome.sites
        ]
        recorders[-1].parts += ["", *sites]
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, **settings)
    with torch.set_grad_enabled(train):
        for inputs in calls:
            compiled(*inputs)
    return "\n\n\n".join(r.text() for r in recorders)


def masked(self: Toy, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention written out, with a mask of minus infinity."""
    hidden = torch.full((q.shape[2], k.shape[2]), -torch.inf, dtype=q.dtype).triu(1)
    scores = q @ k.transpose(2, 3) * 0.3 + hidden
    return scores.softmax(-1) @ v


def filled(self: Toy, q_nope, q_rope, k_nope, k_rope, v):  # type: ignore[no-untyped-def]
    """Query and key filled in place into fresh tensors, as DeepSeek's own code for transformers does."""
    q = q_nope.new_empty(*q_nope.shape[:3], q_nope.shape[3] + q_rope.shape[3])
    q[..., : q_nope.shape[3]], q[..., q_nope.shape[3] :] = q_nope, q_rope
    k = k_nope.new_empty(q.shape)
    k[..., : q_nope.shape[3]], k[..., q_nope.shape[3] :] = k_nope, k_rope
    return self.o(sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


X = (randn(2, 10, D),)
WIDE = (randn(2, 10, ToyMLA.D, dtype=torch.float32),)
TOKENS = (randn(2, 3, ToyExperts.D, dtype=torch.float32),)
STEPS = [(randn(2, 10, 64, dtype=torch.float32), 0), (randn(2, 1, 64, dtype=torch.float32), 10)]

# name: (module, calls, training, what torch.compile is asked for)
CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple], bool, dict[str, Any]]] = {
    "mla_causal": (Toy, [X], False, {}),
    "mla_training": (Toy, [X], True, {}),
    "mla_lengths": (Toy, [X], False, LENGTHS),
    "mla_written_out": (toy(attend=masked), [X], False, {}),
    "mla_filled": (toy(finish=filled), [X], False, {}),
    "mla_fused_down": (partial(ToyMLA, Form(fused_a=True, rope="complex", mask="tril")), [WIDE], False, {}),
    "mla_softcap_refused": (partial(Softcap, Form(attention="eager")), [WIDE], False, {}),
    "mla_absorbed_steps": (partial(ReferenceMLA, "absorbed"), STEPS, False, {}),
    "experts_grouped": (ToyExperts, [TOKENS], False, {}),
    "experts_batched": (partial(ToyExperts, Layer(products="batched", weigh="einsum")), [TOKENS], False, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_graphs(name: str) -> None:
    golden.newest_torch_only()
    make, calls, train, settings = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().train(train)
    golden.check(f"graphs/{name}", graphs(model, calls, train, None, settings))


def test_golden_graph_of_fp8() -> None:
    golden.newest_torch_only()
    text = graphs(Toy(dtype=torch.bfloat16), [(randn(2, 10, D, dtype=torch.bfloat16),)], False, "block", {})
    golden.check("graphs/mla_fp8_asked", text)
