"""Sizes that proofs are tried at: what the guards of a trace allow, and so what a proof may conclude from them."""

from __future__ import annotations

import pytest
import torch

from dscompile.passes.graph import assignments
from tests.passes.tools import shadow_of
from tests.passes.toy import D, Toy, only_site, randn, same_as_eager, toy

CUT = 300  # beyond the sizes that are tried first


def branch(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.shape[1] > CUT else x[:, :-1]


@pytest.mark.parametrize("length", [10, CUT, CUT + 1, 1000])
def test_both_are_on_the_side_of_a_branch_that_was_traced(length: int) -> None:
    x = torch.zeros(2, length)
    torch._dynamo.mark_dynamic(x, 1)
    tried = [n for sizes in assignments(shadow_of(branch, x).graph) for n in sizes.assignment.values()]
    assert len(set(tried)) == 2 and all((n > CUT) == (length > CUT) for n in tried)


def test_multiples() -> None:
    x = torch.zeros(16, 3)
    torch._dynamo.mark_dynamic(x, 0)
    shadow = shadow_of(lambda x: x.view(-1, 8, 3) if x.shape[0] % 8 == 0 else x, x)
    assert all(n % 8 == 0 for sizes in assignments(shadow.graph, above=70) for n in sizes.assignment.values())


def test_above() -> None:
    x = torch.zeros(2, 5)
    torch._dynamo.mark_dynamic(x, 1)
    assert all(
        n > 5000 for sizes in assignments(shadow_of(torch.sin, x).graph, 5000) for n in sizes.assignment.values()
    )


def test_a_structure_that_changes_at_a_constant_length_is_seen() -> None:
    """Values beyond CUT are of another latent: a proof at short lengths only would lose them."""

    def parts(self: Toy, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q_nope, q_rope, latent, k_rope = Toy.parts(self, x)
        return q_nope, q_rope, torch.cat([latent[:, :CUT], latent[:, CUT:].sin()], 1), k_rope

    def attend(self: Toy, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    inputs = [(randn(1, n, D, seed=n),) for n in (CUT + 20, CUT + 50)]
    same_as_eager(toy(parts=parts, attend=attend), *inputs, lengths=True)


def test_a_cut_that_the_traced_length_does_not_reach() -> None:
    def up(self: Toy, latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        k_nope, v = Toy.up(self, latent)
        return k_nope[:, :, :CUT], v[:, :, :CUT]

    def attend(self: Toy, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    inputs = [(randn(1, n, D, seed=n),) for n in (10, 17)]
    assert only_site(same_as_eager(toy(up=up, attend=attend), *inputs, lengths=True)[:1]).matched
