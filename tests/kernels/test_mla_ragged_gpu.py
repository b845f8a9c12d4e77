"""Ragged batches on a GPU, dealt by the device: values, graphs whose lengths change, independence of the batch."""

import random

import pytest
import torch

import dscompile.lowering.ops  # noqa: F401  (registers the operator)
from dscompile.kernels.mla_decode import mla_decode
from dscompile.lowering import select
from tests.kernels.mla_decode_cases import Case, expected, make, problems

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["gluon", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"hopper: this device has compute capability {torch.cuda.get_device_capability()}")
    return request.param


def lognormal(requests: int, mean: int, most: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(min(most, int(draw.lognormvariate(-0.5, 1.0) * mean)) for _ in range(requests))


@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize(("heads", "s_q"), [(16, 1), (64, 1), (128, 1), (128, 2), (20, 3)])
@pytest.mark.parametrize("requests", [1, 5, 40, 150])
def test_ragged_batches(requests: int, heads: int, s_q: int, invariant: bool, impl: str) -> None:
    lengths = lognormal(requests, 500, 1500, requests)
    layout = ("paged", "plain", "sliced")[(requests + heads) % 3]
    args = make(Case(lengths, heads=heads, s_q=s_q, capacity=1500, layout=layout), "cuda")
    assert not problems(mla_decode(*args, impl=impl, batch_invariant=invariant), expected(args))


@pytest.mark.parametrize("lengths", [(0,) * 70, (0, 1000) * 30, (1,) * 300, (64,) * 132, (1000,) + (0,) * 140], ids=len)
def test_extreme_batches(lengths: tuple[int, ...], impl: str) -> None:
    args = make(Case(lengths, heads=64, capacity=1000), "cuda")
    assert not problems(mla_decode(*args, impl=impl), expected(args))


def test_a_very_long_request(impl: str) -> None:
    args = make(Case((131072, 5), heads=16, capacity=131072), "cuda")
    assert not problems(mla_decode(*args, impl=impl), expected(args))


def test_a_graph_follows_lengths_from_even_to_ragged(impl: str) -> None:
    args = make(Case((2000,) * 66, capacity=2000, heads=32, layout="plain"), "cuda")
    seqlens = args[4]
    mla_decode(*args, impl=impl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mla_decode(*args, impl=impl)
    for lengths in (lognormal(66, 500, 2000), (2000,) * 66, (0,) * 66, lognormal(66, 900, 2000, 1)):
        seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        got[0].fill_(float("nan"))
        got[1].fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert not problems(got, expected(args))


def test_a_request_does_not_depend_on_its_neighbours(impl: str) -> None:
    args = make(Case(lognormal(50, 1500, 8000), capacity=8000, heads=16), "cuda")
    q_latent, q_rope, latent, k_rope, seqlens, _, table, *rest = args
    o, lse = mla_decode(*args, impl=impl, batch_invariant=True)
    for some in (slice(0, 1), slice(7, 12), slice(20, 50)):  # the operator's argument reaches the same kernel
        part = q_latent[some], q_rope[some], latent, k_rope, seqlens[some], None, table[some]
        with select.force("mla_decode", impl):
            o_some, lse_some = torch.ops.dsinfra.mla_decode(*part, *rest, batch_invariant=True)
        assert torch.equal(o_some, o[some]) and torch.equal(lse_some, lse[some])


def test_independence_of_more_requests_than_can_be_weighed(impl: str) -> None:
    """A request among 150 of 16 pieces each, which take two launches, and alone."""
    args = make(Case(lognormal(150, 3000, 16384), capacity=16384, heads=16, layout="paged"), "cuda")
    q_latent, q_rope, latent, k_rope, seqlens, _, table, *rest = args
    o, lse = mla_decode(*args, impl=impl, batch_invariant=True)
    assert not problems((o, lse), expected(args))
    for b in (0, 127, 128, 149):
        one = slice(b, b + 1)
        part = q_latent[one], q_rope[one], latent, k_rope, seqlens[one], None, table[one]
        o_one, lse_one = mla_decode(*part, *rest, impl=impl, batch_invariant=True)
        assert torch.equal(o_one, o[one]) and torch.equal(lse_one, lse[one])


def test_runs_agree_in_every_bit(impl: str) -> None:
    args = make(Case(lognormal(90, 1500, 8000), capacity=8000, heads=128), "cuda")
    first = mla_decode(*args, impl=impl)
    for _ in range(20):
        again = mla_decode(*args, impl=impl)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
