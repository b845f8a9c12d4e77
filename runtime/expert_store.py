"""The weights of a rank's own experts: what a model holds of its expert layers when they are spread over a group.

:class:`ExpertStore` replaces each weight ``[E, ...]`` of a model's expert layers by the rows ``[L, ...]`` of this
rank's experts, L = E / W; the memory of the others is given back. The model's code still reads ``[E, ...]``: the
attribute becomes a parametrization (``torch.nn.utils.parametrize``) that gathers all ranks' rows, so an uncompiled
model computes what it did before, slowly. Compiled with ``options={"ep_group": group}``, a layer reads its own rows and
the gather is left out; a layer that couldn't be spread keeps it, and its gradient.

What trains are the rows: the same parameter objects as before (an optimizer that has them goes on with them), now
``parametrizations.<name>.original``. Their gradient is the sum over all ranks' tokens: don't average it with other
ranks' of the group, as data parallelism would (``parameters()`` lists them).

Weights may be whole on every rank, DTensors that are sharded over experts, or on the meta device: then :meth:`load`
brings them, from a state dict or safetensors files, of which each rank reads its own rows. :meth:`state_dict` is that
of the model without expert parallelism. Expert layers are told by shapes, not names: a module with a floating weight
``[E, D, F]`` and one ``[E, 2F, D]``, or two ``[E, F, D]``, in either orientation. Refused: W that doesn't divide E, a
model without such modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dscompile.runtime import groups
from dscompile.runtime.groups import Group
from dscompile.runtime.whole_weights import gather_experts


class ExpertStoreError(ValueError):
    """A model has no expert weights that can be spread, or a checkpoint doesn't fit the model."""


class ExpertStore:
    """Spreads a model's expert weights over a group, in place; -> see the module's text.

    Args:
        model: of which every rank has the same, whole or on the meta device.
        group: what ``dscompile.runtime.groups.join`` takes.

    Attributes:
        weights: full name of each weight that was spread (as in the model's ``state_dict`` before) -> E.

    Raises:
        ExpertStoreError: see above; nothing was changed then.
        GroupError: ``group`` is none.
    """

    def __init__(self, model: nn.Module, group: Any):
        self.model, self.group = model, groups.join(group)
        found = [
            (prefix, module, names) for prefix, module in model.named_modules() if (names := expert_weights(module))
        ]
        if not found:
            raise ExpertStoreError(
                f"{type(model).__name__} has no module with the weights of expert layers: a floating [E, D, F] and one "
                "[E, 2F, D], or two [E, F, D]. Only weights that hold all experts of a layer can be spread: stack "
                "those of a list of experts first."
            )
        for prefix, module, names in found:
            experts = getattr(module, names[0]).shape[0]
            if experts % self.group.size:
                raise ExpertStoreError(
                    f"{prefix or type(module).__name__} has {experts} experts and the group {self.group.size} ranks: "
                    "each holds equally many. Use a group whose size divides the number of experts."
                )
        self.weights: dict[str, int] = {}
        self._modules: list[nn.Module] = []
        for prefix, module, names in found:
            for name in names:
                weight = getattr(module, name)
                self.weights[f"{prefix}.{name}".lstrip(".")] = weight.shape[0]
                _replace_sharded(module, name, self.group)
                parametrize.register_parametrization(module, name, Gathered(self.group, weight.shape[0]), unsafe=True)
            self._modules.append(module)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The rows of this rank's experts."""
        for module in self._modules:
            for held in module.parametrizations.values():  # type: ignore[union-attr, operator]
                yield held.original

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state dict as it is without expert parallelism, whole weights included. Every rank must call
        it."""
        state: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                plain = _plain(name)
                path, _, attribute = plain.rpartition(".")
                spread = plain in self.weights
                state[plain] = getattr(self.model.get_submodule(path), attribute) if spread else value
        return state

    def load(
        self, source: Mapping[str, Tensor] | str | PathLike | Sequence[str | PathLike], device: Any = None
    ) -> None:
        """Loads every weight of the model, of its experts this rank's rows alone.

        Args:
            source: a state dict of the model without expert parallelism, or safetensors files of one.
            device: where weights that are on the meta device are made; None: where the source has them.

        Raises:
            ExpertStoreError: a name is missing, one is left over, or a shape differs; nothing was loaded then.
        """
        readers = _readers(source)
        state = {_plain(name): value for name, value in self.model.state_dict().items()}
        missing, left = sorted(state.keys() - readers.keys()), sorted(readers.keys() - state.keys())
        if missing or left:
            raise ExpertStoreError(
                f"the checkpoint has no {missing[:3]} and the model no {left[:3]} ({len(missing)} and {len(left)} "
                "names). They must be those of the model's state dict without expert parallelism. Rename them first."
            )
        for name, value in state.items():
            whole = (self.weights[name], *value.shape[1:]) if name in self.weights else tuple(value.shape)
            if readers[name].shape != whole:
                raise ExpertStoreError(
                    f"{name} is {list(readers[name].shape)} in the checkpoint and {list(whole)} in the model: it is "
                    "another model's, or in another layout. Build the model from the checkpoint's own configuration."
                )
        held = {_plain(name): name for name in self.model.state_dict()}
        loaded = {}
        for name, value in state.items():
            rows = None if name not in self.weights else _rows(self.group, self.weights[name])
            target = device if value.is_meta else value.device
            loaded[held[name]] = readers[name].read(rows).to(device=target, dtype=value.dtype)
        on_meta = any(value.is_meta for value in state.values())
        self.model.load_state_dict(loaded, assign=on_meta)


class Gathered(nn.Module):
    """The parametrization: this rank's rows [L, ...] -> those of all ranks [E, ...]."""

    def __init__(self, group: Group, experts: int):
        super().__init__()
        self.group, self.experts, self._rank = group.name, experts, group.rank

    def forward(self, own: Tensor) -> Tensor:
        return gather_experts(own, self.group, self.experts)

    def right_inverse(self, whole: Tensor) -> Tensor:
        """The own rows, in memory of their own; a weight that holds them alone already is taken as it is."""
        found = groups.get(self.group)
        if whole.shape[0] == self.experts // found.size and found.size > 1:
            return whole
        return whole[_rows(found, self.experts)].clone()


