"""Who does which work: the prefill, decode and expert balancers of the V3/R1 inference system, as pure functions.

Each takes what is known of requests or experts and returns an assignment; nothing here sends or moves anything. The
work of a GPU is judged by two numbers, as that system does: tokens, which all layers but attention and all exchanges
cost, and the core of attention, which costs more the longer the context. ``simulate.py`` runs them against loads that
are skewed and drift.

Refused: negative lengths, no instances.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dscompile.runtime import eplb
from dscompile.runtime.eplb import PlacementError
from dscompile.runtime.eplb_search import place_experts


@dataclass(frozen=True)
class Instance:
    """What one data-parallel instance has to do: requests by index, their tokens, and their attention's cost."""

    requests: list[int] = field(default_factory=list)
    tokens: int = 0
    attention: float = 0.0


@dataclass(frozen=True)
class Running:
    """An instance at decode: its ``requests`` and how many tokens their caches hold."""

    requests: int
    cache: int


def prefill(
    lengths: Sequence[int], instances: int, *, cached: Sequence[int] | None = None, attention_weight: float = 0.5
) -> list[Instance]:
    """Prompts to instances, so that no instance's core attention and none's number of tokens holds up the others.

    Objective: minimise, over instances g,

        max_g [ a * A_g / mean A + (1 - a) * T_g / mean T ]        T_g = sum of new tokens
                                                                   A_g = sum of new * (cached + (new + 1) / 2)

    where A_g counts query-key pairs of causal attention and a is ``attention_weight``. Longest first: a prompt of the
    largest combined cost goes to the instance where it makes the least, which is within 4/3 of the best for one sum.

    Args:
        lengths: tokens of each prompt.
        cached: how many of them are in a prefix cache; None: none.
    """
    _check(lengths, instances)
    cached = cached or [0] * len(lengths)
    if len(cached) != len(lengths) or any(not 0 <= c <= n for c, n in zip(cached, lengths)):
        raise PlacementError(
            f"{len(cached)} cached lengths for {len(lengths)} prompts, or one beyond its prompt",
            "A prefix is a part of its prompt",
            "Give a number from 0 to its length for each prompt",
        )
    new = [n - c for n, c in zip(lengths, cached)]
    pairs = [n * (c + (n + 1) / 2) for n, c in zip(new, cached)]
    per_token, per_pair = ((1 - attention_weight) / max(sum(new), 1), attention_weight / max(sum(pairs), 1.0))
    cost = [t * per_token + p * per_pair for t, p in zip(new, pairs)]
    heap = [(0.0, g) for g in range(instances)]
    found: list[list[int]] = [[] for _ in range(instances)]
    for request in sorted(range(len(lengths)), key=lambda r: -cost[r]):
        load, g = heapq.heappop(heap)
        found[g].append(request)
        heapq.heappush(heap, (load + cost[request], g))
    return [Instance(r, sum(new[i] for i in r), sum(pairs[i] for i in r)) for r in found]


def decode(
    contexts: Sequence[int],
    instances: Sequence[Running],
    *,
    capacity: int | None = None,
    cache_weight: float = 0.5,
) -> list[int]:
    """New requests to instances that are decoding, so that all take equally long for a token.

    Objective: minimise, over instances g, max_g [ c * K_g / mean K + (1 - c) * R_g / mean R ] with K_g the tokens in
    its caches (core attention reads them) and R_g its requests (all other layers and the exchanges), without
    moving what runs, and with at most ``capacity`` tokens of cache in each. Longest context first, each to the
    lowest sum.

    Args:
        contexts: tokens of each request's cache. capacity: None: no limit.

    Returns:
        The instance of each request, -1 for one that fits nowhere and has to wait.
    """
    _check(contexts, len(instances))
    cache, requests = [i.cache for i in instances], [i.requests for i in instances]
    per_token = cache_weight / max(sum(cache) + sum(contexts), 1)
    per_request = (1 - cache_weight) / max(sum(requests) + len(contexts), 1)
    found = [-1] * len(contexts)
    for request in sorted(range(len(contexts)), key=lambda r: -contexts[r]):
        room = [g for g in range(len(instances)) if capacity is None or cache[g] + contexts[request] <= capacity]
        if room:
            g = min(room, key=lambda g: cache[g] * per_token + requests[g] * per_request)
            found[request] = g
            cache[g] += contexts[request]
            requests[g] += 1
    return found


def experts(weight: Tensor, spare: int, num_gpus: int, num_groups: int = 1, num_nodes: int = 1) -> Tensor:
    """Experts and their replicas to GPUs; -> phy2log [L, E + spare].

    Objective: minimise the load of the fullest GPU of each layer, since all others wait for it in the exchange:
    min max_g sum over its slots of load / replicas. See ``eplb_search.place_experts``.
    """
    return place_experts(weight, weight.shape[1] + spare, num_gpus, num_groups, num_nodes, locality="primary")


def balance(loads: Sequence[float]) -> float:
    """Mean over maximum; 1 where there is no load."""
    most = max(loads)
    return sum(loads) / len(loads) / most if most else 1.0


def expert_balance(weight: Tensor, phy2log: Tensor, num_gpus: int) -> Tensor:
    """Of each layer [L]."""
    return eplb.balancedness(eplb.gpu_loads(weight, phy2log, num_gpus))


def _check(lengths: Sequence[int], instances: int) -> None:
    if instances < 1:
        raise PlacementError(f"{instances} instances", "Requests need one to run on", "Give 1 or more")
    if any(n < 0 for n in lengths):
        raise PlacementError(f"a length of {min(lengths)}", "It counts tokens", "Give 0 or more")
