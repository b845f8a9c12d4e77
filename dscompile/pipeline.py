"""Pipeline stages from an unmodified transformers model, cut between its layers.

A stage runs the model's own ``forward`` with its own modules, so rotary embeddings, masks and whatever else the forward
does stay the model's: layers of other stages are stepped over in place (a layer that looks up something by its index
still finds it), the embedding is there in the first stage, the final norm and the head in the last. What lies
between two stages is one tensor, the hidden states [B,S,D].

    schedule = dualpipe(ranks, micro_batches)                            # runtime/schedules.py
    stages = dscompile.pipeline_stages(model, schedule.stages)
    mine = {i: GraphStage(stages[i]) for i in schedule.held(rank)}       # pipeline_graphs.py
    losses = Pipeline(schedule, mine, loss).step(batch, targets)         # runtime/pipeline.py

Refused: models whose hidden states are changed between layers by something that is none (each stage would do it
again), weights outside of embedding, layers, final norm and head, weights that two stages share, encoders with
decoders.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_NORMS = ("norm", "final_layernorm", "ln_f")


class CannotCut(ValueError):
    """A model can't be cut into the stages that were asked for."""


class ModelStage(nn.Module):
    """Some layers of a model: token ids [B,S] (first stage) or hidden states [B,S,D] -> hidden states or logits (last).

    Its parameters are the model's own, under the model's own names, so that a checkpoint of the whole loads with
    ``strict=False``; drop the model to free what other ranks hold.
    """

    def __init__(self, model: nn.Module, layers: range, first: bool, last: bool):
        super().__init__()
        whole = _twin(model)
        base = whole if _base(model) is model else getattr(whole, model.base_model_prefix)
        if base is not whole:
            base = _twin(base)
            whole._modules[model.base_model_prefix] = base
        kept = [layer if i in layers else Step(layer) for i, layer in enumerate(base.layers)]
        base._modules["layers"] = nn.ModuleList(kept)
        if not first:
            base._modules[_name_of(base, model.get_input_embeddings())] = None
        if not last:
            base._modules[_norm_of(base)] = nn.Identity()
            if base is not whole:
                whole._modules = {model.base_model_prefix: base}
        self._modules = {name: child for name, child in whole._modules.items() if child is not None}
        self._parameters, self._buffers = whole._parameters, whole._buffers
        self._runs = (whole if last else base,)  # in a tuple: it is no child, its children are ours
        self.span, self.is_first, self.is_last = layers, first, last

    def forward(self, x: Tensor) -> Tensor:
        (runs,) = self._runs
        found = runs(**{"input_ids" if self.is_first else "inputs_embeds": x}, use_cache=False)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state

    def extra_repr(self) -> str:
        return f"layers {self.span.start} to {self.span.stop - 1}, first={self.is_first}, last={self.is_last}"


class Step(nn.Module):
    """Stands where another stage's layer was, with the settings that the model reads from a layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        for name, value in vars(layer).items():
            if isinstance(value, str | int | float) and name != "training":
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states


def pipeline_stages(model: nn.Module, n: int, *, layers: Sequence[int] | None = None) -> list[ModelStage]:
    """The n stages of a model of transformers, in order; its parameters are shared, not copied.

    Args:
        layers: how many each stage takes; None: as equal as can be, the last stage, which has the head, none of the
            odd ones.

    Raises:
        CannotCut: with what was found in the model, and what to do instead.
    """
    base = _base(model)
    count = len(base.layers)
    if layers is None:
        if not 1 <= n <= count:
            raise CannotCut(f"{n} stages of {count} layers. A stage has at least one. Ask for 1 to {count} stages.")
        layers = [count // n + (i < count % n) for i in range(n)]
    if len(layers) != n or sum(layers) != count or min(layers) < 1:
        raise CannotCut(
            f"layers={list(layers)} for {n} stages of {count} layers. Each stage takes one or more, and all layers are "
            f"taken. Give {n} numbers that sum to {count}."
        )
    ends = [sum(layers[: i + 1]) for i in range(n)]
    stages = [
        ModelStage(model, range(end - k, end), i == 0, i == n - 1) for i, (end, k) in enumerate(zip(ends, layers))
    ]
    _check_weights(model, stages)
    if n > 1:
        _check_transparent(model)
    return stages


def _base(model: nn.Module) -> nn.Module:
    """The part that has the layers."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise CannotCut(
            f"{type(model).__name__} has an encoder and a decoder. One tensor doesn't carry both. Cut neither."
        )
    base = getattr(model, getattr(model, "base_model_prefix", None) or "", model)
    if not isinstance(getattr(base, "layers", None), nn.ModuleList) or not hasattr(model, "get_input_embeddings"):
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in base.named_children())
        raise CannotCut(
            f"{type(model).__name__} has no list `layers` in {type(base).__name__}, but {children or 'no modules'}. "
            "Stages are cut between the layers of a decoder of transformers. Give such a model, or write the stages as "
            "modules of one tensor and hand them to dscompile.runtime.pipeline."
        )
    return base


def _twin(module: nn.Module) -> nn.Module:
    """The same module with a list of children of its own."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _name_of(base: nn.Module, wanted: nn.Module) -> str:
    for name, child in base.named_children():
        if child is wanted:
            return name
    raise CannotCut(
        f"The input embedding, {type(wanted).__name__}, is no child of {type(base).__name__}. The first stage alone "
        "has it, so it has to be found beside the layers. Write the stages as modules of one tensor."
    )


def _norm_of(base: nn.Module) -> str:
    for name in _NORMS:
        if name in base._modules:
            return name
    raise CannotCut(
        f"{type(base).__name__} has no {', '.join(_NORMS)} after its layers, but {', '.join(base._modules)}. What "
        "comes after the layers belongs to the last stage alone. Write the stages as modules of one tensor."
    )


def _check_weights(model: nn.Module, stages: Sequence[ModelStage]) -> None:
    """Each weight in one stage."""
    names = {p: name for name, p in model.named_parameters()}
    where: dict[nn.Parameter, list[int]] = {p: [] for p in names}
    for i, stage in enumerate(stages):
        for p in set(stage.parameters()):
            where[p].append(i)
    for p, found in where.items():
        if len(found) > 1:
            raise CannotCut(
                f"{names[p]} {list(p.shape)} is used by stages {found}: tied, or outside of the layers. Each stage "
                "would get a part of its gradient. Set config.tie_word_embeddings=False if it is the embedding; "
                "otherwise write the stages as modules of one tensor."
            )


def _check_transparent(model: nn.Module) -> None:
    """With every layer stepped over, a stage in the middle must hand on the very tensor that it got."""
    middle = ModelStage(model, range(0), first=False, last=False)
    p = next(model.parameters())
    if p.is_meta:  # it has no weights, but a mask may ask for values
        p = torch.empty_like(p, device="cpu")
        middle = copy.deepcopy(middle).to_empty(device="cpu")
    x = torch.zeros(1, 2, model.get_input_embeddings().weight.shape[1], dtype=p.dtype, device=p.device)
    try:
        with torch.no_grad():
            found = middle(x)
    except Exception as error:
        raise CannotCut(
            f"{type(model).__name__} can't run with its layers stepped over: {type(error).__name__}: {error}. Its "
            "forward needs more of a layer than a tensor. Write the stages as modules of one tensor."
        ) from error
    if found is not x:
        raise CannotCut(
            f"{type(model).__name__} changes the hidden states outside of its layers, or its layers return more than "
            "one tensor. Every stage would do so again. Write the stages as modules of one tensor."
        )
