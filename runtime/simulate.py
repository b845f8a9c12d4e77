"""What the balancers make of loads that are skewed and drift: a simulation, and every line it prints says so.

A trace is a popularity of experts per layer by Zipf's law, whose logarithms walk at random from window to window, and
tokens that choose by it. A plan made from one window serves the next, as it would live. Step time is counted in the
slowest GPU's tokens over the mean's: 1 / balancedness. Nothing here knows a network, a kernel or a cache.

    python -m dscompile.runtime.simulate
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dscompile.runtime import balance, eplb
from dscompile.runtime.eplb_moves import choose, frontier, moved


@dataclass(frozen=True)
class Setting:
    """A deployment and its load: ``drift`` is the random walk's step per window, in the logarithm of popularity."""

    name: str
    gpus: int
    spare: int
    groups: int = 1
    nodes: int = 1
    exponent: float = 1.0
    drift: float = 0.1
    layers: int = 4
    experts: int = 256
    windows: int = 4
    choices: int = 1 << 17

    @property
    def slots(self) -> int:
        return self.experts + self.spare


EP32 = Setting("prefill, EP32", gpus=32, spare=32, groups=8, nodes=4)
EP144 = Setting("decode, EP144", gpus=144, spare=32)


@dataclass(frozen=True)
class Outcome:
    """Mean balancedness of the windows behind the first, in which the plan in force was made from an earlier one."""

    policy: str
    balance: float
    least: float
    moves: float  # of weights, a layer and window


def trace(setting: Setting, seed: int = 0) -> Iterator[Tensor]:
    """Counts [L,E] of one window after the other."""
    generator = torch.Generator().manual_seed(seed)
    L, E = setting.layers, setting.experts
    rank = torch.stack([torch.randperm(E, generator=generator) for _ in range(L)]) + 1
    logits = -setting.exponent * rank.double().log()
    for _ in range(setting.windows):
        chosen = torch.multinomial(logits.softmax(1), setting.choices, replacement=True, generator=generator)
        yield torch.zeros(L, E).scatter_add_(1, chosen, torch.ones(chosen.shape))
        logits += setting.drift * torch.randn(L, E, generator=generator, dtype=torch.float64)


def run(setting: Setting, seed: int = 0) -> list[Outcome]:
    """No placement, where experts divide evenly; EPLB's; ours with the fewest moves to 99 % of the best balance."""
    windows = list(trace(setting, seed))
    policies = ["EPLB", "ours"] if setting.experts % setting.gpus else ["none", "EPLB", "ours"]
    return [_follow(setting, windows, policy) for policy in policies]


def _follow(setting: Setting, windows: list[Tensor], policy: str) -> Outcome:
    G, now, moves, found = setting.gpus, None, 0.0, []
    for measured, served in zip(windows, windows[1:]):
        if policy == "none":
            found.append(eplb.balancedness(served.double().view(len(served), G, -1).sum(2)))
            continue
        new, travels = _plan(setting, measured, now, policy)
        moves += travels
        now = new
        found.append(balance.expert_balance(served, now, G))
    every = torch.stack(found)
    return Outcome(policy, every.mean().item(), every.min().item(), moves / max(len(windows) - 2, 1))


def _plan(setting: Setting, weight: Tensor, now: Tensor | None, policy: str) -> tuple[Tensor, float]:
    G = setting.gpus
    if policy == "EPLB":
        new = eplb.rebalance_experts(weight, setting.slots, setting.groups, setting.nodes, G)[0]
    elif now is None:
        new = balance.experts(weight, setting.spare, G, setting.groups, setting.nodes)
    else:
        options = frontier(weight, now, G, setting.groups, setting.nodes, locality="primary", starts=2)
        new = torch.stack([choose(each).phy2log for each in options])
    return new, 0.0 if now is None else moved(now, new, G).sum(1).double().mean().item()


def requests(instances: int, each: int, seed: int = 0) -> list[tuple[str, float, float]]:
    """(objective, balance when dealt in turn, balance by the balancer) for requests of long-tailed lengths."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(instances * each, generator=generator)
    lengths = (1200 * (0.9 * draw).exp()).long().clamp(16, 65536).tolist()
    new = balance.prefill(lengths, instances)
    dealt = [lengths[g::instances] for g in range(instances)]
    pairs = [sum(n * (n + 1) / 2 for n in one) for one in dealt]
    where = balance.decode(lengths, [balance.Running(0, 0)] * instances)
    cache = [sum(n for n, g in zip(lengths, where) if g == i) for i in range(instances)]
    count = [where.count(i) for i in range(instances)]
    tokens = balance.balance([sum(one) for one in dealt])
    return [
        ("prefill, tokens", tokens, balance.balance([i.tokens for i in new])),
        ("prefill, attention", balance.balance(pairs), balance.balance([i.attention for i in new])),
        ("decode, tokens of cache", tokens, balance.balance(cache)),
        ("decode, requests", balance.balance([len(one) for one in dealt]), balance.balance(count)),
    ]


def text(settings: tuple[Setting, ...] = (EP32, EP144), drifts: tuple[float, ...] = (0.0, 0.1, 0.4)) -> str:
    """The whole report."""
    lines = ["simulated: balancedness (mean over maximum of GPUs), the least of any layer, moved weights a layer"]
    for setting in settings:
        for drift in drifts:
            one = Setting(**{**vars(setting), "drift": drift})
            for o in run(one):
                title = f"{one.name}, Zipf {one.exponent}, drift {drift}, {o.policy}"
                lines.append(f"simulated  {title:<44} {o.balance:.3f}  {o.least:.3f}  {o.moves:6.1f}")
    for instances, each in ((32, 8), (144, 128)):
        for objective, dealt, balanced in requests(instances, each):
            title = f"{instances} instances x {each}, {objective}"
            lines.append(f"simulated  {title:<44} in turn {dealt:.3f}, balanced {balanced:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(text())
