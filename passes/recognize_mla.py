"""recognize_mla: attention whose keys and values are up-projections of one latent -> ``dsinfra::mla``.

Before:  latent -> up-projection -> split, cat with the shared rope key -> attention (SDPA or softmax written out)
After:   ``dsinfra::mla(q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, causal)``, the old region left dead

The identity is the one that ``structure.py`` proves; the operator computes the same sums. *Exact*: the same products in
the same dtypes, accumulated in float32; a mask is dropped only if ``masks.py`` proved what it is. DeepSeek's reference
form, where the query is already absorbed and scores are two products, becomes ``dsinfra::mla_decode`` directly.

Refuses, with the failing fact: dropout, returned weights, sinks, softcaps, sliding windows, grouped heads, a bias in
the up-projection, different latents, rope keys that differ between heads, values overwritten in between.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import fx

from dscompile.passes import anchors, masks, replay, rope
from dscompile.passes.absorbed_form import AbsorbedForm, prove_absorbed
from dscompile.passes.anchors import Attention
from dscompile.passes.bind import Binder, Bindings
from dscompile.passes.facts import Evaluate
from dscompile.passes.fp8_prepared import Prepared
from dscompile.passes.graph import assignments, module_path, settle, source_line
from dscompile.passes.masks import Mask
from dscompile.passes.memory import Memory
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.refusals import NotAttention, Refusal, SizesDisagree, Unsupported
from dscompile.passes.shadow import Owner, Shadow
from dscompile.passes.structure import Prover, Slot, Structure

aten = torch.ops.aten
NAME = "recognize_mla"
T = TypeVar("T")
LONGEST = 5000  # symbolic sizes are tried up to about this length
# What puts values where a condition holds, or passes them on -> the place of the condition among its arguments.
_FILLS = {
    aten.where.self: 0,
    aten.where.ScalarSelf: 0,
    aten.where.ScalarOther: 0,
    aten.where.Scalar: 0,
    aten.masked_fill.Scalar: 1,
    aten.masked_fill.Tensor: 1,
    aten.full.default: None,
    aten.scalar_tensor.default: None,
    aten.expand.default: None,
    aten.unsqueeze.default: None,
    aten._to_copy.default: None,
}


@dataclass
class Match:
    """A proved attention, ready to be written."""

    anchor: fx.Node
    attention: Attention
    structure: Structure | AbsorbedForm
    mask: Mask
    site: Site


class Recognizer:
    """Proves the attentions of one shadow; identical layers are proved once."""

    def __init__(self, shadow: Shadow, training: bool = False):
        self.shadow = shadow
        self.memory = Memory(shadow.graph, training)
        self.pinned = ""  # why the guards leave no sizes to prove anything at
        try:
            self.sizes = assignments(shadow.graph)
        except ValueError as error:
            self.sizes, self.pinned = [], str(error)
        self.evaluators = [Evaluate(self.memory, s) for s in self.sizes]
        self._proofs: list[tuple[Attention, Structure, set[fx.Node], str, list[str]]] = []
        self._masks: dict[tuple, Mask] = {}
        self.replayed = 0

    def match(self, anchor: fx.Node, attention: Attention) -> Match:
        """Structure, mask and report line of one attention; raises a Refusal."""
        if self.pinned:
            raise Unsupported(self.pinned, anchor)
        absorbed = len(attention.terms) == 2
        mask = self._mask(attention)
        if attention.finite and mask.kind not in ("full", "causal"):
            raise Unsupported(
                "hidden scores are finite, and a row might see no key: it would average all values", anchor
            )
        attention.trail.holds(f"the mask is {mask.kind}")
        if self.memory.training and any(n.meta.get("dsinfra_no_grad") for n in (anchor, attention.out)):
            raise Unsupported("no gradient flows through the attention", anchor)
        structure: Structure | AbsorbedForm
        if absorbed:
            structure, rotation = self._agree(lambda s: prove_absorbed(self.memory, s, attention)), ""
        else:
            structure, rotation = self._structure(attention)
        site = Site(
            kind="mla",
            module_path=module_path(anchor),
            source=source_line(anchor),
            matched=True,
            form=f"{attention.form}, {structure.describe()}" + (f", rope {rotation}" if rotation else ""),
            mask=mask.kind + (f" ({mask.why})" if mask.kind == "operand" else ""),
        )
        return Match(anchor, attention, structure, mask, site)

    def _agree(self, prove):
        found = [prove(sizes) for sizes in self.sizes]
        for other in found[1:]:
            found[0] = _common(found[0], other)
        return found[0]

    def _structure(self, attention: Attention) -> tuple[Structure, str]:
        for old, structure, seen, rotation, facts in self._proofs:
            if _spelling(old) != _spelling(attention):
                continue
            renamed = replay.correspond(self.memory, seen, _roots(old, attention))
            if renamed is not None:
                self.replayed += 1
                attention.trail.holds(*facts)
                positions = {self.memory.position[o]: self.memory.position[n] for o, n in renamed.items()}
                return replay.rename(structure, renamed, self.memory, positions), rotation
        before = len(attention.trail.proved)
        provers = {id(s): Prover(self.memory, s) for s in self.sizes}
        structure = self._agree(lambda s: provers[id(s)].prove(attention))
        seen = set().union(*(p.pull.seen for p in provers.values()))
        rotation = self._rotation(attention, structure)
        self._proofs.append((attention, structure, seen, rotation, attention.trail.proved[before:]))
        return structure, rotation

    def _rotation(self, attention: Attention, structure: Structure) -> str:
        if structure.rope == 0:
            return "none"
        prover = Prover(self.memory, self.sizes[-1])
        first = 0 if structure.rope_first else structure.nope
        (term,) = attention.terms
        time = self.memory.position[term.node]
        at = {"b": 0, "h": 0, "s": 0, "t": 0}
        names = []
        for operand in (term.left, term.right):
            coords = [tuple({**at, "d": first + i}[c] for c in operand.labels) for i in range(structure.rope)]
            names.append(rope.kind(prover.pull, operand.node, coords, time))
        query, key = names
        # A cached key was rotated before it was stored: its columns are bare elements of the cache.
        return query if key in (query, "none") else f"query {query}, key {key}"

    def _evaluators(self, mask: fx.Node) -> list[Evaluate]:
        """One a size assignment; with symbolic sizes, also one beyond every length that the mask's own numbers name."""
        if not self.sizes[0].assignment:
            return self.evaluators
        longest = _constants(mask)
        if 2 * longest > LONGEST:
            raise Unsupported(f"a mask of symbolic size that names the length {longest}", mask)
        sizes = assignments(self.shadow.graph, above=2 * longest)[0]
        return [*self.evaluators, Evaluate(self.memory, sizes)]

    def _mask(self, attention: Attention) -> Mask:
        shapes = [tuple(attention.size(c, s.shape) for c in "st") for s in self.sizes]
        if attention.causal:
            if any(s != t for s, t in shapes):
                raise Unsupported("is_causal with fewer queries than keys is aligned to the first key", attention.out)
            return Mask("causal")
        if attention.mask is None:
            return Mask("full")
        node, time = attention.mask, self.memory.position[attention.softmax]
        key = (node, attention.inverted, attention.mask_labels, tuple(shapes), self.memory.version(node, time))
        if key not in self._masks:
            evaluators = self._evaluators(node)
            shapes = [tuple(attention.size(c, e.sizes.shape) for c in "st") for e in evaluators]
            found = [
                masks.classify(e, node, s, t, time, labels=attention.mask_labels, inverted=attention.inverted)
                for e, (s, t) in zip(evaluators, shapes, strict=True)
            ]
            if len({m.kind for m in found}) == 1:
                self._masks[key] = replace(found[0], same_for_all=all(m.same_for_all for m in found))
            else:
                self._masks[key] = Mask("operand", node, found[0].boolean, "it differs between sizes")
        return self._masks[key]


