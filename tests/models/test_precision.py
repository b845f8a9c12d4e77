"""Half precision: the compiled model may be no further from a float32 run of equal weights than twice the eager one."""

from __future__ import annotations

import pytest
import torch

from tests.models.harness import median_token_error, relative_errors, run_case
from tests.zoo import Precision, by_name

HALVES = {"bfloat16": Precision(torch.bfloat16), "float16": Precision(torch.float16)}
NAMES = ("toy/plain", "toy/eager_triu", "reference/absorbed_decode", "deepseek_v3/prefill", "deepseek_v3/static_decode")


@pytest.mark.parametrize("precision", HALVES.values(), ids=HALVES.keys())
@pytest.mark.parametrize("name", NAMES)
def test_inference(name: str, precision: Precision) -> None:
    outcome = run_case(by_name(name), precision=precision)
    ours = median_token_error(outcome.output, outcome.reference)
    eager = median_token_error(outcome.eager, outcome.reference)
    assert ours <= 2 * eager, f"{ours:.2e} from float32, eager is {eager:.2e}"
    calls = [value for name, value in outcome.output.items() if name.startswith("call")]
    assert calls and all(value.dtype is precision.weights for value in calls)
    assert {n: v.dtype for n, v in outcome.output.items()} == {n: v.dtype for n, v in outcome.eager.items()}


@pytest.mark.parametrize("name", ["toy/train", "deepseek_v3/train_eager"])
def test_gradients(name: str) -> None:
    outcome = run_case(by_name(name), precision=HALVES["bfloat16"])
    ours = relative_errors(outcome.output, outcome.reference)
    eager = relative_errors(outcome.eager, outcome.reference)
    # A gradient that eager happens to hit exactly is held to a quarter of eager's worst.
    off = {n: (e, eager[n]) for n, e in ours.items() if not e <= 2 * max(eager[n], max(eager.values()) / 4)}
    assert not off, f"gradients further from float32 than twice eager's: {off}"
