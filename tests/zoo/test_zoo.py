"""The zoo itself: cases are reproducible, spellings agree with one another, near misses differ from the real thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.zoo import CASES, Precision, ZooCase, by_name
from tests.zoo.reference_form import ReferenceMLA
from tests.zoo.toy import Form, ToyMLA

DOUBLE = Precision(torch.float64)


def output(case: ZooCase) -> Any:
    module, args, kwargs = case.build(DOUBLE)
    with torch.no_grad():
        return module(*args, **kwargs)


@pytest.mark.parametrize("name", ["toy/plain", "near_miss/sinks", "reference/absorbed_decode", "deepseek_v3/prefill"])
def test_two_builds_are_equal(name: str) -> None:
    first, second = by_name(name).example(), by_name(name).example()
    for ours, theirs in zip(first.module.state_dict().items(), second.module.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first.calls, second.calls, strict=True))


def test_rounding_keeps_the_weights_of_the_narrow_dtype() -> None:
    narrow = by_name("toy/plain").build(Precision(torch.bfloat16))[0]
    wide = by_name("toy/plain").build(Precision(torch.bfloat16, torch.float32))[0]
    for ours, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert theirs.dtype is torch.float32 and torch.equal(ours.float(), theirs)


@pytest.mark.parametrize(
    "name",
    ["tril_mask", "triu_mask", "eager_triu", "eager_tril", "copies_and_clones", "einsum_up_projection", "rope_first"],
)
def test_spellings_of_one_computation_agree(name: str) -> None:
    torch.testing.assert_close(output(by_name(f"toy/{name}")), output(by_name("toy/plain")))


def test_pairs_of_rotations_agree() -> None:
    """Neighbouring pairs, rotated as real or as complex numbers."""
    torch.testing.assert_close(output(by_name("toy/rope_complex")), output(by_name("toy/rope_interleaved")))


@pytest.mark.parametrize("factor", ["query", "key"])
def test_the_scale_may_sit_on_a_factor(factor: str) -> None:
    torch.testing.assert_close(output(by_name(f"toy/scaled_{factor}")), output(by_name("toy/plain")))


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.name.startswith("near_miss/")], ids=lambda c: c.name)
def test_near_misses_compute_something_else(case: ZooCase) -> None:
    if case.tags & {"hf", "experts"} or case.random:
        return
    found = output(case)
    if isinstance(found, tuple):  # equal values, but the weights leave the module
        torch.testing.assert_close(found[0], output(by_name("toy/plain")))
        torch.testing.assert_close(found[1].sum(-1), torch.ones_like(found[1][..., 0]))
        return
    assert not torch.allclose(found, output(by_name("toy/plain")), rtol=1e-3, atol=1e-4)


def test_reference_forms_agree() -> None:
    """Naive, cached and absorbed forms over a prompt and two steps, with equal weights."""
    torch.manual_seed(0)
    absorbed = DOUBLE.settle(ReferenceMLA("absorbed"))
    cached = DOUBLE.settle(ReferenceMLA("cached_heads"))
    naive = DOUBLE.settle(ReferenceMLA("naive"))
    for other in (cached, naive):
        other.load_state_dict(absorbed.state_dict())
    x = torch.randn(2, 12, 64, dtype=torch.float64)
    with torch.no_grad():
        parts = [(x[:, :10], 0), (x[:, 10:11], 10), (x[:, 11:], 11)]
        ours, theirs = (torch.cat([m(part, start) for part, start in parts], 1) for m in (absorbed, cached))
        whole = naive(x, 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours, whole, rtol=1e-6, atol=1e-7)


def test_padding_is_not_seen() -> None:
    module = ToyMLA(Form(mask="padding")).double().eval()
    x, keep = torch.randn(1, 6, 64).double(), torch.tensor([[True, True, True, True, False, True]])
    changed = x.clone()
    changed[:, 4] += 1.0
    with torch.no_grad():
        torch.testing.assert_close(module(x, keep)[:, 5], module(changed, keep)[:, 5])


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(KeyError, match="no zoo case 'toy/plane'; known: toy/plain, "):
        by_name("toy/plane")
