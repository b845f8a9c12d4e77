"""Many random modules, and what became of them: `python -m tests.zoo.fuzz --cases 2000 --seed 1`.

Draws modules of four kinds in turn (attentions and expert layers, as people write them and with random edits), checks
each (see `generator`), shrinks what fails and prints it as a module that can be saved and run. The counts go to
`tests/zoo/fuzz_results.json`; the exit status is 1 if anything failed. With `--minutes` it ends at that time, too, and
with `--jobs` processes of their own take a share of the cases each, with seeds of their own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dscompile._entry import ensure_registered
from tests.zoo.generator import Program, attentions, compare, edited, layers
from tests.zoo.generator.check import Broken, Crash, Discarded, WrongAnswer

RESULTS = Path(__file__).parent / "fuzz_results.json"
KINDS: dict[str, st.SearchStrategy[Program]] = {
    "attentions": attentions(),
    "edited attentions": edited(attentions()),
    "experts": layers(),
    "edited experts": edited(layers()),
}
ROUND = 25  # modules of one kind before the next: a failure ends a round
NAMES = {WrongAnswer: "wrong_answers", Crash: "crashes", Broken: "broken_promises"}


@dataclass
class Counts:
    """What became of the modules; a text that was drawn again counts once."""

    seen: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """Modules that were compared."""
        return sum(n for name, n in self.outcomes.items() if name != "discarded")

    def one(self, program: Program) -> None:
        """Checks a module and notes what happened; raises what it failed with."""
        known = repr(program) in self.seen
        self.seen.add(repr(program))
        try:
            verdict = compare(program)
        except Discarded:
            self.outcomes["discarded"] += not known
            return
        if not known:
            self.refused.update(verdict.refused)
            what = "matched" if verdict.matched else "refused" if verdict.refused else "no_site"
            self.outcomes[what] += 1


def run_round(counts: Counts, kind: str, number: int, examples: int) -> str:
    """Up to `examples` modules of one kind; -> the text of a failure, shrunk, or nothing."""
    phases = [Phase.generate, Phase.shrink]
    quiet = dict(deadline=None, database=None, print_blob=False, suppress_health_check=list(HealthCheck))

    @seed(number)
    @settings(max_examples=examples, phases=phases, report_multiple_bugs=False, **quiet)
    @given(KINDS[kind])
    def check(program: Program) -> None:
        failed[:] = [program]
        counts.one(program)

    failed: list[Program] = []
    try:
        check()
    except (WrongAnswer, Crash, Broken) as error:
        counts.outcomes[NAMES[type(error)]] += 1
        return f"{type(error).__name__}: {error}\n{failed[0]!r}"
    return ""


def commit() -> str:
    """The commit of the checkout, marked where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    known = found.stdout.strip() + ("+changes" if changed else "") if found.returncode == 0 else "unknown"
    return os.environ.get("DSINFRA_COMMIT", known)  # of a checkout without its repository


def summary(counts: Counts, number: int, seconds: float) -> dict[str, Any]:
    """The results as they are written down."""
    outcomes = {name: counts.outcomes[name] for name in ("matched", "refused", "no_site", "discarded", *NAMES.values())}
    return {
        "bench": "fuzz",
        "cases": counts.cases,
        **outcomes,
        "refused_by_class": dict(sorted(counts.refused.items(), key=lambda item: -item[1])),
        "seed": number,
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="modules to compare")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after these at the latest")
    parser.add_argument("--kind", choices=sorted(KINDS), help="modules of this kind alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the counts go")
    parsed = parser.parse_args(arguments)
    if parsed.jobs > 1:
        return _share(parsed)
    ensure_registered()
    counts, start, rounds = Counts(), time.monotonic(), 0
    kinds = [parsed.kind] if parsed.kind else list(KINDS)
    result = summary(counts, parsed.seed, 0.0)
    while counts.cases < parsed.cases and time.monotonic() - start < 60 * parsed.minutes:
        kind = kinds[rounds % len(kinds)]
        failure = run_round(counts, kind, 1000 * parsed.seed + rounds, min(ROUND, parsed.cases - counts.cases))
        rounds += 1
        if failure and failure not in counts.failures:
            counts.failures.append(failure)
            print(f"\n{failure}", flush=True)
        print(f"{counts.cases} cases: {dict(counts.outcomes)}", flush=True)
        result = summary(counts, parsed.seed, time.monotonic() - start)
        parsed.output.write_text(json.dumps(result, indent=1) + "\n")  # a run that is cut off loses a round at most
    print(f"{parsed.output}: {json.dumps(result)}")
    return 1 if counts.failures else 0


def _share(parsed: argparse.Namespace) -> int:
    """Runs `jobs` processes of this program, and writes the sum of what they found."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{job}.json" for job in range(parsed.jobs)]
        share = [f"--cases={-(-parsed.cases // parsed.jobs)}", f"--minutes={parsed.minutes}"]
        share += [f"--kind={parsed.kind}"] if parsed.kind else []
        program = [sys.executable, "-m", "tests.zoo.fuzz", *share]
        running = [
            subprocess.Popen([*program, f"--seed={100 * parsed.seed + job}", f"--output={output}"])
            for job, output in enumerate(outputs)
        ]
        statuses = [process.wait() for process in running]
        found = [json.loads(output.read_text()) for output in outputs if output.exists()]
    if not found:
        raise RuntimeError(f"none of {parsed.jobs} processes finished a round; what they printed says why.")
    result = {**found[0], "seed": parsed.seed, "jobs": parsed.jobs, "seconds": round(time.monotonic() - start, 1)}
    for name in ("cases", "matched", "refused", "no_site", "discarded", *NAMES.values()):
        result[name] = sum(one[name] for one in found)
    refused = sum((Counter(one["refused_by_class"]) for one in found), Counter[str]())
    result["refused_by_class"] = dict(refused.most_common())
    parsed.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{parsed.output}: {json.dumps(result)}; status of each process: {statuses}")
    return max(map(abs, statuses))  # a process that a signal ended has a negative one


if __name__ == "__main__":
    sys.exit(main())
