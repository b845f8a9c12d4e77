"""Modules that look like multi-head latent attention and are not: each breaks one premise and must be left as it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.toy import Form, ToyMLA


class ReturnedWeights(ToyMLA):
    """The attention weights leave the module, so they must exist: no fused operator gives them."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.returned: list[torch.Tensor] = []
        y = super().forward(x)
        return y, self.returned.pop()

    def weigh(self, scores: torch.Tensor) -> torch.Tensor:
        self.returned.append(super().weigh(scores))
        return self.returned[-1]


class Sinks(ToyMLA):
    """A learned column takes part in the softmax and is dropped behind it: the weights of a row add up to less."""

    def __init__(self, form: Form):
        super().__init__(form)
        self.sinks = nn.Parameter(torch.randn(form.heads))

    def weigh(self, scores: torch.Tensor) -> torch.Tensor:
        sinks = self.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return super().weigh(torch.cat([scores, sinks], -1))[..., :-1]


class Softcap(ToyMLA):
    """Scores are squashed by a tanh before the mask: no longer bilinear in query and key."""

    def add_mask(self, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return super().add_mask(5.0 * torch.tanh(scores / 5.0), mask)


class PerHeadRopeKey(ToyMLA):
    """Each head rotates a key of its own: nothing of it can be shared by the heads."""

    def __init__(self, form: Form):
        super().__init__(form)
        self.kv_a = nn.Linear(self.D, self.C + form.heads * self.R, bias=False)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        latent, k_rope = self.kv_a(x).split([self.C, self.form.heads * self.R], -1)
        q = self.q_b(self.q_norm(self.q_a(x))).view(*x.shape[:2], -1, self.N + self.R).transpose(1, 2)
        return *q.split([self.N, self.R], -1), latent, k_rope.view(*x.shape[:2], -1, self.R).transpose(1, 2)

    def share(self, k_rope: torch.Tensor) -> torch.Tensor:
        return k_rope


class UpProjectionBias(ToyMLA):
    """Keys and values are affine in the latent, not linear."""

    def __init__(self, form: Form):
        super().__init__(form)
        self.kv_b = nn.Linear(self.C, form.heads * (self.N + self.V), bias=True)


class TwoLatents(ToyMLA):
    """Keys come from one latent and values from another, of equal widths."""

    def __init__(self, form: Form):
        super().__init__(form)
        self.kv_a = nn.Linear(self.D, 2 * self.C + self.R, bias=False)
        self.value_norm = nn.RMSNorm(self.C, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.value_latent = self.value_norm(F.linear(x, self.kv_a.weight[-self.C :]))
        y = super().forward(x)
        del self.value_latent
        return y

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        latent, k_rope, _ = self.kv_a(x).split([self.C, self.R, self.C], -1)
        q = self.q_b(self.q_norm(self.q_a(x))).view(*x.shape[:2], -1, self.N + self.R).transpose(1, 2)
        return *q.split([self.N, self.R], -1), latent, k_rope.unsqueeze(1)

    def up_project(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().up_project(latent)[0], super().up_project(self.value_latent)[1]


class GroupedHeads(ToyMLA):
    """Two query heads read each key head: grouped-query attention over an up-projected latent."""

    def up_project(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = super().up_project(latent)
        return tuple(half.repeat_interleave(2, dim=1) for half in (k[:, ::2], v[:, ::2]))


class NoAttention(nn.Module):
    """A network without attention: nothing to match and nothing to refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.up(x)))
