"""The self-check of ``options={"verify": True}``: each rewritten region runs once beside the original.

It runs when a graph is compiled, which is in its first call and before anything of it has run: the rewritten graph is
interpreted operator by operator on copies of the call's inputs, and with it what was replaced, which passes leave in
the graph without readers. Both read the same values, so that each site's error is its own. What is compared, and with
which bar, stands in ``measure.py`` and ``region.py``; in training the gradients of each region's operands are compared
too, and of a router the experts by the scores that the model chose them by, since equal scores may go either way.

A site beyond its bar raises :class:`VerifyError` under ``strict``; otherwise it warns, and the graph is compiled as it
was. Costs: copies of all inputs but parameters (and of parameters that the graph writes), every region twice in eager
operators and once in wider ones, and no other trace: the random state, the inputs and ``.grad`` are as before.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from dscompile import measure
from dscompile.errors import VerifyError
from dscompile.passes import graph_copy, quantize_weights
from dscompile.passes.commits import Commits, Link, Rewrite
from dscompile.passes.fp8_prepared import written_storages
from dscompile.passes.graph import called
from dscompile.passes.recognize_mla import is_training
from dscompile.passes.record import PassRecord
from dscompile.passes.refusals import Withdrawn, WrongResult
from dscompile.passes.shadow import INLINED
from dscompile.region import Region, independent, operands

log = logging.getLogger("dscompile")
NAME = "verify"


@dataclass
class Check:
    """One replaced value: nodes of the copy, and what was found. ``rewrite`` is the last that changed its place."""

    link: Link
    rewrite: Rewrite
    old: fx.Node
    new: fx.Node
    operands: set[fx.Node]
    region: Region = field(init=False)
    error: float = -1.0
    bar: float = 0.0
    what: str = "the result"
    note: str = ""

    def __post_init__(self) -> None:
        self.region = Region(self.old, self.operands)

    @functools.cached_property
    def differentiated(self) -> Region:
        """The region that gradients are compared over: back to values that don't depend on one another."""
        return Region(self.old, independent(self.operands))

    @property
    def wrong(self) -> bool:
        return self.error > self.bar

    @property
    def quantises(self) -> bool:
        return self.rewrite.name == quantize_weights.NAME

    @property
    def routes(self) -> bool:
        return self.rewrite.operator == "route"

    def found(self, error: float, bar: float, what: str = "the result") -> None:
        """Keeps the error that is worst for its bar."""
        if self.error < 0 or error * self.bar > self.error * bar:
            self.error, self.bar, self.what = error, bar, what


def run(module: fx.GraphModule, inputs: Sequence[Any], commits: Commits, strict: bool) -> tuple[PassRecord, bool]:
    """Checks every rewrite of Dynamo's graph; -> the record, and whether the rewritten graph may be used.

    Errors are written to the sites (``errors["verify"]``).

    Raises:
        VerifyError: under ``strict``, a site is beyond its bar, or the graph can't be checked.
    """
    start = time.perf_counter()
    checks: list[Check] = []
    reason = ""
    try:
        checks = _planned(module, inputs, commits)
    except Unchecked as error:
        reason = str(error)
    except Exception as error:
        reason = f"the check raised {type(error).__name__}: {error}"
    record = PassRecord(NAME, seconds=time.perf_counter() - start, note=_note(checks, reason))
    log.info("dsinfra: verify: %s", record.note)
    wrong = [check for check in checks if check.wrong]
    if reason:
        if strict:
            raise VerifyError(
                f"The graph can't be verified: {reason}. Without verify or without strict it compiles unchecked."
            )
        log.warning("dsinfra: verify: %s; the graph is used unchecked", reason)
    for check in checks:
        for site in check.link.sites:
            site.errors["verify"] = max(site.errors.get("verify", 0.0), check.error)
    if wrong and strict:
        raise VerifyError(_message(wrong))
    if wrong:
        log.warning("dsinfra: %s The graph runs as it was.", _message(wrong))
        _withdraw(commits, wrong)
    return record, not wrong


