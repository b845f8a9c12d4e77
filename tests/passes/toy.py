"""A toy with multi-head latent attention, of which tests change one thing at a time, and its comparison with eager.

Everything runs in float64, where a right rewrite agrees with eager to twelve digits and a wrong one can't hide in
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dscompile.backend import dsinfra
from dscompile.report import CompileReport

D, H, C, N, R, V = 24, 4, 12, 6, 4, 5
S = 10


class Toy(nn.Module):
    """Multi-head latent attention; `attend` and `forward` are what the cases replace."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.q, self.a = nn.Linear(D, H * (N + R), False, dtype=dtype), nn.Linear(D, C + R, False, dtype=dtype)
            self.b, self.o = nn.Linear(C, H * (N + V), False, dtype=dtype), nn.Linear(H * V, D, False, dtype=dtype)

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """-> q_nope_BHSN, q_rope_BHSR, latent_BSC, k_rope_B1SR."""
        q_nope, q_rope = self.q(x).view(*x.shape[:2], H, N + R).transpose(1, 2).split([N, R], -1)
        latent, k_rope = self.a(x).split([C, R], -1)
        return q_nope, rotate(q_rope), latent, rotate(k_rope.unsqueeze(1))

    def up(self, latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """latent_BTC -> k_nope_BHTN, v_BHTV."""
        return self.b(latent).view(*latent.shape[:2], H, N + V).transpose(1, 2).split([N, V], -1)

    def finish(self, q_nope, q_rope, k_nope, k_rope, v, *rest):  # type: ignore[no-untyped-def]
        k_rope = k_rope.expand(-1, H, -1, -1)
        o = self.attend(torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, k_rope], -1), v, *rest)
        return self.o(o.transpose(1, 2).flatten(2))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, is_causal=True)

    def forward(self, x: torch.Tensor, *rest: Any) -> Any:
        q_nope, q_rope, latent, k_rope = self.parts(x)
        k_nope, v = self.up(latent)
        return self.finish(q_nope, q_rope, k_nope, k_rope, v, *rest)


sdpa = F.scaled_dot_product_attention


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Stands for the rotation of x_BHSR: arithmetic by position. No proof looks into it; test_rope.py has real ones."""
    return x * torch.arange(x.shape[2], dtype=x.dtype, device=x.device).cos()[:, None]


def toy(**methods: Callable) -> type[Toy]:
    """A toy with some methods replaced."""
    return type("Changed", (Toy,), methods)


def stack(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Layers behind one another, with residuals."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.layers = nn.ModuleList(make() for make in layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    return Stack


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def compile_passes(
    module: Any, inner: str = "eager", more: dict[str, Any] | None = None, **settings: Any
) -> tuple[Callable, list[CompileReport]]:
    """`module` behind the backend, with `more` options, and the list that its reports go to."""
    reports: list[CompileReport] = []
    torch._dynamo.reset()

    def backend(gm: torch.fx.GraphModule, inputs: list) -> Callable:
        return dsinfra(gm, inputs, options={"inner": inner, **(more or {})}, sink=reports.append)

    return torch.compile(module, backend=backend, **settings), reports


def observe(call: Callable, module: Any, inputs: tuple, train: bool, lengths: bool) -> list[torch.Tensor]:
    """Everything that a call may leave behind: results, inputs and buffers afterwards, gradients."""
    inputs = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs)
    for x in inputs if lengths else ():
        torch._dynamo.mark_dynamic(x, 1)
    leaves = [x.requires_grad_() for x in inputs if train and x.is_floating_point()]
    with torch.set_grad_enabled(train):
        output = call(*inputs)
    outputs = list(output) if isinstance(output, tuple) else [output]
    state = [x for x in inputs if isinstance(x, torch.Tensor)]
    if isinstance(module, nn.Module):
        state += list(module.buffers())
        leaves += list(module.parameters()) if train else []
    seen = [x.detach().clone() for x in (*outputs, *state)]
    if train:
        sum(x.square().sum() for x in outputs).backward()  # type: ignore[union-attr]
        seen += [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in leaves]
    return seen


def same_as_eager(
    make: Callable[[], Any],
    *calls: tuple,
    train: bool = False,
    lengths: bool = False,
    inner: str = "",
    rtol: float = 1e-9,
    options: dict[str, Any] | None = None,
) -> list[CompileReport]:
    """Runs `make()` uncompiled and compiled on the same calls and compares everything; -> the reports.

    `lengths` makes dimension 1 of the inputs symbolic. Without gradients the rewritten graph is run as it is, which is
    quick; `inner="aot_eager"` puts AOTAutograd behind it.
    """
    eager, ours = make(), make()
    compiled, reports = compile_passes(ours, inner or ("aot_eager" if train else "eager"), options)
    for inputs in calls or ((randn(2, S, D),),):
        expected = observe(eager, eager, inputs, train, lengths)
        found = observe(compiled, ours, inputs, train, lengths)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol / 100, equal_nan=True)
    assert reports, "nothing was compiled"
    assert not any(r.error for r in reports), [r.error for r in reports]
    return reports


def only_site(reports: list[CompileReport]) -> Any:
    (site,) = [s for r in reports for s in r.sites]
    return site
