"""The zoo's matrix: real models, each in every mode that it has, with what must be lowered and what must be refused.

Rows are models, columns are modes; a cell is a case of the zoo with the exact number of sites of each kind over all of
its graphs. A row belongs to one version of a library: rows of other versions run where that version is the one that
imports. `micro` is for CPUs; `true` has the widths of the kernels, for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.zoo import fp8, hf, reference_model, titan
from tests.zoo.case import MICRO_SIZE, TRUE_SIZE, Example, Mode, Precision, Size, ZooCase

MODES: tuple[Mode, ...] = ("prefill", "padded", "packed", "static_decode", "dynamic_decode", "generate", "train")

# Where code generation isn't the point: AOTAutograd matters for these, the rest runs the rewritten graph as it is.
THROUGH_AUTOGRAD = ("prefill", "train")

BFLOAT16 = Precision(torch.bfloat16)


@dataclass(frozen=True)
class Cell:
    """One model in one mode.

    row: the model, as the table names it. case: what runs. lowered: lowered sites by kind, over all graphs. refused:
    refused sites by `kind: class of the refusal`, over all graphs.
    """

    row: str
    case: ZooCase
    lowered: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, str]:
        """The inner compiler of a quick run."""
        return {"inner": "aot_eager" if self.case.mode in THROUGH_AUTOGRAD else "eager"}


_RUNS: dict[str, Callable[..., Example]] = {
    "prefill": hf.prefill,
    "padded": hf.padded,
    "packed": hf.packed,
    "static_decode": hf.static_decode,
    "dynamic_decode": hf.dynamic_decode,
    "generate": hf.generate,
    "train": hf.train,
}


# One layer says the same as two in these modes, in half the time.
_ONE_LAYER_MODES = ("padded", "packed", "dynamic_decode", "generate")
_ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
_DEEPSEEK = {"mla": 2, "experts": 1, "route": 1}


@dataclass(frozen=True)
class Model:
    """A row of transformers.

    overrides: its differences from the base. graph: lowered sites of one graph with two layers; one_layer: with one,
    None where the model needs both. lowered: all graphs' sites in a mode, where they don't follow from those. refused:
    all graphs' refused sites in a mode.
    """

    row: str
    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    graph: Mapping[str, int] = field(default_factory=lambda: _DEEPSEEK)
    one_layer: Mapping[str, int] | None = field(default_factory=lambda: _SPARSE)
    modes: tuple[str, ...] = MODES
    fullgraph: bool = True
    lowered: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    refused: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def build(self, precision: Precision, size: Size, overrides: Mapping[str, Any]) -> Any:
        return hf.build_model(self.model_type, precision, size=size, **overrides)

    def cells(self, size: Size) -> list[Cell]:
        return [self._cell(mode, size) for mode in self.modes]

    def _cell(self, mode: str, size: Size) -> Cell:
        short = size.name == "micro" and self.one_layer is not None and mode in _ONE_LAYER_MODES
        overrides = {**self.overrides, **(_ONE_LAYER if short else {})}
        case = ZooCase(
            _name(self.row, mode, size),
            lambda precision: _RUNS[mode](self.build(precision, size, overrides)),
            mode,  # type: ignore[arg-type]
            sites=None,
            graphs=2 if mode == "dynamic_decode" else 1,
            widest=torch.float32,  # transformers casts to it inside: wider arithmetic would not reach everything
            fullgraph=self.fullgraph,
            precision=self.precision(size),
            tags=frozenset({"hf", "matrix"}),
        )
        graph = (self.one_layer if short else self.graph) or {}
        lowered = self.lowered.get(mode, {kind: case.graphs * count for kind, count in graph.items()})
        return Cell(self.row, case, lowered, self.refused.get(mode, {}))

    def precision(self, size: Size) -> Precision:
        return size.precision


class QuantisedModel(Model):
    """A row of transformers in block-scaled FP8; its reference has the dequantised weights."""

    def build(self, precision: Precision, size: Size, overrides: Mapping[str, Any]) -> Any:
        from dscompile.adapters import hf_fp8

        hf_fp8.install()
        model, twin = fp8.hf_pair(self.model_type, size=size, **overrides)
        return twin if precision.working is torch.float32 else model

    def precision(self, size: Size) -> Precision:
        return BFLOAT16


def _name(row: str, mode: str, size: Size) -> str:
    return f"{row}/{mode}" + ("" if size.name == "micro" else "/true")


_SPARSE = {"mla": 1, "experts": 1, "route": 1}
_GQA, _GQA_LAYER = {"experts": 2, "route": 2}, {"experts": 1, "route": 1}
_LITE = {"q_lora_rank": None, "topk_method": "greedy"}
_FP8 = {"mla": 2, "fp8_linear": 16, "fp8_experts": 1, "route": 1}
_FP8_LAYER = {"mla": 1, "fp8_linear": 8, "fp8_experts": 1, "route": 1}
# The second layer's router runs in the first one's graph; the loop over experts ends its own. Before 5.23 the second
# layer's cache asks for graphs of its own.
_LONGCAT = {"mla": 2, "route": 1}
_LONGCAT_DECODE = {
    mode: {"mla": number if hf.VERSION >= (5, 23) else 2 * number, "route": 1}
    for mode, number in (("static_decode", 2), ("dynamic_decode", 4))
}
_LOOP = {"experts: DataDependentLoop": 1}


def _grouped_heads() -> dict[str, dict[str, int]]:
    """Grouped-query attention is no latent attention: what fails first depends on whether keys come from a cache, and,
    where that grows, on the release's cache."""
    once = {"prefill": 2, "padded": 1, "packed": 1, "train": 2}
    found = {mode: {"mla: RowsDisagree": number} for mode, number in once.items()}
    cached = {"static_decode": {"mla: NoUpProjection": 2}, "generate": {"mla: NoUpProjection": 1}}
    dynamic = "GroupedHeads" if hf.VERSION >= (5, 23) else "NoUpProjection"
    return {**found, **cached, "dynamic_decode": {f"mla: {dynamic}": 2}}


