"""The host side of MLA decode on the CPU: the choice of splits, and what is refused with which words."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dscompile.kernels import launch
from dscompile.kernels.mla_decode import (
    MAX_SPLITS,
    BadArguments,
    KernelLimit,
    gluon_refusal,
    mla_decode,
    mla_decode_unchecked,
    pick_splits,
    triton_refusal,
)
from tests.kernels.mla_decode_cases import Case, make

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("programs", "pages", "splits"),
    [
        (128, 128, 1),  # one wave of 132, nearly full
        (256, 64, 1),  # two, nearly full
        (64, 32, 2),  # half a wave becomes a whole one
        (100, 128, 5),  # 500 of 528 places in four waves; fewer parts leave a quarter idle
        (133, 128, 4),  # uncut, one program has a wave to itself
        (64, 4, 1),  # too few pages to pay for partial results
        (1, 1024, 128),
        (1, 8, 8),  # each page to a processor of its own
        (1, 4, 1),
        (1, 0, 1),
    ],
)
def test_pick_splits(programs: int, pages: int, splits: int) -> None:
    assert pick_splits(programs, pages, 132) == splits


def test_pick_splits_keeps_to_the_most() -> None:
    assert pick_splits(1, 1024, 132, 32) == 32
    assert pick_splits(1, 4, 132, 32) == 1


@pytest.mark.parametrize("sms", [1, 78, 132])
def test_pick_splits_stays_within_its_bounds(sms: int) -> None:
    for programs in range(1, 400, 7):
        for pages in (1, 3, 9, 100, 10_000):
            assert 1 <= pick_splits(programs, pages, sms) <= min(MAX_SPLITS, pages)


@pytest.mark.parametrize("equal_lengths", [False, True])
def test_lengths_are_weighed_unless_they_are_equal(equal_lengths: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a few requests of a paged cache: what is launched knows the plan, or equal parts."""
    launched = []
    monkeypatch.setattr("dscompile.kernels.mla_decode.launch_triton", lambda *args: launched.append(args[-1]))
    monkeypatch.setattr("dscompile.kernels.mla_decode.launch_combine", lambda *args: None)
    args = make(Case(lengths=(70,) * 9, s_q=1, capacity=128, layout="paged"), "cpu")
    mla_decode_unchecked(*args, impl="triton", equal_lengths=equal_lengths)
    assert [work.deal is None for work in launched] == [equal_lengths]


NAMES = ("q_latent", "q_rope", "latent", "k_rope", "seqlens", "mask", "page_table", "scale", "causal")


