"""Processes that are the ranks of a gloo group, for tests: they wait for functions to run, so one start serves many.

They are forked from a server that has imported what tests need once and computed nothing, which is cheaper than to
import it in each, and safe where a fork of the test process (with its threads) isn't.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_SERVER = multiprocessing.get_context("forkserver")


class Failed(AssertionError):
    """A function raised in a rank; the message has its traceback."""


class Ranks:
    """`size` processes, ranks 0 to size - 1 of the default group."""

    def __init__(self, size: int, folder: Path, preload: Sequence[str] = ()):
        _SERVER.set_forkserver_preload(["torch", "torch.distributed", *preload])
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = _SERVER.Pipe()
            process = _SERVER.Process(target=_serve, args=(theirs, rank, size, str(folder / "store")), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """`function(rank, *args)` on every rank at once; -> the results. A function must be of an importable module.

        Raises:
            Failed: it raised in a rank.
            TimeoutError: a rank gave no answer.
        """
        found: dict[int, Any] = {}
        for rank, fine, result in self._ask(function, args, timeout):
            if not fine:  # at once: the others may be waiting for this one
                raise Failed(f"rank {rank}:\n{result}")
            found[rank] = result
        return [found[rank] for rank in range(len(self.pipes))]

    def outcomes(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[tuple[bool, Any]]:
        """As `run`; -> (True, result) of each rank, or (False, traceback), or (False, "gone") of one that ended."""
        found = {rank: (fine, result) for rank, fine, result in self._ask(function, args, timeout)}
        return [found[rank] for rank in range(len(self.pipes))]

    def _ask(self, function: Callable[..., Any], args: tuple, timeout: float) -> Iterator[tuple[int, bool, Any]]:
        for pipe in self.pipes:
            pipe.send((function, args))
        waiting = list(self.pipes)
        while waiting:
            ready = wait(waiting, timeout)
            if not ready:
                raise TimeoutError(f"ranks {[self.pipes.index(pipe) for pipe in waiting]} gave no answer")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                waiting.remove(pipe)
                try:
                    yield self.pipes.index(pipe), *pipe.recv()
                except EOFError:
                    yield self.pipes.index(pipe), False, "gone"

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[dist.ProcessGroup]:
    """A block in which this process is the only rank of the world."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def ranks(size: int, folder: Path, preload: Sequence[str] = ()) -> Iterator[Ranks]:
    """Started and, whatever happens, ended."""
    started = Ranks(size, folder, preload)
    try:
        yield started
    finally:
        started.close()


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            outcome = True, function(rank, *args)
        except BaseException:
            outcome = False, traceback.format_exc()
        pipe.send(outcome)