def _expanded(experts: Mapping[str, int]) -> dict[str, Any]:
    """What a version that caches the keys and values of every head leaves of the modes over a cache."""
    graphs, attentions = dict.fromkeys(("static_decode", "generate"), 1), {"static_decode": 2, "generate": 1}
    return {
        "lowered": {mode: {k: n * number for k, n in experts.items()} for mode, number in (graphs | _TWICE).items()},
        "refused": {mode: {"mla: NoUpProjection": number} for mode, number in (attentions | _TWICE).items()},
    }


_TWICE = {"dynamic_decode": 2}  # one graph for the first length, one for every later one


MODELS = (
    Model("deepseek_v3", "deepseek_v3", **({} if hf.CACHES_LATENT else _expanded(_GQA_LAYER))),
    Model("deepseek_v2_lite", "deepseek_v2", _LITE, {**_DEEPSEEK, "rotation": 4}, {**_SPARSE, "rotation": 2}),
    QuantisedModel("deepseek_v3_fp8", "deepseek_v3", {}, _FP8, _FP8_LAYER, modes=MODES[:-1]),
    Model("deepseek_v3_batched_mm", "deepseek_v3", {"experts": "batched_mm"}),
    Model("deepseek_v32", "deepseek_v32", **({} if hf.VERSION >= (5, 23) else _expanded(_GQA_LAYER))),
    Model("minicpm3", "minicpm3", {}, {"mla": 2}, {"mla": 1}),
    Model("kimi_linear", "kimi_linear", {}, _SPARSE, None),
    Model(
        "longcat_flash",
        "longcat_flash",
        {},
        _LONGCAT,
        None,
        fullgraph=False,
        modes=("prefill", "static_decode", "dynamic_decode", "train"),  # its many graphs take long to trace
        lowered=_LONGCAT_DECODE,
        refused=dict.fromkeys(MODES, _LOOP),
    ),
    Model("qwen3_moe", "qwen3_moe", {}, _GQA, _GQA_LAYER, refused=_grouped_heads()),
    # Sinks have no SDPA form. A layer with a window has a cache, and so a graph, of its own.
    Model(
        "gpt_oss",
        "gpt_oss",
        {"attention": "eager"},
        _GQA,
        _GQA_LAYER,
        lowered={"static_decode": {"experts": 4, "route": 4}},
    ),
)