def call(layout: str = "paged", **changes: object) -> None:
    arguments = dict(zip(NAMES, make(Case(lengths=(3, 5), s_q=2, capacity=100, layout=layout), "cpu")))
    options = {name: changes.pop(name) for name in ("impl", "splits") if name in changes}
    arguments.update({name: change(arguments[name]) for name, change in changes.items()})
    mla_decode(*arguments.values(), **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q_rope": lambda x: x[:, :1]}, r"\(2, 1, 16, 64\).*numbers of queries"),
        ({"k_rope": lambda x: x[:-1]}, "numbers of queries, of keys"),
        ({"latent": lambda x: x[..., :500]}, r"500.*of columns"),
        ({"q_latent": lambda x: x.float()}, "Convert the queries to the cache's"),
        ({"latent": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)}, "last dimension is contiguous"),
        ({"seqlens": lambda x: x.long()}, "int64.*contiguous int32 tensor of 2"),
        ({"seqlens": lambda x: x[:1]}, "one 32-bit length a request"),
        ({"page_table": lambda x: x.long()}, r"int32 \[2, max_pages\]"),
        ({"page_table": lambda x: None}, "Without a page table"),
        ({"mask": lambda x: torch.ones(2, 2, 100, dtype=torch.bool)}, r"\(2, 2, 128\).*each size that one or 1"),
        ({"mask": lambda x: torch.ones(2, 2, 128)}, "float32.*Pass bool"),
        ({"scale": lambda x: 0.0}, "scale is 0.0.*Scale the queries"),
        ({"scale": lambda x: float("nan")}, "scale is nan"),
        ({"splits": 129}, "Use 1 to 128"),
        ({"splits": 0}, "splits is 0"),
        ({"latent": lambda x: x.to("meta")}, "Move them to one device"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(changes: dict, words: str) -> None:
    with pytest.raises(BadArguments, match=words):
        call(**changes)


def test_pages_of_another_size() -> None:
    pool = torch.zeros(4, 32, 576, dtype=torch.bfloat16)
    with pytest.raises(BadArguments, match=r"pages of 64 rows. Pass \[P, 64, C\]"):
        call(latent=lambda _: pool[..., :512], k_rope=lambda _: pool[..., 512:])


def test_unknown_implementation() -> None:
    with pytest.raises(KernelLimit, match="'cuda'. No kernel.*'gluon', 'triton'"):
        call(impl="cuda")


def test_refusals_on_the_cpu() -> None:
    pytest.importorskip("triton", reason="compile_only: Triton is not installed")
    if launch.interpreting():
        pytest.skip("compile_only: this process interprets kernels")
    with pytest.raises(KernelLimit, match="only Hopper.*Use impl='triton'"):
        call(impl="gluon")
    with pytest.raises(KernelLimit, match="runs on CUDA devices"):
        call(impl="triton")


@pytest.fixture
def hopper() -> object:
    """As if on Hopper, without compiling: refusals read metadata only."""
    pytest.importorskip("triton", reason="compile_only: Triton is not installed")
    if launch.interpreting():
        pytest.skip("compile_only: this process interprets kernels")
    with launch.offline():
        yield


def tensors(layout: str = "paged", **changes: object) -> list[torch.Tensor]:
    return list(make(Case(lengths=(3, 5), s_q=2, capacity=100, layout=layout).with_(**changes), "cpu")[:4])


@pytest.mark.parametrize("layout", ["paged", "plain", "sliced"])
def test_gluon_takes(layout: str, hopper: object) -> None:
    assert gluon_refusal(*tensors(layout)) is None
    assert gluon_refusal(*tensors(layout, dtype=torch.float16)) is None
    assert gluon_refusal(*tensors(layout, lengths=(3,), s_q=1, heads=1)) is None


def test_gluon_refuses(hopper: object) -> None:
    assert "16 bits" in gluon_refusal(*tensors(dtype=torch.float32))
    assert "(512, 64)" in gluon_refusal(*tensors(latent=256))
    q_latent, q_rope, latent, k_rope = tensors()
    odd_rows = torch.zeros(4, 64, 516, dtype=torch.bfloat16)
    assert "latent (4, 64, 512) has strides (33024, 516, 1)" in gluon_refusal(
        q_latent, q_rope, odd_rows[..., :512], k_rope
    )
    assert "offset 4" in gluon_refusal(q_latent, q_rope, odd_rows[..., 4:], k_rope)
    assert "not 0" in gluon_refusal(q_latent[:1].expand(2, -1, -1, -1), q_rope, latent, k_rope)


def test_triton_takes_and_refuses(hopper: object) -> None:
    assert triton_refusal(*tensors(latent=32, rope=16, dtype=torch.float32)) is None
    assert triton_refusal(*tensors(latent=1024, rope=0)) is None and triton_refusal(*tensors(latent=13, rope=3)) is None
    assert "(1024, 128) wide in torch.bfloat16" in triton_refusal(*tensors(latent=1024, rope=128))
    assert "There is no kernel for wider ones" in triton_refusal(*tensors(latent=1024, dtype=torch.float32))
    assert "There is no kernel for wider ones" in triton_refusal(*tensors(latent=1025))
    assert "Convert to one of these" in triton_refusal(*tensors(dtype=torch.float64))


def test_without_triton_everything_imports_and_says_so() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from dscompile.kernels import launch, mla_decode\n"
        "assert not launch.has_triton() and not launch.has_gluon() and not launch.interpreting()\n"
        "assert launch.tma_load is None and launch.triton_version() is None\n"
        "x = torch.zeros(1, 1, 1, 16)\n"
        "assert 'not installed' in mla_decode.gluon_refusal(x, x, x[0], x[0])\n"
        "assert 'not installed' in mla_decode.triton_refusal(x, x, x[0], x[0])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
