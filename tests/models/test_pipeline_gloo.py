"""Pipelines over processes: losses and every gradient as in one process, inference, bounds, refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from dscompile.pipeline_graphs import GraphStage
from dscompile.runtime.pipeline_stage import ModuleStage
from tests.models import pipeline_checks as checks
from tests.models.pipeline_checks import deepseek, toy
from tests.ranks import Ranks, ranks

PRELOAD = [
    "tests.models.pipeline_checks",
    "dscompile.pipeline_graphs",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
]
DOUBLE, SINGLE = torch.float64, torch.float32


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks(4, tmp_path_factory.mktemp("ranks"), PRELOAD) as started:
        yield started


@pytest.mark.parametrize(
    ("name", "size", "micro_batches", "layers", "dtype"),
    [
        ("dualpipe", 2, 6, 4, DOUBLE),
        ("dualpipe", 4, 8, 8, SINGLE),
        ("dualpipev", 2, 5, 4, SINGLE),
        ("dualpipev", 4, 8, 8, DOUBLE),
        ("torch dualpipev", 2, 4, 4, DOUBLE),
    ],
)
def test_a_step_is_that_of_one_process(
    four: Ranks, name: str, size: int, micro_batches: int, layers: int, dtype: torch.dtype
) -> None:
    compared = four.run(checks.check_step, deepseek, name, size, micro_batches, layers, dtype, ModuleStage)
    assert min(compared[:size]) >= 13


@pytest.mark.parametrize(
    ("name", "size", "micro_batches"),
    [("dualpipe", 2, 4), ("torch dualpipev", 2, 5)],
)
def test_stages_of_graphs(four: Ranks, name: str, size: int, micro_batches: int) -> None:
    compared = four.run(checks.check_step, toy, name, size, micro_batches, 0, DOUBLE, GraphStage)
    assert min(compared[:size]) >= 12


@pytest.mark.parametrize(
    ("name", "micro_batches"), [("1f1b", 1), ("1f1b", 9), ("zbv", 8), ("dualpipe", 14), ("dualpipev", 11)]
)
def test_other_numbers_on_four_ranks(four: Ranks, name: str, micro_batches: int) -> None:
    assert all(four.run(checks.check_step, toy, name, 4, micro_batches, 0, DOUBLE, ModuleStage))


def test_a_model_of_graphs(four: Ranks) -> None:
    """One rank holds the whole V: F, B, I, W and both kinds of F&B."""
    assert four.run(checks.check_step, deepseek, "dualpipev", 1, 3, 2, DOUBLE, GraphStage)[0] >= 28


def test_both_copies_of_a_stage_get_the_same_gradients(four: Ranks) -> None:
    assert four.run(checks.check_copies_are_equal) == [True] * 4


def test_refusals_are_the_same_on_every_rank(four: Ranks) -> None:
    first, second, *_ = four.run(checks.check_refusals)
    expected = [
        r"batch \[3, 5\] for 4 micro-batches",
        "3 micro-batches as batch.*made for 4",
        r"micro-batch 2 is \[1, 4\] torch.int64, the first \[1, 5\]",
        "needs a loss",
        "for 4 ranks in a group of 2",
        r"was given stages \[\]. dualpipev computes \[., .\]",
        "stage 0 can't run a micro-batch of .* on rank 0: IndexError",
    ]
    for said in (first, second):
        for sentence, pattern in zip(said, expected):
            assert re.search(pattern, sentence), sentence


def test_a_stage_of_another_width_is_named(four: Ranks) -> None:
    said = four.run(checks.check_shapes)[0]
    assert re.search(r"stage 1 gave \[1, 5, 8\] torch.float32, stage 0 \[1, 5, 16\]", said)
