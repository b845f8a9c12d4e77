"""Why a site was left to Inductor: one exception class per reason.

A :class:`Refusal` is raised inside a proof and caught by the pass, which turns it into a line of the report. It says
what was found, at which node, and what would make the site match (``hint``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from dscompile.passes.graph import source_line

if TYPE_CHECKING:
    from dscompile.passes.trail import Trail


class Refusal(Exception):
    """Base class. ``node`` is the shadow node that broke the proof, ``trail`` how far it had come."""

    hint = ""
    trail: Trail | None = None

    def __init__(self, found: str, node: fx.Node | None = None):
        super().__init__(found)
        self.found = found
        self.node = node

    @property
    def name(self) -> str:
        return type(self).__name__

    def source(self, fallback: fx.Node | None = None) -> str:
        line = source_line(self.node)
        return line if line != "?" else source_line(fallback)

    def place(self, fallback: fx.Node | None = None) -> str:
        """Where the value that broke the proof is made in Dynamo's graph; '' if it has no node there."""
        known = (n.meta.get("dsinfra_place", "") for n in (self.node, fallback) if n is not None)
        return next(filter(None, known), "")


class NotAttention(Refusal):
    """A softmax that is no attention (a router, a pooling): no site, kept in the JSON record alone."""


class NotBilinear(Refusal):
    """Scores are something else than scale * q.k + mask (softcap, learned bias, normalised scores)."""

    hint = "scores must be matmul(q, k^T) times a constant, plus a mask"


class SoftmaxSink(Refusal):
    """Extra columns take part in the softmax."""

    hint = "attention sinks have no lowering here"


class ProbabilitiesUsed(Refusal):
    """The attention weights are returned or used a second time."""

    hint = "ask for no attention weights (output_attentions=False)"


class AttentionDropout(Refusal):
    """Dropout on the attention weights is active."""

    hint = "set attention_dropout to 0; the kernels draw no random numbers"


class SlidingWindow(Refusal):
    """The mask is a sliding window."""

    hint = "only full, causal, length and operand masks are lowered"


class GroupedHeads(Refusal):
    """Fewer key heads than query heads: grouped-query attention, not MLA."""

    hint = "MLA up-projects one latent to as many key heads as there are query heads"


class NoUpProjection(Refusal):
    """Keys or values are not an up-projection of a latent."""

    hint = (
        "keys and values must be linear in one latent; a cache of expanded heads hides it "
        "(transformers >= 5.15 caches the latent)"
    )


class UpProjectionBias(Refusal):
    """The up-projection has a bias."""

    hint = "a bias in the key/value up-projection can't be absorbed"


class DifferentLatents(Refusal):
    """Keys and values come from different latents."""

    hint = "keys and values must come from the same latent at the same position"


class RowsDisagree(Refusal):
    """Rows of the up-projection are not offset + head * stride + d."""

    hint = "each head must own evenly spaced rows of one weight"


class PerHeadRopeKey(Refusal):
    """The rotated part of the key differs between heads."""

    hint = "MLA shares one rotated key between all heads"


class KeyLayout(Refusal):
    """The key's columns are not one block of up-projected and one block of shared columns."""

    hint = "keys must be [nope | rope] or [rope | nope]"


class UnboundValue(Refusal):
    """A value the operator needs has no tensor of its own in the graph that holds the attention."""

    hint = "the value crosses a region (checkpoint, higher-order operator) or exists only inside a fused call"


class MutatedOperand(Refusal):
    """A value is overwritten between its use and the attention."""

    hint = "move the in-place update behind the attention"


class NarrowedPrecision(Refusal):
    """The rewrite would compute in a narrower dtype than the model does."""

    hint = "cast before the up-projection, not behind it"


class SizesDisagree(Refusal):
    """The structure found at two assignments of the symbolic sizes differs."""

    hint = "mark the sizes static or report the model"


class Unsupported(Refusal):
    """A form the prover has no rule for."""


class OutOfFuel(Refusal):
    """The option ``fuel`` allows no more rewrites: by request, no fault."""

    hint = "raise options={'fuel': n} or DSINFRA_FUEL, or leave it out to apply every rewrite"


class WrongResult(Refusal):
    """Under ``verify`` the rewritten region computed something else than the model: the graph runs as it was."""

    hint = "a fault of ours, which `dscompile bisect` narrows down; please report it with the files of the option dump"


class Withdrawn(Refusal):
    """Under ``verify`` another site of the graph gave a wrong result, and the whole graph runs as it was."""

    hint = "see the site with the refusal WrongResult"


class LayerRefusal(Refusal):
    """Base class of what is found in expert layers and routers only."""


class RowsNotTokens(LayerRefusal):
    """The rows that experts read are not the tokens in the order of a sort of their expert ids."""

    hint = "gather tokens by the sort of the flattened ids: x[perm // top_k]"


class GroupEnds(LayerRefusal):
    """The groups of a grouped product are not the rows of each expert."""

    hint = "offsets must be the cumulative sum of how often each id occurs, without padding or capacity"


class ExpertActivation(LayerRefusal):
    """Between the two products of an expert stands no activation that the operator knows."""

    hint = "supported are act(gate) * up with silu, gelu or tanh gelu, and the clamped swiglu of gpt-oss"


class ExpertWeights(LayerRefusal):
    """The weights or biases of an expert layer are not one tensor indexed by expert."""

    hint = "store the experts' weights as [experts, out, in] or [experts, in, out]"


class SeparateGateUp(LayerRefusal):
    """Gate and up are two weights, and joining them costs more than it gives at this size."""

    hint = "store gate and up as one weight [experts, 2 * width, in]"


class ExpertsApart(LayerRefusal):
    """Each expert of a loop has parameters of its own, of which no stack can be kept."""

    hint = "store the experts' weights as one parameter [experts, out, in]; then training is lowered too"


class DataDependentLoop(LayerRefusal):
    """A loop over the experts that were hit: which, only the data says, so that the graph ends in front of it."""

    hint = "ask for products by expert, in transformers with experts_implementation='grouped_mm'"


class RoutingWeights(LayerRefusal):
    """Routing weights do not multiply the result of the down projection, each row by its own."""

    hint = "multiply the down projection's rows by topk_weights and sum over top_k"


class CombineForm(LayerRefusal):
    """The experts' results are not summed over the choices of each token, in the token's place."""

    hint = "undo the sort, view as [tokens, top_k, width] and sum over top_k"


class IntermediateUsed(LayerRefusal):
    """A value inside the expert layer or router has a reader outside it."""

    hint = "the operator keeps no values between its two products"


class ExpertDropout(LayerRefusal):
    """Dropout inside an expert layer is active."""

    hint = "set the dropout to 0; the kernels draw no random numbers"


class RouterForm(LayerRefusal):
    """A router's scores, groups or weights are written in a way that has no rule."""

    hint = "softmax or sigmoid, a bias for the choice, groups by their best or two best, a final top-k"
