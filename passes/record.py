"""What a pass reports: a :class:`Site` for each place it looked at, a :class:`PassRecord` for the pass itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class Site:
    """One attention, product or layer of experts of the model, lowered or refused.

    ``form`` says how it was written, ``decision`` what it became and why, ``kernel`` what will run, ``reason`` (with
    ``refusal``, the class name, and ``hint``) why it was left to Inductor. ``errors`` are relative ones, measured where
    a pass changes rounding.

    For those who look closer: ``node`` is the site's place in Dynamo's graph, ``region`` the nodes there that the
    operator replaces, ``bound`` what each of its operands is. ``closest`` names the form that a site was tried as,
    ``proved`` the facts that held before the first that failed, ``predicted`` the seconds of each choice by the cost
    model.
    """

    kind: str
    module_path: str
    source: str
    matched: bool
    form: str = ""
    mask: str = ""
    decision: str = ""
    kernel: str = ""
    reason: str = ""
    refusal: str = ""
    hint: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    node: str = ""
    region: list[str] = field(default_factory=list)
    bound: dict[str, str] = field(default_factory=dict)
    closest: str = ""
    proved: list[str] = field(default_factory=list)
    predicted: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class PassRecord:
    """Considered, matched and refused sites of one pass, and the seconds it took.

    What looks like a site and is none counts as neither: ``near_misses`` are worth a line (a top-k over a softmax that
    is no known router), ``passed_over`` are kept in the JSON record alone (a classifier's softmax, a sampler's top-k).
    """

    name: str
    sites: list[Site] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""
    near_misses: list[Site] = field(default_factory=list)
    passed_over: list[Site] = field(default_factory=list)

    @property
    def matched(self) -> int:
        return sum(s.matched for s in self.sites)

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "seconds": round(self.seconds, 4),
            "considered": len(self.sites),
            "matched": self.matched,
            "note": self.note,
            "sites": [s.as_dict() for s in self.sites],
            "near_misses": [s.as_dict() for s in self.near_misses],
            "passed_over": [s.as_dict() for s in self.passed_over],
        }
