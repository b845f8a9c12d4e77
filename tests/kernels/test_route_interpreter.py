"""Routers in Triton's interpreter: every form, ties, NaN, odd numbers of tokens."""

import pytest
import torch

from dscompile.kernels.route import route
from tests.kernels.route_cases import ROUTERS, Router, logits_and_bias, problems

pytestmark = pytest.mark.interpreter

PLAIN = Router("plain", 20, 5, "softmax_topk")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)
def test_routers(router: Router, dtype: torch.dtype) -> None:
    logits, bias = logits_and_bias(router, 13, dtype, "cpu")
    assert not problems(router, route(logits, bias, *router.arguments()), logits, bias)


@pytest.mark.parametrize("value", [0.0, -3.0, -torch.inf])
def test_equal_logits_go_to_the_lowest_experts(value: float) -> None:
    idx, weight = route(torch.full((2, 20), value), None, 5, "softmax_topk")
    assert idx.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert value == -torch.inf or weight.tolist() == [[pytest.approx(0.2)] * 5] * 2


def test_both_zeros_are_equal_and_infinities_in_order() -> None:
    logits = torch.tensor([[-0.0, 0.0, -torch.inf, -0.0, torch.inf, -1.0]])
    assert route(logits, None, 6, "softmax_topk")[0].tolist() == [[4, 0, 1, 3, 5, 2]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_topk"])
@pytest.mark.parametrize("groups", [1, 4])
def test_nan_comes_first_as_in_topk(score: str, groups: int) -> None:
    logits = torch.linspace(-1, 1, 20)[None].repeat(2, 1)
    logits[0, 3] = torch.nan
    logits[1, 7] = -torch.nan
    idx, weight = route(logits, None, 5, score, groups, 2, "top2")
    if score == "softmax":
        assert idx[0].tolist() == [0, 1, 2, 3, 4] and bool(weight.isnan().all())
    else:
        assert idx[:, 0].tolist() == [3, 7] and bool(weight[:, 0].isnan().all())
        assert bool(weight[:, 1:].isnan().all()) == (score == "softmax_topk")
        assert idx[:, 1].tolist() == [19, 19]


def test_a_bias_of_minus_infinity_leaves_an_expert_out() -> None:
    bias = torch.zeros(20)
    bias[19] = -torch.inf
    logits = torch.linspace(-1, 1, 20)[None]
    assert route(logits, bias, 2, "sigmoid")[0].tolist() == [[18, 17]]
    assert route(logits, bias, 20, "sigmoid")[0].tolist() == [[*range(18, -1, -1), 19]]


def test_strided_logits_and_no_tokens() -> None:
    logits, _ = logits_and_bias(PLAIN, 7, torch.float32, "cpu")
    wide = torch.zeros(7, 50)
    wide[:, 3:23] = logits
    for view in (wide[:, 3:23], logits.t().contiguous().t()):
        assert not problems(PLAIN, route(view, None, *PLAIN.arguments()), logits, None)
    idx, weight = route(logits[:0], None, *PLAIN.arguments())
    assert idx.shape == weight.shape == (0, 5)