def _constants(node: fx.Node) -> int:
    """The largest number that a mask's conditions name: what they say may change at such a length.

    What is filled in where a condition holds, as the least float16, is no length; behind all else numbers count.
    """
    todo, seen, largest = [(node, True)], set(), 0
    while todo:
        one, filled = todo.pop()
        if (one, filled) in seen:
            continue
        seen.add((one, filled))
        if filled and one.target in _FILLS:
            todo += [(n, n is not _condition(one)) for n in one.all_input_nodes]
            continue
        numbers = [a for a in (*one.args, *one.kwargs.values()) if isinstance(a, (int, float)) and abs(a) < 2**31]
        largest = max([largest, *(int(abs(n)) for n in numbers)])
        todo += [(n, False) for n in one.all_input_nodes]
    return largest


def _condition(node: fx.Node) -> object:
    place = _FILLS[node.target]
    return None if place is None else node.args[place]


def _common(a: T, b: T) -> T:
    """What two proofs share: places to read a value that hold at both size assignments; all else must be equal."""
    changes = {}
    for f in fields(a):  # type: ignore[arg-type]
        x, y = getattr(a, f.name), getattr(b, f.name)
        if x != y and isinstance(x, tuple) and all(isinstance(s, Slot) for s in (*x, *y)):
            x = tuple(s for s in x if s in y)
            changes[f.name] = x
        if x != y and f.name not in changes or x == () and y != ():
            raise SizesDisagree(f"`{f.name}` differs between two assignments of the symbolic sizes")
    return replace(a, **changes)  # type: ignore[type-var]


