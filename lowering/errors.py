"""What can go wrong in a call of a `dsinfra` operator: one class per mistake, each message in three parts.

Every message says what was found (with shapes), why that can't be computed and what to change. All checks read
metadata only (shapes, strides, dtypes, devices), so they cost no synchronisation and are raised alike by an eager call
and by the shape function at trace time.
"""

from __future__ import annotations


class OperatorError(ValueError):
    """Base of all errors here. `found`, `why` and `change` are kept as attributes; the message joins them."""

    def __init__(self, found: str, why: str, change: str) -> None:
        super().__init__(f"{found}. {why}. {change}.")
        self.found, self.why, self.change = found, why, change

    def __reduce__(self) -> tuple:
        return type(self), (self.found, self.why, self.change)


class ShapeMismatch(OperatorError):
    """Two arguments disagree on a dimension, or one has the wrong number of dimensions."""


class DtypeMismatch(OperatorError):
    """An argument has a dtype the operator doesn't compute in, or arguments that must agree differ."""


class DeviceMismatch(OperatorError):
    """Arguments live on different devices."""


class LatentWidthMismatch(ShapeMismatch):
    """The latent's width isn't the width that the up-projection contracts."""


class MaskError(OperatorError):
    """The mask can't be broadcast, has an unusable dtype, or is given together with `causal`."""


class PageTableError(OperatorError):
    """The page table, or the paged cache it indexes, has the wrong dtype, shape or page size."""


class SeqlensError(OperatorError):
    """`seqlens` has the wrong length, dtype or number of dimensions."""


class GroupEndsError(OperatorError):
    """`ends`, or the counts of a masked layout, has the wrong length, dtype or number of dimensions."""


class ScaleError(OperatorError):
    """The scales of FP8 values have another shape, dtype or layout than their blocks ask for."""


class RouterError(OperatorError):
    """A router's settings contradict each other or the number of experts."""


class ExpertIdsError(OperatorError):
    """The expert ids have an unusable dtype or shape or, where they are checked, a value far outside the experts."""


class ActivationError(OperatorError):
    """An activation was asked for by a name that experts don't compute."""


class NotDifferentiable(OperatorError):
    """A gradient was asked of an argument or operator that has none."""


class DuplicateImplementation(OperatorError):
    """An implementation was registered under a name that is taken."""


class UnknownImplementation(OperatorError):
    """An implementation or operator was asked for by a name that nobody registered."""


class NotSupported(OperatorError):
    """An implementation was forced by name but doesn't support the arguments."""
