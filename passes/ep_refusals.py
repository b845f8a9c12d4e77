"""Why an expert layer is not spread over ranks."""

from __future__ import annotations

from dscompile.passes.refusals import Refusal


class UnevenExperts(Refusal):
    """The group's size doesn't divide the number of experts."""

    hint = "use a group whose size divides the number of experts"


class UnorderedExchanges(Refusal):
    """Two expert layers that don't depend on each other: ranks could exchange their tokens in different orders."""

    hint = "only layers that follow one another are spread"


class SpreadAlready(Refusal):
    """The model exchanges the layer's tokens, or adds up its results, over ranks itself."""

    hint = "leave out options['ep_group'], or load the model without expert parallelism of its own"
