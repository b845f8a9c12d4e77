"""The plain Triton kernel and the combine of splits in Triton's interpreter, float16 and float32, poisoned caches."""

import pytest
import torch

from bench import mla_side, results
from dscompile.kernels.mla_decode import mla_decode
from tests.kernels.mla_decode_cases import LAYOUTS, Case, expected, make, problems

pytestmark = pytest.mark.interpreter

SMALL = Case(lengths=(0, 1, 77, 150, 64), heads=5, latent=32, rope=16, capacity=150, dtype=torch.float16)


def run_and_compare(case: Case, splits: int | None) -> None:
    args = make(case, "cpu")
    assert not problems(mla_decode(*args, impl="triton", splits=splits), expected(args), case.scale)


# Each layout with each number of queries and of splits once: the interpreter takes a second for a case.
@pytest.mark.parametrize(
    ("layout", "s_q", "splits"),
    [(LAYOUTS[(i + j) % 3], s_q, splits) for i, s_q in enumerate((1, 2, 5)) for j, splits in enumerate((1, 2, 3))],
)
def test_ragged_lengths(layout: str, s_q: int, splits: int) -> None:
    run_and_compare(SMALL.with_(layout=layout, s_q=s_q), splits)


@pytest.mark.parametrize(
    ("layout", "mask", "causal"),
    [("paged", (1, 1), True), ("paged", (5, 3), False), ("plain", (1, 3), False), ("plain", (5, 1), True)],
)
def test_masks(layout: str, mask: tuple[int, int], causal: bool) -> None:
    run_and_compare(SMALL.with_(layout=layout, s_q=3, mask=mask, causal=causal), 2)


@pytest.mark.parametrize("layout", ["paged", "plain"])
def test_a_mask_that_hides_whole_pages_and_whole_rows(layout: str) -> None:
    args = list(make(SMALL.with_(layout=layout, s_q=2, mask=(5, 2), causal=False), "cpu"))
    mask = args[5]
    mask[2, 0, :] = False  # nothing at all
    mask[3, 1, :128] = False  # no key of the first two pages: the maximum stays -inf for their length
    mask[4, 1, 1:] = False
    assert not problems(mla_decode(*args, impl="triton", splits=3), expected(tuple(args)))


def test_float32() -> None:
    run_and_compare(SMALL.with_(dtype=torch.float32, layout="plain", s_q=2), 2)


def test_full_widths() -> None:
    run_and_compare(Case(lengths=(65, 130), heads=20, s_q=2, capacity=130, dtype=torch.float16), 2)


@pytest.mark.parametrize(
    ("latent", "rope", "layout", "splits"),
    [(320, 32, "sliced", 2), (320, 0, "paged", 1), (1024, 64, "paged", 2), (13, 3, "sliced", None)],
)
def test_widths(latent: int, rope: int, layout: str, splits: int | None) -> None:
    """Tiles are wider than the tensors, whose neighbours are NaN."""
    lengths = (0, 65, 70, 5) * (1 if splits else 3)  # so many are dealt by lengths
    case = SMALL.with_(latent=latent, rope=rope, heads=3, lengths=lengths, capacity=70)
    run_and_compare(case.with_(layout="paged" if splits is None else layout), splits)


def test_a_peaked_softmax() -> None:
    run_and_compare(SMALL.with_(scale=8.0, s_q=2), 3)


def test_every_length_zero() -> None:
    run_and_compare(SMALL.with_(lengths=(0, 0)), 2)


def test_a_benchmark_refuses_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared before a benchmark is timed, request by request, paged and plain."""
    for layout in ("paged", "plain"):
        args = make(SMALL.with_(layout=layout), "cpu")
        mla_side.check(args, layout, (0, 2, 4), impl="triton", splits=1)
        o, lse = mla_decode(*args, impl="triton", splits=1)
        o[2] += 0.01
        with monkeypatch.context() as patch:
            patch.setattr(mla_side, "mla_decode", lambda *_, o=o, lse=lse, **__: (o, lse))
            with pytest.raises(results.CheckFailed, match=f"{layout}, request 2: .* outputs are off"):
                mla_side.check(args, layout, (0, 2, 4))


def test_more_splits_than_pages() -> None:
    run_and_compare(SMALL.with_(lengths=(0, 65)), 32)


def test_a_length_beyond_the_capacity_counts_as_full() -> None:
    args = list(make(SMALL.with_(lengths=(150, 150), layout="plain"), "cpu"))
    want = mla_decode(*args, impl="triton", splits=2)
    args[4] = torch.tensor([151, 1 << 20], dtype=torch.int32)
    got = mla_decode(*args, impl="triton", splits=2)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_queries_of_any_strides() -> None:
    case = SMALL.with_(s_q=2)
    args = list(make(case, "cpu"))
    args[0] = args[0].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)  # as a batched product over heads leaves it
    args[1] = args[1].transpose(1, 2).contiguous().transpose(1, 2)
    assert not problems(mla_decode(*args, impl="triton", splits=2), expected(tuple(args)))


def test_two_runs_agree_in_every_bit() -> None:
    args = make(SMALL.with_(s_q=2), "cpu")
    first, second = (mla_decode(*args, impl="triton", splits=3) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
