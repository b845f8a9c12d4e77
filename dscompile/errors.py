"""Errors a user can cause, in one place; each says what was found, why it can't be done and what to change."""

from __future__ import annotations

from dscompile.lowering.errors import OperatorError

__all__ = ["AnalysisFailed", "DumpDirectoryError", "OperatorError", "OptionError", "StrictRefusal"]


class OptionError(ValueError):
    """An option of ``torch.compile(options=...)`` or a ``DSINFRA_*`` variable is unknown or has a wrong value."""


class DumpDirectoryError(OSError):
    """The dump directory can't be written."""


class StrictRefusal(RuntimeError):
    """Under ``strict`` an attention was left to Inductor."""


class AnalysisFailed(RuntimeError):
    """Under ``strict`` our analysis raised; the cause is chained."""
