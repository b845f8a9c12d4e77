"""DeepSeek's reference form: the query is absorbed in the model's code, scores are two products over the caches.

    scores = scale * (q_latent . c + q_rope . k_rope),   out = softmax(scores + mask) c

:func:`prove_absorbed` shows that the values are the same elements as one of the two keys; nothing else is needed, the
form *is* ``dsinfra::mla_decode``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dscompile.passes.anchors import Attention, Operand
from dscompile.passes.graph import Sizes
from dscompile.passes.memory import Memory
from dscompile.passes.refusals import DifferentLatents, Unsupported
from dscompile.passes.structure import Prover, Slot


@dataclass(frozen=True)
class AbsorbedForm:
    """Slots of ``mla_decode``'s operands."""

    heads: int
    rank: int
    rope: int
    keys: tuple[fx.Node, int]
    q_latent: tuple[Slot, ...]
    q_rope: tuple[Slot, ...]
    latent: tuple[Slot, ...]
    k_rope: tuple[Slot, ...]

    def describe(self) -> str:
        return f"H {self.heads}, C {self.rank} + R {self.rope}, absorbed by the model"


def prove_absorbed(memory: Memory, sizes: Sizes, attention: Attention) -> AbsorbedForm:
    """Structure of an attention with two score terms; raises a Refusal."""
    prover = Prover(memory, sizes)
    prover.lengths(attention)
    terms = list(attention.terms)
    value = attention.value
    if any("h" in t.right.labels for t in terms) or "h" in value.labels:
        raise Unsupported("two score terms, but keys with a head dimension", attention.softmax)
    rank, dtype = attention.size("v", sizes.shape), attention.dtype
    attention.trail.holds("keys and values have no head dimension")

    def whole(operand: Operand, position: str, heads: int, width: int, reader: fx.Node):
        batch, length = (sizes.shape(operand.node)[operand.labels.index(c)] for c in ("b", position))
        return prover.grid(operand, batch, length, position, heads, width, memory.position[reader])

    def width(operand: Operand) -> int:
        return sizes.shape(operand.node)[operand.labels.index("d")]

    c_value = whole(value, "t", 1, rank, attention.out)[0]
    for i, term in enumerate(terms):
        if width(term.right) == rank and prover.same(whole(term.right, "t", 1, rank, term.node)[0], c_value):
            latent, rotated = terms[i], terms[1 - i]
            break
    else:
        raise DifferentLatents("neither of the two keys is the values' latent", value.node)
    attention.trail.holds("one of the two keys is the values' latent")
    heads, turn = attention.size("h", sizes.shape), width(rotated.right)
    return AbsorbedForm(
        heads=heads,
        rank=rank,
        rope=turn,
        keys=(latent.right.node, latent.right.labels.index("t")),
        q_latent=prover.slots(whole(latent.left, "s", heads, rank, latent.node), "bshd", dtype),
        q_rope=prover.slots(whole(rotated.left, "s", heads, turn, rotated.node), "bshd", dtype),
        latent=prover.slots(whole(latent.right, "t", 1, rank, latent.node), "btd", dtype),
        k_rope=prover.slots(whole(rotated.right, "t", 1, turn, rotated.node), "btd", dtype),
    )