def _spelling(attention: Attention) -> tuple:
    """What two attentions must share, beside their graphs, for a proof of one to hold for the other."""
    labels = [(t.left.labels, t.right.labels) for t in attention.terms]
    return attention.scale, attention.result, attention.form, attention.value.labels, labels


def _roots(old: Attention, new: Attention) -> list[tuple[fx.Node, fx.Node]]:
    pairs = [(old.value.node, new.value.node), (old.out, new.out)]
    for a, b in zip(old.terms, new.terms, strict=True):
        pairs += [(a.left.node, b.left.node), (a.right.node, b.right.node), (a.node, b.node)]
    return pairs


def run(shadow: Shadow, training: bool, prepared: Prepared | None = None) -> tuple[PassRecord, list[Bindings]]:
    """Rewrites every provable attention; -> the record, and what was bound for each rewritten site.

    ``prepared`` keeps the dequantised values of FP8 up-projections.
    """
    record = PassRecord(NAME)
    recognizer = Recognizer(shadow, training)
    by_owner: dict[Owner, list[Match | Site]] = defaultdict(list)
    for anchor, found in anchors.find(shadow.graph, recognizer.memory):
        if isinstance(found, NotAttention):
            record.passed_over.append(refused(anchor, found))
            continue
        try:
            if isinstance(found, Refusal):
                raise found
            match: Match | Site = recognizer.match(anchor, found)
        except Refusal as refusal:
            refusal.trail = found.trail
            match = refused(anchor, refusal)
        except Exception as error:  # a fault of ours costs this site, not the others
            match = refused(anchor, Unsupported(f"the analysis raised {type(error).__name__}: {error}", anchor))
        out = found.out if isinstance(found, Attention) else anchor
        owners = shadow.owners.get(out) or [Owner(shadow.module, anchor)]
        by_owner[owners[0]].append(match)
    binder = Binder(shadow, recognizer.memory, training, prepared)
    bound = []
    for owner, matches in by_owner.items():
        sites = [m if isinstance(m, Site) else m.site for m in matches]
        if all(isinstance(m, Match) for m in matches):
            try:
                bound.append(binder.write(owner, matches))  # type: ignore[arg-type]
            except Refusal as refusal:
                sites = [refused(m.anchor, refusal, m.site) for m in matches]  # type: ignore[union-attr]
            for match in matches:
                match.attention.trail.into(match.site)  # type: ignore[union-attr]
        record.sites.extend(sites)
    settle(b.module for b in bound)
    if recognizer.replayed:
        record.note = f"{recognizer.replayed} of {len(record.sites)} sites by replay of an identical layer's proof"
    return record, bound


def refused(anchor: fx.Node, refusal: Refusal, site: Site | None = None) -> Site:
    """Report line of a site that stays as it was."""
    site = site or Site("mla", module_path(anchor), "", False)
    site.matched = False
    site.source, site.node = refusal.source(anchor), refusal.place(anchor)
    site.reason, site.refusal, site.hint = refusal.found, refusal.name, refusal.hint
    site.decision = "left to Inductor"
    return refusal.trail.into(site) if refusal.trail is not None else site


def is_training(inputs: list[object]) -> bool:
    """True if the graph will be differentiated."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
