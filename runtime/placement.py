"""Expert placement that follows the load: count, decide, plan, move, without stopping the model.

    compiled step  ->  counters [E] of each layer  ->  Window (sum over ranks)  ->  Trigger  ->  plan  ->  Move by Move

`Rebalancer.step()` is called by every rank between two steps of the model. It reads counters at intervals; plans in a
thread of the first rank, which all others take over some steps later; and moves one layer at a time, transfers running
beside a step and the switch standing between two. All ranks take the same branch at the same call, because everything
that is decided comes from summed counters or from the first rank. Spare slots are not needed: without
them experts are exchanged.

Shape suffixes: L layers, E experts, P slots of all ranks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dscompile.runtime import eplb
from dscompile.runtime.eplb import PlacementError
from dscompile.runtime.eplb_moves import choose, frontier, moved
from dscompile.runtime.movement import Move, MovementFailed, Slots

log = logging.getLogger(__name__)
Plan = Callable[[Tensor, Tensor, int], Tensor]  # (loads [L,E], old [L,P], ranks) -> phy2log [L,P]


class Window:
    """Loads of the last ``length`` readings of the counters.

    Args:
        group: ranks to sum over; None: this process alone.
    """

    def __init__(self, layers: Sequence[Slots], length: int, group: dist.ProcessGroup | None = None):
        self.layers, self.group = layers, group
        self._readings: deque[Tensor] = deque(maxlen=length)

    def read(self) -> None:
        """Takes what the counters counted since the last reading, and sets them back to 0."""
        counts = torch.stack([layer.counter for layer in self.layers])
        for layer in self.layers:
            layer.counter.zero_()
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        self._readings.append(counts.cpu())

    def loads(self) -> Tensor:
        """[L,E] int64, on the CPU."""
        if not self._readings:
            return torch.zeros(len(self.layers), len(self.layers[0].counter), dtype=torch.int64)
        return torch.stack(tuple(self._readings)).sum(0)


@dataclass
class Trigger:
    """When a new plan is made, and whether it is worth its bytes.

    below, above: a balance (mean over maximum, summed over layers) under ``below`` starts rebalancing; from then on
    until ``above`` is reached every interval tries again, so that a balance at the threshold doesn't start and stop.
    interval: the fewest steps between two plans. seconds: what experts take in a balanced step. bandwidth: bytes
    a second at which weights travel. A plan is worth it if what it saves in an interval is more than moving costs.
    """

    below: float = 0.85
    above: float = 0.95
    interval: int = 256
    seconds: float = 10e-3
    bandwidth: float = 100e9
    last: int | None = field(default=None, init=False)
    restless: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.below <= self.above <= 1 or self.interval < 1 or self.bandwidth <= 0:
            raise PlacementError(
                f"a trigger below {self.below} and above {self.above}, interval {self.interval}, {self.bandwidth} B/s",
                "A balance is in 0 to 1, and rebalancing ends at a better one than it starts at",
                "Give 0 < below <= above <= 1, an interval of 1 or more and a positive bandwidth",
            )

    def due(self, step: int, balance: float) -> bool:
        """Whether to plan now."""
        self.restless = balance < self.below or (self.restless and balance < self.above)
        if not self.restless or (self.last is not None and step - self.last < self.interval):
            return False
        self.last = step
        return True

    def worth(self, balance: float, predicted: float, moved_bytes: int) -> bool:
        """Whether a plan saves more than it costs."""
        saved = self.seconds * (1 / balance - 1 / predicted) * self.interval
        return saved > moved_bytes / self.bandwidth


@dataclass(frozen=True)
class Switched:
    """One layer's change, for the report."""

    step: int
    layer: int
    load: list[int]  # of each expert, in the window that it was planned for
    old: list[int]
    new: list[int]
    moves: int


def least_moves(loads: Tensor, old: Tensor, ranks: int) -> Tensor:
    """The plan by default: of each layer's frontier the fewest moves that reach 99 % of the best balance."""
    return torch.stack([choose(options).phy2log for options in frontier(loads, old, ranks)])


