"""Times a kernel's host call on a GPU: many calls captured in one CUDA graph, medians over replays.

In a graph there is no launch overhead between calls, so what is timed is the device's work alone, all kernels of the
call included. Captured calls rotate over several sets of buffers that together exceed twice the L2 cache: no call finds
its inputs there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch


def buffer_sets(bytes_of_one: int) -> int:
    """How many sets of buffers of that size together exceed twice the L2 cache of the current device."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, math.ceil((2 * l2 + 1) / bytes_of_one))


def warm_up(milliseconds: float = 200.0) -> None:
    """Keep the tensor cores busy for that long, so that the first timing doesn't catch idle clocks."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    spent = 0.0
    while spent < milliseconds:
        for _ in range(20):
            torch.mm(x, x)
        end.record()
        end.synchronize()
        spent = begin.elapsed_time(end)


def graph_us(calls: Sequence[Callable[[], object]], *, replays: int = 9, budget_ms: float = 60.0) -> float:
    """Median microseconds of one call; `calls` do the same work on different buffers.

    Each is called once before the capture, which compiles kernels. The graph is long enough for a replay to last
    `budget_ms / replays`, and 500 calls at the most.
    """
    for call in calls:
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def elapsed_ms(work: Callable[[], object]) -> float:
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    guess_ms = max(elapsed_ms(lambda: [call() for call in calls]) / len(calls), 2e-3)
    rounds = max(1, min(500, math.ceil(budget_ms / replays / guess_ms)) // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = [elapsed_ms(graph.replay) for _ in range(replays)]
    return statistics.median(times) * 1e3 / (rounds * len(calls))