def _rows(group: Group, experts: int) -> slice:
    local = experts // group.size
    return slice(group.rank * local, (group.rank + 1) * local)


def _plain(name: str) -> str:
    """A name of the state dict without what parametrization adds: `a.parametrizations.w.original` is `a.w`."""
    return name.replace("parametrizations.", "").removesuffix(".original") if "parametrizations." in name else name


def _replace_sharded(module: nn.Module, name: str, group: Group) -> None:
    """Replaces a DTensor that is sharded over experts by the rows it has here."""
    weight = getattr(module, name)
    if not hasattr(weight, "to_local"):
        return
    local = weight.to_local()
    if local.shape[0] * group.size != weight.shape[0]:
        raise ExpertStoreError(
            f"{name} {list(weight.shape)} is a DTensor of which this rank has {list(local.shape)}. It must be sharded "
            f"over its first dimension, and over the {group.size} ranks of the group alone. Distribute it so, or not."
        )
    setattr(module, name, nn.Parameter(local.detach(), requires_grad=weight.requires_grad))


# ------------------------------------------------------------------ what is an expert layer


def expert_weights(module: nn.Module) -> list[str]:
    """Names of a module's own parameters that hold a row for each expert, biases included; [] if it is no expert
    layer."""
    own = dict(module.named_parameters(recurse=False))
    cubes = {name: p for name, p in own.items() if p.dim() == 3 and p.is_floating_point()}
    for experts in sorted({p.shape[0] for p in cubes.values()}):
        matrices = [tuple(p.shape[1:]) for p in cubes.values() if p.shape[0] == experts]
        if any(_is_layer(matrices, i) for i in range(len(matrices))):
            return [name for name, p in own.items() if p.dim() in (2, 3) and p.shape[0] == experts]
    return []


def _is_layer(matrices: list[tuple[int, ...]], i: int) -> bool:
    """True if matrix i is the down-projection [D, F] of others: one [2F, D], or two [F, D]; all may be transposed."""
    D, F = matrices[i]
    others = matrices[:i] + matrices[i + 1 :]
    return any(
        (2 * f, d) in others or (d, 2 * f) in others or max(others.count((f, d)), others.count((d, f))) >= 2
        for d, f in ((D, F), (F, D))
    )


# ------------------------------------------------------------------ checkpoints


class _Held:
    """A tensor of a state dict."""

    def __init__(self, value: Tensor):
        self.value, self.shape = value, tuple(value.shape)

    def read(self, rows: slice | None) -> Tensor:
        return self.value.detach() if rows is None else self.value.detach()[rows].clone()


class _Stored:
    """A tensor of a safetensors file, of which nothing is read before it is asked for."""

    def __init__(self, file: Any, name: str):
        self.slice = file.get_slice(name)
        self.shape = tuple(self.slice.get_shape())

    def read(self, rows: slice | None) -> Tensor:
        return self.slice[:] if rows is None else self.slice[rows]


def _readers(source: Any) -> dict[str, _Held | _Stored]:
    if isinstance(source, Mapping):
        return {name: _Held(value) for name, value in source.items()}
    from safetensors import safe_open

    found: dict[str, _Held | _Stored] = {}
    for path in [source] if isinstance(source, (str, PathLike)) else source:
        file = safe_open(path, framework="pt")
        found |= {name: _Stored(file, name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return found
