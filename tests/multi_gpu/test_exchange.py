"""The exchange over NVLink, one process a GPU: its kernels alone, and behind the operators of compiled models."""

from __future__ import annotations

import pytest
import torch

from dscompile.kernels.launch import capability
from tests.multi_gpu.processes import start

pytestmark = pytest.mark.multi_gpu


@pytest.fixture
def world() -> int:
    if capability(torch.device("cuda", 0)) != (9, 0):
        pytest.skip("hopper: the exchange kernels use its bulk copies")
    return min(8, torch.cuda.device_count())


@pytest.mark.parametrize("part", ["rounds", "load", "death"])
def test_kernels(part: str, world: int) -> None:
    start("exchange_worker", [part], world)


@pytest.mark.parametrize("part", ["layers", "fp8", "replays", "profile", "models", "death"])
def test_operators(part: str, world: int) -> None:
    start("operators_worker", [part], world, DSINFRA_EP_TIMEOUT="5" if part == "death" else "60")
