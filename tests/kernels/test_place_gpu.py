"""Counters and replicas of placed experts on a GPU: the references' bits, every time, also in a CUDA graph."""

import pytest
import torch

import dscompile.lowering.ops.placement  # noqa: F401  (registers the operators)
from dscompile.kernels import place
from dscompile.lowering import select
from dscompile.lowering.ops import placement as reference
from tests.kernels.place_cases import CASES, Case, problems

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("policy", place.POLICIES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 128, 4096])
def test_bits_of_the_reference(case: Case, policy: str, tokens: int) -> None:
    for seed, dtype in enumerate((torch.int64, torch.int32) if case is CASES[1] else (torch.int64,)):
        for _ in range(3):  # programs in another order
            assert not problems(case, policy, case.ids(tokens, dtype, "cuda", seed))


@pytest.mark.parametrize("policy", place.POLICIES)
def test_the_references_agree_with_the_cpu(policy: str) -> None:
    case = CASES[1]
    ids = case.ids(512, torch.int64)
    rule = case.slots, case.ranks, policy
    on_gpu = reference.place_reference(ids.cuda(), *case.maps("cuda"), *rule)
    assert torch.equal(on_gpu.cpu(), reference.place_reference(ids, *case.maps(), *rule))


@pytest.mark.parametrize("policy", place.POLICIES)
@pytest.mark.parametrize("tokens", [128, 1024])
def test_a_cuda_graph_follows_ids_and_maps_that_change(policy: str, tokens: int) -> None:
    case = CASES[1]
    ids, (log2phy, logcnt) = case.ids(tokens, torch.int64, "cuda"), case.maps("cuda")
    counter = torch.zeros(case.experts, dtype=torch.int64, device="cuda")
    args = ids, counter, log2phy, logcnt, case.slots, case.ranks, policy
    assert select.choose("place_counted", args)[0].name == "kernel"
    call = torch.ops.dsinfra.place_counted
    call(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(*args)
    counter.zero_()
    want = torch.zeros_like(counter)
    for seed in range(3):
        ids.copy_(case.ids(tokens, torch.int64, "cuda", seed))
        order = torch.randperm(case.experts, device="cuda")
        log2phy.copy_(log2phy[order])
        logcnt.copy_(logcnt[order])
        graph.replay()
        expected = reference.place_counted_reference(ids, want, *args[2:])
        assert torch.equal(got, expected) and torch.equal(counter, want)