class Rebalancer:
    """The placement of a model's expert layers on the ranks of a group, kept balanced.

    Args:
        layers: what this rank holds of each.
        phy2log: [L,P], the placement in force, which the maps are set to.
        group: the ranks; None: this process alone. Over NCCL one of their own: transfers run beside steps, and a
            communicator must not be used twice at once.
        window: readings that a plan looks at. every: steps between two readings. plan_steps: steps between the start of
            a plan and its use; the first rank's thread has so long.
        plan: makes a placement without an expert twice on a rank.
        timeout: the longest wait for other ranks in a move, in seconds.
    """

    def __init__(
        self,
        layers: Sequence[Slots],
        phy2log: Tensor,
        group: dist.ProcessGroup | None = None,
        *,
        trigger: Trigger | None = None,
        window: int = 16,
        every: int = 16,
        plan_steps: int = 16,
        plan: Plan = least_moves,
        timeout: float = 300.0,
    ):
        self.layers, self.group, self.phy2log = list(layers), group, phy2log.clone()
        self._first = phy2log.clone()
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()
        self.device, self.timeout = layers[0].counter.device, timeout
        self.trigger, self.every, self.plan_steps, self._plan = trigger or Trigger(), every, plan_steps, plan
        self.window = Window(layers, window, group)
        self.history: list[Switched] = []
        self.failed: MovementFailed | None = None
        self._steps = 0
        self._thread = ThreadPoolExecutor(1, "dsinfra placement")
        self._planning: tuple[int, Tensor, float, Future[Tensor] | None] | None = None
        self._todo: deque[tuple[int, Tensor, Tensor]] = deque()  # layer, new, loads
        self._move: tuple[int, Tensor, Tensor, Move] | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._set_maps()

    def _set_maps(self) -> None:
        experts, width = self.layers[0].log2phy.shape
        log2phy, logcnt = eplb.maps_of(self.phy2log, experts, width)
        for i, layer in enumerate(self.layers):
            layer.log2phy.copy_(log2phy[i])
            layer.logcnt.copy_(logcnt[i])

    def step(self) -> int | None:
        """Between two steps of the model, on every rank; -> the layer that was switched, if one was.

        Raises:
            MovementFailed: weights didn't arrive. The placement in ``phy2log`` is in force, and nothing more is moved.
        """
        self._steps += 1
        if self.failed is not None:
            return None
        switched = None
        try:
            if self._move is not None:
                switched = self._finish()
            if self._todo:
                self._begin()
        except MovementFailed as failed:
            self.failed, self._move = failed, None
            self._todo.clear()
            raise
        if self._steps % self.every == 0:
            self.window.read()
            self._consider()
        if self._planning is not None and self._steps >= self._planning[0]:
            self._take_over()
        return switched

    @property
    def busy(self) -> bool:
        """Whether a plan is being made or layers are on their way."""
        return bool(self._planning or self._todo or self._move)

    def record(self, names: Sequence[str] | None = None) -> dict[str, object]:
        """What `dscompile report placement` draws, for ``json.dumps``; ``names`` of the layers."""
        names = names or [str(i) for i in range(len(self.layers))]
        loads, moves = self.window.loads(), [0] * len(self.layers)
        for change in self.history:
            moves[change.layer] += change.moves
        layers = [
            {"name": names[i], "load": loads[i].tolist(), "before": before, "now": now, "moves": moves[i]}
            for i, (before, now) in enumerate(zip(self._first.tolist(), self.phy2log.tolist()))
        ]
        return {"ranks": self.size, "steps": self._steps, "layers": layers}

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    # -------------------------------------------------------------- plans

    def balance(self, loads: Tensor, phy2log: Tensor) -> float:
        """Of all layers together: what a step would take if every layer were even, over what it takes."""
        on_ranks = eplb.gpu_loads(loads, phy2log, self.size)
        most = on_ranks.amax(1).sum().item()
        return on_ranks.mean(1).sum().item() / most if most else 1.0

    def _consider(self) -> None:
        if self.busy:
            return
        loads = self.window.loads()
        balance = self.balance(loads, self.phy2log)
        if self.trigger.due(self._steps, balance):
            old = self.phy2log.clone()
            future = self._thread.submit(self._plan, loads, old, self.size) if self.rank == 0 else None
            self._planning = self._steps + self.plan_steps, loads, balance, future

    def _take_over(self) -> None:
        """The first rank's plan on every rank; none where planning raised, which is logged and tried again."""
        assert self._planning is not None
        _, loads, balance, future = self._planning
        self._planning = None
        new = torch.full_like(self.phy2log, -1)
        if future is not None:
            try:
                new = future.result()
            except Exception:
                log.exception("dsinfra: no placement could be planned; the old one stays")
        if self.group is not None:
            sent = new.to(self.device)
            dist.broadcast(sent, group_src=0, group=self.group)
            new = sent.cpu()
        if (new < 0).any():
            return
        moves = moved(self.phy2log, new, self.size)
        travels = sum(int(moves[i].sum()) * _bytes_of_one(layer) for i, layer in enumerate(self.layers))
        if self.trigger.worth(balance, self.balance(loads, new), travels // self.size):
            changed = (new != self.phy2log).any(1).nonzero().flatten().tolist()
            self._todo.extend((i, new[i], loads[i]) for i in changed)

    # -------------------------------------------------------------- moves

    def _begin(self) -> None:
        layer, new, loads = self._todo.popleft()
        move = Move(self.layers[layer], self.phy2log[layer], new, self.group, self.timeout)
        move.stage(self._stream)
        self._move = layer, new, loads, move

    def _finish(self) -> int:
        assert self._move is not None
        layer, new, loads, move = self._move
        move.commit()
        old = self.phy2log[layer].clone()
        self.phy2log[layer] = new
        self._move = None
        moves = int(moved(old, new, self.size).sum())
        self.history.append(Switched(self._steps, layer, loads.tolist(), old.tolist(), new.tolist(), moves))
        return layer


def _bytes_of_one(layer: Slots) -> int:
    return sum(w[0].numel() * w.element_size() for w in layer.weights)
