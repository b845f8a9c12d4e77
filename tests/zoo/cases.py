"""The list of zoo cases. A case's name is `family/variant`; its tags say which suites pick it up.

Written here are modules by hand and variants of real models; the models themselves in all their modes are the cells of
`matrix.py`, tagged so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.zoo import expert_near_misses, hf, matrix, near_misses
from tests.zoo.case import Example, Precision, ZooCase
from tests.zoo.experts import Layer, TitanMoE, ToyExperts
from tests.zoo.reference_form import ReferenceMLA
from tests.zoo.toy import Form, ToyMLA


def _activations(precision: Precision, *shape: int, seed: int = 1) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(precision.weights).to(precision.working)


def _module(build: Callable[[], nn.Module], precision: Precision) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return precision.settle(build())


def _toy(build: Callable[[], nn.Module], training: bool, precision: Precision) -> Example:
    return Example(_module(build, precision).train(training), (_activations(precision, 2, 10, 64),), {})


def _toy_padded(form: Form, precision: Precision) -> Example:
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[0, 7:] = False
    module = _module(partial(ToyMLA, form), precision).eval()
    return Example(module, (_activations(precision, 2, 10, 64), keep), {})


def _toy_lengths(form: Form, precision: Precision) -> Example:
    first, *rest = [(_activations(precision, 2, S, 64, seed=S),) for S in (10, 17, 29, 23)]
    return Example(_module(partial(ToyMLA, form), precision).eval(), first, {}, tuple(rest))


def _reference(form: Any, steps: int, precision: Precision) -> Example:
    """A prompt of 10 tokens and `steps` single tokens behind it."""
    module = _module(partial(ReferenceMLA, form), precision).eval()
    more = tuple((_activations(precision, 2, 1, 64, seed=9 + i), 10 + i) for i in range(steps))
    return Example(module, (_activations(precision, 2, 10, 64), 0), {}, more)


def _toys() -> list[ZooCase]:
    forms = {
        "plain": Form(),
        "one_query_projection": Form(q_lora=False),
        "fused_down_projections": Form(fused_a=True),
        "separate_up_projections": Form(kv_b="separate"),
        "einsum_up_projection": Form(kv_b="einsum"),
        "copies_and_clones": Form(noise=True),
        "rope_interleaved": Form(rope="interleaved"),
        "rope_deinterleaved": Form(rope="deinterleaved"),
        "rope_complex": Form(rope="complex"),
        "rope_none": Form(rope="none"),
        "rope_reflection": Form(rope="reflection"),
        "rope_first": Form(order="rope_first"),
        "eager_triu": Form(attention="eager"),
        "eager_tril": Form(attention="eager", mask="tril"),
        "eager_unmasked": Form(attention="eager", mask="none"),
        "tril_mask": Form(mask="tril"),
        "triu_mask": Form(mask="triu"),
        "bidirectional": Form(mask="none"),
        "three_heads": Form(heads=3),
        "own_scale": Form(scale=0.3),
    }
    cases = [
        ZooCase(f"toy/{name}", partial(_toy, partial(ToyMLA, form), False), tags=frozenset({"toy"}))
        for name, form in forms.items()
    ]
    cases += [
        # The scale is folded into a factor of the query or key: matched or left alone, never lost.
        ZooCase(
            f"toy/scaled_{factor}",
            partial(_toy, partial(ToyMLA, Form(scale_on=factor)), False),
            sites=None,
            tags=frozenset({"toy"}),
        )
        for factor in ("query", "key")
    ]
    tags = frozenset({"toy"})
    return [
        *cases,
        ZooCase("toy/padding_mask", partial(_toy_padded, Form(mask="padding")), "padded", tags=tags),
        ZooCase(
            "toy/eager_padding_mask",
            partial(_toy_padded, Form(mask="padding", attention="eager")),
            "padded",
            tags=tags,
        ),
        ZooCase("toy/lengths", partial(_toy_lengths, Form()), "lengths", graphs=2, tags=tags),
        ZooCase("toy/train", partial(_toy, partial(ToyMLA, Form()), True), "train", tags=tags),
        ZooCase("toy/train_eager", partial(_toy, partial(ToyMLA, Form(attention="eager")), True), "train", tags=tags),
        ZooCase("toy/no_attention", partial(_toy, near_misses.NoAttention, False), sites=0, tags=tags),
    ]


def _near_misses() -> list[ZooCase]:
    eager = Form(attention="eager")
    refused: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "sliding_window": (partial(ToyMLA, Form(mask="window")), "SlidingWindow"),
        "returned_weights": (partial(near_misses.ReturnedWeights, eager), "ProbabilitiesUsed"),
        "sinks": (partial(near_misses.Sinks, eager), "SoftmaxSink"),
        "softcap": (partial(near_misses.Softcap, eager), "NotBilinear"),
        "per_head_rope_key": (partial(near_misses.PerHeadRopeKey, Form()), "PerHeadRopeKey"),
        "up_projection_bias": (partial(near_misses.UpProjectionBias, Form()), "UpProjectionBias"),
        "two_latents": (partial(near_misses.TwoLatents, Form(kv_b="separate")), "DifferentLatents"),
        "grouped_heads": (partial(near_misses.GroupedHeads, Form()), "GroupedHeads|RowsDisagree"),
    }
    tags = frozenset({"near_miss"})
    cases = [
        ZooCase(f"near_miss/{name}", partial(_toy, build, False), sites=0, refusal=refusal, tags=tags)
        for name, (build, refusal) in refused.items()
    ]
    for attention in ("sdpa", "eager"):
        build = partial(ToyMLA, Form(attention=attention, dropout=0.1))  # type: ignore[arg-type]
        cases.append(
            ZooCase(
                f"near_miss/dropout_{attention}",
                partial(_toy, build, True),
                "train",
                sites=0,
                refusal="AttentionDropout",
                random=True,
                tags=tags,
            )
        )
        # The same module in evaluation draws nothing and is matched.
        cases.append(ZooCase(f"toy/idle_dropout_{attention}", partial(_toy, build, False), tags=frozenset({"toy"})))
    return cases


def _references() -> list[ZooCase]:
    tags = frozenset({"reference"})
    return [
        ZooCase("reference/naive", partial(_reference, "naive", 0), tags=tags),
        ZooCase("reference/absorbed_prefill", partial(_reference, "absorbed", 0), tags=tags),
        # One graph for the prompt, one for the first step, one for every later step: start_pos is a Python int.
        ZooCase("reference/absorbed_decode", partial(_reference, "absorbed", 5), "dynamic_decode", graphs=3, tags=tags),
        ZooCase(
            "reference/cached_heads_decode",
            partial(_reference, "cached_heads", 5),
            "dynamic_decode",
            sites=0,
            refusal="NoUpProjection",
            graphs=3,
            tags=tags,
        ),
    ]


def _toy_experts(build: Callable[[], nn.Module], training: bool, precision: Precision) -> Example:
    return Example(_module(build, precision).train(training), (_activations(precision, 2, 7, ToyExperts.D),), {})


def _experts() -> list[ZooCase]:
    """Expert layers by hand; `tests/passes/test_recognize_experts.py` has every form and near miss."""
    forms: dict[str, Callable[[], nn.Module]] = {
        "grouped": ToyExperts,
        "batched": partial(ToyExperts, Layer(products="batched")),
        "clamped": partial(ToyExperts, Layer(activation="oai", weights="interleaved", bias=True, stored="in_out")),
        "sentinels": partial(ToyExperts, Layer(sentinels=True)),
        "one_choice": partial(ToyExperts, Layer(top_k=1)),
        "titan": TitanMoE,
    }
    refused: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
        "capacity": (expert_near_misses.Capacity, "GroupEnds", 1),
        "mean_of_experts": (expert_near_misses.Mean, "CombineForm", 1),
        "scores_before_experts": (partial(TitanMoE, True), "RoutingWeights", 1),
    }
    base: dict[str, Any] = {"sites": 0, "tags": frozenset({"experts"})}
    return [
        *(
            ZooCase(f"experts/{name}", partial(_toy_experts, build, False), experts=1, routers=1, **base)
            for name, build in forms.items()
        ),
        ZooCase("experts/train", partial(_toy_experts, ToyExperts, True), "train", experts=1, routers=1, **base),
        *(
            ZooCase(f"near_miss/{name}", partial(_toy_experts, build, False), refusal=why, routers=routers, **base)
            for name, (build, why, routers) in refused.items()
        ),
    ]


def _hf(
    name: str,
    run: Callable[..., Example],
    model_type: str,
    *,
    run_options: dict[str, Any] | None = None,
    tags: tuple[str, ...] = (),
    overrides: dict[str, Any] | None = None,
    **expected: Any,
) -> ZooCase:
    """A case of a transformers model: `run` turns the built model into an example."""

    def make(precision: Precision) -> Example:
        return run(hf.build_model(model_type, precision, **(overrides or {})), **(run_options or {}))

    # transformers' normalisation, rotation and router cast to float32 inside: wider arithmetic would not reach them.
    experts = hf.expert_layers(model_type, **(overrides or {}))
    expected = {"sites": hf.LAYERS, "widest": torch.float32, "experts": experts, "routers": experts, **expected}
    return ZooCase(name, make, tags=frozenset({"hf", *tags}), **expected)


def _huggingface() -> list[ZooCase]:
    v3 = partial(_hf, model_type="deepseek_v3")
    variants = {
        "one_query_projection": {"q_lora_rank": None},
        "yarn": {"rope_parameters": hf.YARN},
        "attention_bias": {"attention_bias": True},
        "rope_half": {"rope_interleave": False},
    }
    core, dense = ("core",), {"num_hidden_layers": 1}
    cases = [
        v3(f"deepseek_v3/{name}", hf.prefill, overrides={**dense, **overrides}, sites=1)
        for name, overrides in variants.items()
    ]
    cases += [
        v3("deepseek_v3/eager", hf.prefill, overrides={"attention": "eager"}, tags=core),
        v3("deepseek_v3/three_layers", hf.prefill, overrides={"num_hidden_layers": 3}, sites=3),
        v3("deepseek_v3/lengths", hf.lengths, mode="lengths", graphs=2),
        v3(
            "deepseek_v3/padded_eager",
            hf.padded,
            mode="padded",
            run_options={"compare_padding": False},
            overrides={**dense, "attention": "eager"},
            sites=1,
        ),
        # In 5.17 and 5.12 no backend can compile the backward of the experts' float32 fallback.
        v3("deepseek_v3/train_dense", hf.train, mode="train", overrides=dense, sites=1, tags=core),
        v3("deepseek_v3/train_eager", hf.train, mode="train", overrides={**dense, "attention": "eager"}, sites=1),
        v3("deepseek_v3/train_checkpointing", hf.train, mode="train", run_options={"checkpointing": True}),
        v3("deepseek_v3/train_autocast", hf.train, mode="train", autocast=torch.bfloat16),
        v3("deepseek_v3/autocast", hf.prefill, overrides=dense, autocast=torch.bfloat16, sites=1),
        v3(
            "near_miss/deepseek_v3_dropout",
            hf.train,
            mode="train",
            overrides={**dense, "attention_dropout": 0.1},
            sites=0,
            refusal="AttentionDropout",
            random=True,
            tags=("near_miss",),
        ),
        v3(
            "near_miss/deepseek_v3_output_attentions",
            hf.returning_attentions,
            overrides={**dense, "attention": "eager"},
            sites=0,
            refusal="ProbabilitiesUsed",
            tags=("near_miss",),
        ),
    ]
    lite = {"q_lora_rank": None, "topk_method": "greedy"}
    v2 = partial(_hf, model_type="deepseek_v2")
    cases += [
        v2("deepseek_v2_lite/train_dense", hf.train, overrides={**lite, **dense}, mode="train", sites=1),
        # Grouped-query attention: only the expert layers are ours.
        _hf("mixtral/lengths", hf.lengths, "mixtral", sites=None, mode="lengths", graphs=2),
        _hf(
            "gpt_oss/batched",
            hf.prefill,
            "gpt_oss",
            sites=None,
            overrides={"attention": "eager", "experts": "batched_mm"},
        ),
        _hf("glm4_moe/prefill", hf.prefill, "glm4_moe", sites=None),
    ]
    # 5.12's group-limited router reads an attribute that its MoE module does not have.
    if hf.VERSION >= (5, 15):
        cases.append(v2("deepseek_v2/group_limited", hf.prefill))
    return cases


def _collect() -> dict[str, ZooCase]:
    cases: dict[str, ZooCase] = {}
    by_hand = [*_toys(), *_near_misses(), *_references(), *_experts(), *_huggingface()]
    for case in [*by_hand, *(cell.case for cell in matrix.cells())]:
        if case.name in cases:
            raise ValueError(f"two zoo cases are named {case.name!r}")
        cases[case.name] = case
    return cases


CASES = _collect()


def by_name(name: str) -> ZooCase:
    """The case of that name.

    Raises:
        KeyError: lists the known names.
    """
    if name not in CASES:
        raise KeyError(f"no zoo case {name!r}; known: {', '.join(CASES)}")
    return CASES[name]


def select(*tags: str, mode: str | None = None) -> list[ZooCase]:
    """Cases that carry every one of `tags` and, if given, run in `mode`."""
    return [c for c in CASES.values() if c.tags.issuperset(tags) and mode in (None, c.mode)]
