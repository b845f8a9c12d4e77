"""A prompt of 1 x 4096 tokens through whole models, without a cache: dsinfra and Inductor in their default modes.

Before anything is timed, a model of the same widths is compared with its own weights in float32 on a shorter prompt,
and dsinfra must have lowered every layer's attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import compiled, models
from bench.compiled import Measured, Variant

GPUS = 1


@dataclass(frozen=True)
class Plan:
    """What to run."""

    prompts: tuple[tuple[str, int], ...] = (("v3x3", 4096), ("v3x3", 256), ("v2lite", 4096))
    checked_tokens: int = 1024
    warmup: int = 4
    repeats: int = 20
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    dry: bool = False


DRY = Plan((("micro", 64),), 32, 1, 3, "cpu", torch.float32, True)


def run(quick: bool = False, plan: Plan | None = None) -> list[dict[str, Any]]:
    """One row a model and prompt; quick leaves the long compilations of v2lite out."""
    plan = plan or (Plan(prompts=(("v3x3", 4096),)) if quick else Plan())
    both = compiled.variants(None, plan.dry)
    rows = []
    with torch.no_grad():
        for name in dict(plan.prompts):
            model = models.build(name, plan.device, plan.dtype, layers=2)
            _check(model, name, both, plan)
            if model.config.num_hidden_layers != models.CONFIGS[name]["num_hidden_layers"]:
                del model
                compiled.forget()
                model = models.build(name, plan.device, plan.dtype)
            for tokens in (n for other, n in plan.prompts if other == name):
                anchor, ours = (_measure(model, name, tokens, variant, plan) for variant in both)
                case = f"{name}, prompt 1 x {tokens}, {str(plan.dtype)[6:]}"
                rows.append(compiled.report_pair(case, anchor, ours, "inductor default mode, same run"))
            del model
            compiled.forget()
    return rows


def _check(model: Any, name: str, both: tuple[Variant, Variant], plan: Plan) -> None:
    ids = models.token_ids(model, 1, plan.checked_tokens)
    what = f"{name}, {model.config.num_hidden_layers} layers, prompt 1 x {plan.checked_tokens}"
    compiled.check_logits(lambda call: call(ids, use_cache=False).logits.clone(), model, both, what)


def _measure(model: Any, name: str, tokens: int, variant: Variant, plan: Plan) -> Measured:
    with compiled.from_scratch():
        ids = models.token_ids(model, 1, tokens)
        call = variant.compile(model)
        measured = compiled.measure(
            lambda: call(ids, use_cache=False), lambda: None, warmup=plan.warmup, repeats=plan.repeats
        )
        if variant.ours:
            compiled.check_all_lowered(model.config, f"{name}, {variant.name}")
        return measured


if __name__ == "__main__":
    compiled.command("prefill_model", run, partial(run, plan=DRY))
