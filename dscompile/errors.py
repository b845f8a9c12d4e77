"""Errors a user can cause, in one place; each says what was found, why it can't be done and what to change."""

from __future__ import annotations

from dscompile.lowering.errors import OperatorError

__all__ = [
    "AnalysisFailed",
    "BisectError",
    "DumpDirectoryError",
    "OperatorError",
    "OptionError",
    "ReportError",
    "StrictRefusal",
    "VerifyError",
]


class OptionError(ValueError):
    """An option of ``torch.compile(options=...)`` or a ``DSINFRA_*`` variable is unknown or has a wrong value."""


class DumpDirectoryError(OSError):
    """The dump directory can't be written."""


class ReportError(ValueError):
    """A dump directory can't be turned into a page."""


class StrictRefusal(RuntimeError):
    """Under ``strict`` an attention was left to Inductor."""


class AnalysisFailed(RuntimeError):
    """Under ``strict`` our analysis raised; the cause is chained."""


class VerifyError(RuntimeError):
    """Under ``strict`` and ``verify`` a rewritten region is further from the original than its bar, or can't be run."""


class BisectError(RuntimeError):
    """No rewrite can be named as the first bad one."""