# The two kernels are opaque to every compiler, and declared; the up-projection is dequantised for the absorbed form.
_REFERENCES: tuple[tuple[str, bool, Mode, dict[str, int], dict[str, int]], ...] = (
    ("naive", False, "prefill", {"mla": 2, "rotation": 4}, {}),
    ("naive", True, "prefill", {"mla": 2, "rotation": 4, "fp8_linear": 22}, {}),
    ("absorbed", False, "prefill", {"mla": 2, "rotation": 4}, {}),
    ("absorbed", False, "dynamic_decode", {"mla": 4, "rotation": 8}, {}),
    (
        "absorbed",
        True,
        "prefill",
        {"mla": 2, "rotation": 4, "fp8_linear": 20},
        {"fp8_linear: Dequantized": 2},
    ),
    (
        "absorbed",
        True,
        "dynamic_decode",
        {"mla": 4, "rotation": 8, "fp8_linear": 31},
        {"fp8_linear: Dequantized": 4},
    ),
)


def _reference(size: Size) -> list[Cell]:
    """DeepSeek's own form, whose loop over experts ends a graph at each of its layers."""
    cells = []
    for form, quantised, mode, lowered, refused in _REFERENCES:
        row, steps = f"reference_{form}" + ("_fp8" if quantised else ""), 3 if mode == "dynamic_decode" else 0

        def make(precision: Precision, form: str = form, quantised: bool = quantised, steps: int = steps) -> Example:
            return reference_model.example(reference_model.build(form, quantised, precision, size), steps)

        case = ZooCase(
            _name(row, mode, size),
            make,
            mode,
            sites=None,
            widest=torch.float32,
            fullgraph=False,
            precision=BFLOAT16,
            tags=frozenset({"matrix"}),
        )
        cells.append(Cell(row, case, lowered, refused))
    return cells


def _titan(size: Size) -> list[Cell]:
    """torchtitan's debugmodel; flex_attention is left to Inductor without a word."""
    modes: list[tuple[str, Mode, dict[str, Any]]] = [
        ("flex", "prefill", {}),
        ("flex", "packed", {"documents": (20, 12)}),
        ("sdpa", "prefill", {}),
        ("sdpa", "train", {"train": True}),
    ]
    if size.device != "cpu":
        modes.append(("flex", "train", {"train": True}))  # flex_attention has no backward on CPUs
    cells = []
    for attention, mode, settings in modes:
        row = "torchtitan" + ("" if attention == "flex" else f"_{attention}")

        def make(precision: Precision, attention: str = attention, settings: dict[str, Any] = settings) -> Example:
            return titan.example(titan.build(precision, attention, size), **settings)

        case = ZooCase(
            _name(row, mode, size),
            make,
            mode,
            sites=None,
            widest=torch.float32,
            precision=BFLOAT16,
            tags=frozenset({"matrix"}),
        )
        # Gate and up are two weights: joined once; in training, where an expert has few rows, multiplied apart.
        lowered = {"route": 1, "rotation": 4} | ({"mla": 2} if attention == "sdpa" else {})
        cells.append(Cell(row, case, lowered | {"experts": 1}, {}))
    return cells


def cells(size: Size = MICRO_SIZE) -> list[Cell]:
    """The cells of every row whose library can be imported here."""
    found = [cell for model in MODELS for cell in model.cells(size)] + _reference(size)
    return found + (_titan(size) if titan.AVAILABLE else [])


def true_cells() -> list[Cell]:
    """The cells at the widths of the kernels, for a GPU."""
    return cells(TRUE_SIZE)
