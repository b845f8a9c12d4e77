"""A training step of one mixture-of-experts layer with DeepSeek-V3's widths: forward and backward of 4096 tokens.

Gradients of every parameter are computed; no optimizer runs. Before anything is timed, the gradient of the input is
compared with that of the same weights in float32 on fewer tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import compiled, models
from bench.compiled import Measured, Variant
from bench.results import check

GPUS = 1


@dataclass(frozen=True)
class Plan:
    """What to run."""

    name: str = "v3layer"
    tokens: int = 4096
    checked_tokens: int = 256
    warmup: int = 3
    repeats: int = 10
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    dry: bool = False


DRY = Plan("microlayer", 64, 32, 1, 2, "cpu", torch.float32, True)


def run(quick: bool = False, plan: Plan | None = None) -> list[dict[str, Any]]:
    """One row: a step by dsinfra beside one by Inductor."""
    plan = plan or Plan()
    both = compiled.variants(None, plan.dry)
    model = models.build(plan.name, plan.device, plan.dtype).model.train()
    _check(model, both, plan)
    anchor, ours = (_measure(model, variant, plan) for variant in both)
    case = f"{plan.name}, forward and backward, 1 x {plan.tokens}, {str(plan.dtype)[6:]}"
    return [compiled.report_pair(case, anchor, ours, "inductor default mode, same run")]


def _random(model: Any, tokens: int, seed: int) -> torch.Tensor:
    weight = next(model.parameters())
    generator = torch.Generator(weight.device).manual_seed(seed)
    shape = (1, tokens, model.config.hidden_size)
    # Drawn in one dtype whatever the model's, so that a wider copy of the model sees equal values.
    drawn = torch.randn(shape, device=weight.device, dtype=torch.bfloat16, generator=generator)
    return drawn.to(weight.dtype)


@dataclass
class Step:
    """One step of `call`, which is `model` or its compiled form; the gradient of the input stays in `x.grad`."""

    model: Any
    call: Any
    tokens: int

    def __post_init__(self) -> None:
        self.x = _random(self.model, self.tokens, 2).requires_grad_()
        self.direction = _random(self.model, self.tokens, 3)

    def __call__(self) -> None:
        self.model.zero_grad()
        self.x.grad = None
        self.call(inputs_embeds=self.x, use_cache=False).last_hidden_state.backward(self.direction)

    def gradient(self) -> torch.Tensor:
        self()
        assert self.x.grad is not None
        return self.x.grad


def _check(model: Any, both: tuple[Variant, Variant], plan: Plan) -> None:
    wide = copy.deepcopy(model).float()
    reference = Step(wide, wide, plan.checked_tokens).gradient()
    del wide
    errors = {}
    for variant in both:
        with compiled.from_scratch():
            found = Step(model, variant.compile(model), plan.checked_tokens).gradient()
            errors[variant.name] = compiled.median_token_error(found, reference)
    text = ", ".join(f"{name} {error:.2e}" for name, error in errors.items())
    print(f"  {plan.name}: error of the median token's gradient beside float32: {text}", flush=True)
    anchor, ours = (errors[variant.name] for variant in both)
    check(ours <= 2 * max(anchor, 1e-6), f"{plan.name}: error {ours:.2e} is over twice Inductor's {anchor:.2e}")


def _measure(model: Any, variant: Variant, plan: Plan) -> Measured:
    with compiled.from_scratch():
        step = Step(model, variant.compile(model), plan.tokens)
        measured = compiled.measure(step, lambda: None, warmup=plan.warmup, repeats=plan.repeats)
        if variant.ours:
            compiled.check_all_lowered(model.config, f"{plan.name}, {variant.name}")
        return measured


if __name__ == "__main__":
    compiled.command("train_layer", run, partial(run, plan=DRY))