def _message(wrong: list[Check]) -> str:
    first = max(wrong, key=lambda check: check.error)
    site, rewrite = (first.link.sites or (None,))[0], first.rewrite
    where = (site.module_path if site else rewrite.module_path) or "(top)"
    more = f" ({len(wrong)} regions are wrong; this is the worst)" if len(wrong) > 1 else ""
    return (
        f"`{rewrite.operator}`, written by {rewrite.name} for {where} at {site.source if site else rewrite.source}, "
        f"computes something else than `{first.link.rewrite.replaced}`{more}: the relative error of {first.what} is "
        f"{first.error:.1e}, the bar {first.bar:.1e}. A wrong rewrite is not used. Compile with "
        f"options={{'fuel': {rewrite.number - 1}}} to leave it out, and please report it with the directory that "
        "options={'dump': ...} writes."
    )


def _note(checks: list[Check], reason: str) -> str:
    if reason:
        return f"not checked: {reason}"
    left = [f"{c.rewrite.module_path or '(top)'} ({c.note})" for c in checks if c.error < 0]
    done = [c for c in checks if c.error >= 0]
    text = f"{len(done)} of {len(checks)} replaced values compared"
    if done:
        worst = max(done, key=lambda c: c.error / c.bar if c.bar else c.error)
        where = worst.rewrite.module_path or "(top)"
        text += f", worst {worst.error:.1e} (bar {worst.bar:.1e}) at {where}"
    return text + (f"; not compared: {', '.join(left)}" if left else "")


def _withdraw(commits: Commits, wrong: list[Check]) -> None:
    """Turns the report around: every rewritten site of the graph is left to Inductor after all."""
    bad = {id(site): check for check in wrong for site in check.link.sites}
    for site in {id(s): s for link in commits.links for s in link.sites}.values():
        check = bad.get(id(site))
        site.matched, site.kernel, site.decision = False, "", "left to Inductor"
        kind = WrongResult if check else Withdrawn
        site.refusal, site.hint = kind.__name__, kind.hint
        site.reason = (
            f"`{check.rewrite.operator}` is off by {check.error:.1e} in {check.what}, the bar is {check.bar:.1e}"
            if check
            else "another site of this graph gave a wrong result"
        )


# ------------------------------------------------------------------ what is compared


class Unchecked(Exception):
    """The graph can't be interpreted; the message says why."""


def _planned(module: fx.GraphModule, inputs: Sequence[Any], commits: Commits) -> list[Check]:
    if any(isinstance(x, FakeTensor) for x in inputs):
        raise Unchecked("its inputs have no values at compile time")
    twin, twins = graph_copy.with_erased(module, commits)
    made = {node: link.sites for link in commits.links for node in link.made}
    checks = []
    for index, link in enumerate(commits.links):
        if link.sites and made.get(link.old) == link.sites:
            continue  # one form of ours became another: compared as a whole, below
        new, nodes, rewrite = link.new, set(link.made), link.rewrite
        for later in commits.links[index + 1 :]:
            if later.sites == link.sites and link.sites:
                nodes |= later.made
                rewrite = later.rewrite
                new = later.new if later.old is new else new
        copies = [twins[n] for n in nodes if n in twins]
        checks.append(Check(link, rewrite, twins[link.old], twins[new], operands(copies)))
    needed = {node for check in checks for node in (check.old, check.new)}
    for erased in commits.erased:  # forms in between, which nothing is compared with
        node = twins[erased.node]
        if node not in needed and not node.users:
            node.graph.erase_node(node)
    training = is_training(list(inputs)) and not any(isinstance(x, torch.Tensor) and x.is_inference() for x in inputs)
    with torch.random.fork_rng(devices=_cuda(inputs)), torch.set_grad_enabled(training):
        _Runner(twin, checks).run(*_copies(twin, inputs))
    if checks and all(check.error < 0 for check in checks):
        raise Unchecked(f"no replaced value could be compared ({checks[0].note or 'not reached'})")
    return checks


def _cuda(inputs: Sequence[Any]) -> list[int]:
    return sorted({x.device.index for x in inputs if isinstance(x, torch.Tensor) and x.is_cuda})


