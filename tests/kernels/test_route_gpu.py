"""Routers on a GPU: every form, ties, 16-bit logits, CUDA graphs."""

import pytest
import torch

from dscompile.kernels.route import route
from tests.kernels.route_cases import ROUTERS, Router, logits_and_bias, problems

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 100, 9001])
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)
def test_routers(router: Router, tokens: int, dtype: torch.dtype) -> None:
    logits, bias = logits_and_bias(router, tokens, dtype, "cuda")
    got = route(logits, bias, *router.arguments())
    assert not problems(router, got, logits, bias)
    again = route(logits, bias, *router.arguments())
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)
def test_logits_off_the_grid(router: Router) -> None:
    logits, bias = logits_and_bias(router, 4000, torch.float32, "cuda")
    logits = torch.randn_like(logits) * 2
    assert not problems(router, route(logits, bias, *router.arguments()), logits, bias)


def test_nan_comes_first_as_in_topk() -> None:
    logits = torch.linspace(-1, 1, 256, device="cuda").repeat(5000, 1)
    logits[:, 17] = torch.nan
    idx, weight = route(logits, None, 8, "sigmoid", 8, 4, "top2")
    assert idx[0].tolist() == [17, *range(255, 248, -1)] and bool((idx == idx[0]).all())
    assert bool(weight[:, 0].isnan().all()) and bool(weight[:, 1:].isfinite().all())


def test_a_cuda_graph_follows_logits_that_change() -> None:
    router = ROUTERS[0]
    logits, bias = logits_and_bias(router, 64, torch.float32, "cuda")
    route(logits, bias, *router.arguments())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = route(logits, bias, *router.arguments())
    for _ in range(3):
        logits.copy_(logits.roll(1, 1))
        graph.replay()
        assert not problems(router, got, logits, bias)
