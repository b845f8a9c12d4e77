"""One decoding step of whole models over a static cache: `reduce-overhead` by dsinfra and by Inductor.

The cache is nearly full, so that attention covers its real length. Before anything is timed, a model of the same widths
is compared with its own weights in float32; while timing, each variant must replay CUDA graphs, and dsinfra must have
lowered every layer's attention.
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
    """What to run; a batch stands with the capacity of its cache.

    Steps start at `capacity - room` tokens and never reach the capacity. 128 requests have short caches: the keys and
    values that Inductor expands must fit the card.
    """

    names: tuple[str, ...] = ("v3x3", "v2lite")
    batches: tuple[tuple[int, int], ...] = ((1, 8192), (16, 8192), (128, 1024))
    room: int = 128
    warmup: int = 24
    repeats: int = 60
    checked: tuple[int, int, int] = (16, 1024, 1000)  # batch, capacity and length of the comparison with float32
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    dry: bool = False


DRY = Plan(("micro",), ((1, 256), (2, 256)), 32, 1, 4, (2, 64, 50), "cpu", torch.float32, True)


def run(quick: bool = False, plan: Plan | None = None) -> list[dict[str, Any]]:
    """Rows of every model and batch; quick leaves the long compilations of v2lite out."""
    plan = plan or (Plan(names=("v3x3",)) if quick else Plan())
    both = compiled.variants("reduce-overhead", plan.dry)
    rows = []
    with torch.no_grad():
        for name in plan.names:
            model = models.build(name, plan.device, plan.dtype, layers=2)
            _check(model, name, both, plan)
            if model.config.num_hidden_layers != models.CONFIGS[name]["num_hidden_layers"]:
                del model
                compiled.forget()
                model = models.build(name, plan.device, plan.dtype)
            for batch, capacity in plan.batches:
                anchor, ours = (_measure(model, name, batch, capacity, variant, plan) for variant in both)
                case = f"{name}, batch {batch}, cache {capacity}, {str(plan.dtype)[6:]}"
                rows.append(compiled.report_pair(case, anchor, ours, "inductor reduce-overhead, same run"))
            del model
            compiled.forget()
    return rows


def _check(model: Any, name: str, both: tuple[Variant, Variant], plan: Plan) -> None:
    batch, capacity, length = plan.checked
    ids = models.token_ids(model, batch, 1)

    def logits(call: Any) -> torch.Tensor:
        owner = getattr(call, "_orig_mod", call)
        cache = models.filled_static_cache(owner, batch, capacity, length)
        return call(ids, past_key_values=cache, use_cache=True).logits.clone()

    what = f"{name}, {model.config.num_hidden_layers} layers, batch {batch}, {length} of {capacity} tokens"
    compiled.check_logits(logits, model, both, what)


def _measure(model: Any, name: str, batch: int, capacity: int, variant: Variant, plan: Plan) -> Measured:
    with compiled.from_scratch():
        cache = models.filled_static_cache(model, batch, capacity, capacity - plan.room)
        ids = models.token_ids(model, batch, 1)
        call = variant.compile(model)

        def step() -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return call(ids, past_key_values=cache, use_cache=True)

        rewind = partial(models.set_length, cache, capacity - plan.room)
        measured = compiled.measure(step, rewind, warmup=plan.warmup, repeats=plan.repeats)
        what = f"{name}, batch {batch}, {variant.name}"
        if not variant.dry:
            rewind()
            compiled.check_cuda_graph(step, what)
        if variant.ours:
            compiled.check_all_lowered(model.config, what)
        return measured


if __name__ == "__main__":
    compiled.command("decode_model", run, partial(run, plan=DRY))