def _copies(module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The inputs, so that nothing of the user's is written: tensors that share memory share it in the copies too."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    written, found = written_storages(module), []
    storages: dict[int, torch.UntypedStorage] = {}
    for node, value in zip(placeholders, inputs, strict=True):
        if isinstance(value, torch.SymInt):
            found.append(int(value.node.hint))
            continue
        if not isinstance(value, torch.Tensor):
            found.append(value)
            continue
        fake = node.meta["example_value"]
        plain = value.layout is torch.strided and type(value) in (torch.Tensor, nn.Parameter)
        if isinstance(value, nn.Parameter) and not (plain and fake.untyped_storage()._cdata in written):
            copy = value.detach()
        elif plain and value.numel():
            own = value.untyped_storage()
            kept = storages.setdefault(own._cdata, own.clone() if own.nbytes() else own)
            copy = value.new_empty(0).set_(kept, value.storage_offset(), value.size(), value.stride())
        else:
            copy = value.detach().clone()
        found.append(copy.requires_grad_() if value.requires_grad and torch.is_grad_enabled() else copy)
    return found


# ------------------------------------------------------------------ the run


@dataclass(frozen=True)
class Gone:
    """Stands for a value that could not be computed."""

    why: str


class _Runner(fx.Interpreter):
    """Runs the copy once; compares each replaced value when both it and its replacement are there."""

    def __init__(self, module: fx.GraphModule, checks: Sequence[Check]):
        super().__init__(module, garbage_collect_values=False)
        self.checks = checks
        self.due: dict[fx.Node, list[Check]] = {}
        self.last: dict[fx.Node, list[fx.Node]] = {}  # node -> values that nothing needs behind it
        ends = {n: max([n, *n.users]) for n in self.module.graph.nodes}
        for check in (c for c in checks if c.old.graph is self.module.graph):
            needed = [check.old, check.new]
            if check.routes:  # weights are compared by who was chosen, which may stand behind them
                ids = _ids(check, checks)
                needed += [ids.old, ids.new, _scores(check, checks)]
            then = max(needed)
            self.due.setdefault(then, []).append(check)
            needed += check.region.leaves
            needed += check.differentiated.leaves if torch.is_grad_enabled() else []
            for node in needed:
                ends[node] = max(ends[node], then)
        for node, end in ends.items():
            self.last.setdefault(end, []).append(node)

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        self.args_iter = iter(args)
        for node in self.module.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], self.env.__getitem__)
            self.env[node] = self.value(node)
            for check in self.due.get(node, ()):
                self.compare(check)
            for dead in self.last.get(node, ()):
                self.env.pop(dead, None)
        raise AssertionError("a graph without an output")

    def value(self, node: fx.Node) -> Any:
        gone = [self.env[n] for n in node.all_input_nodes if isinstance(self.env[n], Gone)]
        if gone:
            return gone[0]
        try:
            value = self.run_node(node)
        except Exception as error:
            return Gone(f"`{called(node)}` raised {type(error).__name__}: {str(error).splitlines()[:1]}")
        if isinstance(value, torch.Tensor) and node.op == "placeholder" and value.layout is torch.strided:
            if value.numel() and not value.untyped_storage().nbytes():
                return Gone("the memory of a weight was given back")
        return value

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.HigherOrderOperator) and target.name() in INLINED:
            body = next(a for a in args if isinstance(a, fx.GraphModule))
            operands = [a for a in args[args.index(body) + 1 :] if not isinstance(a, str)]
            return _Runner(body, self.checks).run(*operands)
        return super().call_function(target, args, kwargs)

    # ---- one comparison

    def compare(self, check: Check) -> None:
        old, new = self.env[check.old], self.env[check.new]
        if isinstance(old, Gone):
            check.note = f"the original could not be run: {old.why}"
        elif isinstance(new, Gone):
            check.note = f"the replacement could not be run: {new.why}"
        elif check.routes:
            self.routed(check, old, new)
        else:
            self.values(check, old, new)

    def routed(self, check: Check, old: torch.Tensor, new: torch.Tensor) -> None:
        """A router's experts by the scores that they were chosen by, its weights by expert."""
        scores = self.env[_scores(check, self.checks)]
        bar = max(measure.bar(x.dtype) for x in (old, scores) if x.is_floating_point())
        if not old.is_floating_point():
            chosen = [scores.gather(-1, idx.long()).sort(-1)[0] for idx in (new, old)]
            check.found(measure.error(*chosen), bar, "the scores of the chosen experts")
            return
        first = _ids(check, self.checks)
        ids = [self.env[n].long() for n in (first.new, first.old)]
        same = (ids[0].sort(-1)[0] == ids[1].sort(-1)[0]).all(-1)
        spread = [torch.zeros_like(scores, dtype=w.dtype).scatter(-1, i, w)[same] for i, w in zip(ids, (new, old))]
        check.found(measure.error(*spread), bar, "the routing weights by expert")
        if old.requires_grad:
            self.gradients(check, spread[0], spread[1], widen=False)
        check.found(measure.error(new.sort(-1)[0], old.sort(-1)[0]), bar, "the routing weights")

    def values(self, check: Check, old: Any, new: Any) -> None:
        pairs = list(zip(pytree.tree_leaves(new), pytree.tree_leaves(old), strict=True))
        pairs = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor)]
        if check.quantises or check.region.reads_fp8 and check.rewrite.kind == "mla":
            errors = [site.errors["output"] for site in check.link.sites if "output" in site.errors]
            bar = max([measure.FP8_BAR, *(4 * e for e in errors)])
            check.found(max(measure.error(a, b) for a, b in pairs), bar)
            return
        if len(pairs) != 1 or not pairs[0][1].is_floating_point():
            check.found(max(measure.error(_plain(a), _plain(b)) for a, b in pairs), 0.0)
            return
        ((result, expected),) = pairs
        wide, _ = self.wider(check, check.region)
        self.judge(check, result, expected, wide, "the result")
        if expected.requires_grad:
            self.gradients(check, result, expected)

    def wider(self, check: Check, region: Region) -> tuple[torch.Tensor | None, dict[fx.Node, Any]]:
        """The original region in wider arithmetic, or None."""
        dtype = check.old.meta["example_value"].dtype
        if dtype not in measure.WIDER or region.refusal():
            return None, {}
        try:
            return region.wider(self.env, self.module)
        except Exception as error:  # an operator without a wider form: the fixed bar decides
            log.debug("dsinfra: verify: no wider run of %s: %s", check.rewrite.operator, error)
            return None, {}

    def judge(self, check: Check, result: Any, expected: Any, wide: Any, what: str, least: float = 0.0) -> None:
        dtype = check.region.dtype
        most = measure.bar(dtype)
        own = measure.error(expected, wide, least) if wide is not None else measure.WRONG
        if own <= most:
            check.found(measure.error(result, wide, least), measure.bar(dtype, own), what)
        else:
            check.found(measure.error(result, expected, least), most, what)

    def gradients(self, check: Check, result: torch.Tensor, expected: torch.Tensor, widen: bool = True) -> None:
        """Gradients of the region's operands for one random gradient of the result."""
        region = check.differentiated
        sources = [n for n in region.operands if getattr(self.env[n], "requires_grad", False)]
        if not sources:
            return
        wide, leaves = self.wider(check, region) if widen else (None, {})
        if not result.requires_grad:
            check.found(measure.WRONG, 0.0, "the gradient, which is missing")
            return
        with torch.random.fork_rng(devices=_cuda([result])):
            torch.manual_seed(0)
            seed = torch.randn_like(expected)
        inputs = [self.env[n] for n in sources]
        old, new = (_grad(x, inputs, seed) for x in (expected, result))
        widened = [None] * len(old) if wide is None else _grad(wide, [leaves[n] for n in sources], seed.to(wide.dtype))
        least = 1e-3 * max(float(g.double().norm(dim=-1).mean()) if g.dim() else float(g.abs()) for g in old)
        for node, a, b, w in zip(sources, new, old, widened, strict=True):
            self.judge(check, a, b, w, f"the gradient of `{node.name}`", least)


def _grad(value: torch.Tensor, inputs: list[torch.Tensor], seed: torch.Tensor) -> list[torch.Tensor]:
    found = torch.autograd.grad(value, inputs, seed, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.is_floating_point() else x


def _ids(check: Check, checks: Sequence[Check]) -> Check:
    """Of a router's weights: the comparison of its ids, which the pass replaced first."""
    return next(c for c in checks if c.rewrite is check.rewrite)


def _scores(check: Check, checks: Sequence[Check]) -> fx.Node:
    """What the model's own top-k chose a router's experts from."""
    node = _ids(check, checks).old
    while called(node) != "topk":
        node = node.all_input_nodes[0]
    return node.all_input_nodes[0]
