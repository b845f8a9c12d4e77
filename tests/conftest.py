"""Markers become skips that name their tier, skips are counted by tier, and a folder's bare name ends the run early.

Long files begin first, and the garbage collector runs less often, which is a tenth of the time.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Generator

import pytest

from tests.tiers import TIERS, tier_of


def pytest_configure() -> None:
    bare = [name for name in ("passes", "lowering", "runtime") if name in sys.modules]
    if bare:
        raise pytest.UsageError(
            f"{bare} imported under a bare name, so operators would be registered twice: import dscompile.{bare[0]} "
            "instead; `python -X importtime -m pytest ...` shows where it happens."
        )
    from dscompile._entry import ensure_registered

    ensure_registered()


def _missing(item: pytest.Item) -> str | None:
    """Why this machine can't run `item`, its tier first; None when it can."""
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if item.get_closest_marker("gpu") and not devices:
        return "gpu: no CUDA device"
    several = item.get_closest_marker("multi_gpu")
    wanted = several.args[0] if several and several.args else 2
    if several and devices < wanted:
        return f"multi_gpu: {devices} of {wanted} CUDA devices"
    if item.get_closest_marker("interpreter") and os.environ.get("TRITON_INTERPRET") != "1":
        return "interpreter: TRITON_INTERPRET is not 1"
    return None


# Begun first, longest first: with a file a worker, the run ends with whatever was begun last.
LONGEST = (
    "models/test_matrix.py",
    "models/test_old_versions.py",
    "kernels/test_interpreter_tier.py",
    "models/test_second_start.py",
    "models/test_inductor.py",
    "models/test_zoo.py",
    "models/test_fp8.py",
)


def _place(item: pytest.Item) -> int:
    folders = item.path.as_posix()
    return next((place for place, name in enumerate(LONGEST) if folders.endswith(f"tests/{name}")), len(LONGEST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)
    for item in items:
        reason = _missing(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not go over it again with every graph that is compiled."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if tier_of(reason) is None:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: the skip {reason!r} must begin with its tier, one of {', '.join(TIERS)}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        counts[tier_of(reason) or "no tier"] += 1
    if counts:
        terminalreporter.section("not tested on this machine, by tier")
        for tier, number in sorted(counts.items()):
            terminalreporter.line(f"{number:5}  {tier} ({TIERS.get(tier, 'see above')})")
