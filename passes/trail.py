"""How far a proof came: the form that a site was tried as, and the facts that held before the first that failed.

A prover notes each step when it has succeeded; nothing ever reads a trail but reports. So a site that is refused says
what it is close to, and a site that is lowered has its proof in words.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dscompile.passes.record import Site


@dataclass
class Trail:
    """``closest``: what the site was tried as; ``proved``: facts in the order of the proof, each once."""

    closest: str = ""
    proved: list[str] = field(default_factory=list)

    def holds(self, *facts: str) -> None:
        """Notes what was shown; a proof that runs at two sizes says it once."""
        self.proved += [fact for fact in facts if fact not in self.proved]

    def into(self, site: Site) -> Site:
        site.closest, site.proved = self.closest, list(self.proved)
        return site
