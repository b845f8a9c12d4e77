"""The exchange kernels over NVLink, one process a GPU: what exchange_worker.py checks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dscompile.kernels.launch import capability

pytestmark = pytest.mark.multi_gpu

ROOT = Path(__file__).parents[2]


def start(part: str, world: int) -> list[str]:
    """Run a part in `world` processes; the output of each. Fails where one does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = dict(os.environ, WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    about["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.multi_gpu.exchange_worker", part]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=about | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(outputs)
    return outputs


@pytest.mark.parametrize("part", ["rounds", "load", "death"])
def test_exchange(part: str) -> None:
    if capability(torch.device("cuda", 0)) != (9, 0):
        pytest.skip("hopper: the exchange kernels use its bulk copies")
    start(part, min(8, torch.cuda.device_count()))
