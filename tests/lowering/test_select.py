"""The tables of implementations: order, refusals, names, forcing, and decisions on fake tensors."""

import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import errors, select, torch_attention


@pytest.fixture
def table():
    t = select.Table("toy")
    t.register("even", lambda n: select.YES if n % 2 == 0 else select.no(f"{n} is odd"), lambda n: ("even", n))
    t.register("any", lambda n: select.YES, lambda n: ("any", n))
    return t


def test_first_that_agrees_runs_and_the_skipped_say_why(table):
    assert table.run(4) == ("even", 4) and table.run(3) == ("any", 3)
    implementation, skipped = table.choose((3,))
    assert implementation.name == "any" and skipped == [("even", "3 is odd")]
    assert table.choose((4,))[1] == []


def test_decision_is_its_truth():
    assert select.YES and not select.no("because") and select.no("because").reason == "because"


def test_before_inserts_in_front(table):
    table.register("zero", lambda n: select.YES if n == 0 else select.no("not 0"), lambda n: "zero", before="even")
    assert table.names == ("zero", "even", "any") and table.run(0) == "zero"


def test_duplicate_name_raises(table):
    with pytest.raises(errors.DuplicateImplementation, match=r"'even' exists already, among \['even', 'any'\]"):
        table.register("even", lambda n: select.YES, lambda n: n)


@pytest.mark.parametrize("ask", [lambda t: t.get("evne"), lambda t: t.register("x", None, None, before="evne")])
def test_unknown_name_lists_the_known(table, ask):
    with pytest.raises(errors.UnknownImplementation, match=r"'evne'.*\['even', 'any'\]"):
        ask(table)


def test_unknown_operator_lists_the_known():
    with pytest.raises(errors.UnknownImplementation, match=r"'mal'.*'mla'"):
        select.choose("mal", ())


def test_a_table_without_fallback_says_why_each_refused():
    t = select.Table("toy")
    t.register("never", lambda n: select.no("never does"), None)
    with pytest.raises(errors.NotSupported, match="never: never does"):
        t.run(1)


def test_registered_operators():
    for op, names in (("mla", ("cudnn", "efficient", "reference")), ("mla_decode", ("gluon", "triton", "reference"))):
        assert select.table(op).names == names
    assert select.table("mla_backward").names == select.table("mla").names


def mla_args(device="cpu", B=1, H=2, S=256, T=256, N=128, R=64, V=128, C=512, dtype=torch.bfloat16):
    shapes = (B, H, S, N), (B, H, S, R), (B, T, C), (B, T, R), (H, N, C), (H, V, C)
    return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]


def test_force_and_its_end():
    args = (*mla_args(), None, 1.0, True)
    with select.force("mla", "reference"):
        assert select.choose("mla", args)[0].name == "reference"
    with select.force("mla", "cudnn"), pytest.raises(errors.NotSupported, match="'cudnn' is forced.*on cpu"):
        select.choose("mla", args)
    with pytest.raises(errors.UnknownImplementation):
        select.force("mla", "cudn").__enter__()
    assert len(select.choose("mla", args)[1]) == 2


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper card, as far as metadata tells: nothing is launched on it."""
    monkeypatch.setattr(torch_attention, "device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    return monkeypatch


def choose_on_hopper(mask=None, causal=True, **sizes):
    with FakeTensorMode():
        args = mla_args("cuda", **sizes)
        mask = None if mask is None else torch.empty(mask[0], dtype=mask[1], device="cuda")
        implementation, skipped = select.choose("mla", (*args, mask, 1.0, causal))
    return implementation.name, dict(skipped)


def test_causal_prefill_takes_cudnn(hopper):
    assert choose_on_hopper() == ("cudnn", {})
    assert choose_on_hopper(S=255, T=300) == ("cudnn", {})
    assert choose_on_hopper(dtype=torch.float16, causal=False, S=3) == ("cudnn", {})


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 256), (1, 1, 1, 256), (1, 2, 256, 256)], ids=["plane", "keys", "heads"])
def test_masked_prefill_takes_cudnn(hopper, shape, dtype):
    assert choose_on_hopper(mask=(shape, dtype), causal=False) == ("cudnn", {})


@pytest.mark.parametrize(
    ("change", "chosen", "reason"),
    [
        ({"dtype": torch.float32}, "efficient", "not torch.float32"),
        ({"T": 257}, "efficient", "single key"),
        ({"N": 192}, "efficient", "no kernel for widths 256/128"),
        ({"N": 100}, "reference", "no kernel for widths 164/128"),
        ({"S": 300}, "reference", "more queries than keys"),
        ({"T": 0}, "reference", "empty problem"),
        ({"dtype": torch.float64}, "reference", "not torch.float64"),
        ({"mask": ((256, 256), torch.float32), "causal": False}, "reference", "mask operand of bool or torch.bfloat16"),
    ],
    ids=["float32", "one-key-prefix", "wide", "unaligned", "short-cache", "empty", "float64", "wide-mask"],
)
def test_what_cudnn_leaves_to_others(hopper, change, chosen, reason):
    name, skipped = choose_on_hopper(**change)
    assert name == chosen and reason in skipped["cudnn"]


def test_cards_and_versions_without_the_wide_kernel(hopper):
    hopper.setattr(torch_attention, "device_capability", lambda device: (8, 0))
    assert choose_on_hopper()[0] == "efficient"
    hopper.setattr(torch_attention, "device_capability", lambda device: (7, 5))
    assert choose_on_hopper()[0] == "reference"
    hopper.setattr(torch_attention, "device_capability", lambda device: (9, 0))
    hopper.setattr(torch.backends.cudnn, "version", lambda: 91100)
    assert choose_on_hopper()[0] == "cudnn" and choose_on_hopper(S=255, T=255)[0] == "efficient"


def test_switching_a_backend_off_is_respected(hopper):
    hopper.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert choose_on_hopper()[0] == "efficient"
    hopper.setattr(torch.backends.cuda, "mem_efficient_sdp_enabled", lambda: False)
    assert choose_on_hopper()[0] == "reference"


def test_deterministic_mode_takes_the_written_out_backward(hopper):
    with FakeTensorMode():
        args = mla_args("cuda")
        o, lse = torch.empty(1, 2, 256, 128, device="cuda"), torch.empty(1, 2, 256, device="cuda")
        call = (o, *args, None, o, lse, 1.0, True)
        assert select.choose("mla_backward", call)[0].name == "cudnn"
        hopper.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        implementation, skipped = select.choose("mla_backward", call)
    assert implementation.name == "reference" and "no fixed order" in dict(skipped)["cudnn"]


@pytest.mark.parametrize(
    ("S", "T", "masked", "reason"),
    [
        (192, 192, False, ""),
        (192, 192, True, "192 keys"),
        (128, 320, False, "192 keys"),
        (64, 128, True, ""),
        (1, 256, False, "single query"),
    ],
    ids=["causal", "mask", "prefix", "full-tiles", "one-query"],
)
def test_lengths_that_the_backward_of_cudnn_gets_wrong(hopper, S, T, masked, reason):
    with FakeTensorMode():
        mask = torch.empty(S, T, dtype=torch.bool, device="cuda") if masked else None
        call = (*mla_args("cuda", S=S, T=T), mask, 1.0, not masked)
        o, lse = torch.empty(1, 2, S, 128, device="cuda"), torch.empty(1, 2, S, device="cuda")
        assert select.choose("mla", call)[0].name == "cudnn"
        implementation, skipped = select.choose("mla_backward", (o, *call[:7], o, lse, 1.0, not masked))
    assert implementation.name == ("efficient" if reason else "cudnn") and reason in dict(skipped).get("cudnn", "")


def as_if_on_cuda(x):
    """The metadata of `x`, on a CUDA device: a torch without CUDA can't slice even a fake CUDA tensor."""
    return types.SimpleNamespace(
        dtype=x.dtype, device=torch.device("cuda"), shape=x.shape, stride=x.stride, storage_offset=x.storage_offset
    )


@pytest.mark.parametrize(("lengths", "chosen"), [((255, 300), "cudnn"), ((300, 255), "reference")])
def test_symbolic_sizes_are_judged_by_their_hint_without_a_guard(hopper, lengths, chosen):
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    args = [mode.from_tensor(x, static_shapes=False) for x in mla_args(S=lengths[0], T=lengths[1])]
    assert not isinstance(args[0].shape[2], int)
    guards = len(shape_env.guards)
    implementation, _ = select.choose("mla", (*map(as_if_on_cuda, args), None, 1.0, True))
    assert implementation.name == chosen and len(shape_env.guards) == guards


def decode_args(B=2, S=1, H=16, C=512, R=64, T=128):
    cache, q = torch.empty(B, T, C + R, dtype=torch.bfloat16), torch.empty(B, S, H, C + R, dtype=torch.bfloat16)
    seqlens = torch.empty(B, dtype=torch.int32)
    return [q[..., :C], q[..., C:], cache[..., :C], cache[..., C:], seqlens, None, None, 1.0, True]


def test_decode_on_the_cpu_takes_the_reference_and_imports_no_kernel():
    code = (
        "import sys, torch\n"
        "import dscompile.lowering.ops\n"
        "q = torch.zeros(1, 1, 2, 16); c = torch.zeros(1, 8, 16); n = torch.ones(1, dtype=torch.int32)\n"
        "torch.ops.dsinfra.mla_decode(q, q, c, c, n, None, None, 1.0, True)\n"
        "print([m for m in sys.modules if m.startswith('dscompile.kernels')])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert [name for name, _ in select.choose("mla_decode", decode_args())[1]] == ["gluon", "triton"]


@pytest.fixture
def kernels(monkeypatch):
    """The kernels' module, its two checks replaced by a list of what they are asked."""
    from dscompile.kernels import mla_decode as module

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    for name, answer in (("gluon_refusal", "too old a card"), ("triton_refusal", None)):
        monkeypatch.setattr(module, name, lambda *tensors, answer=answer: asked.append(tensors) or answer)
    return asked


def test_decode_asks_the_kernels_their_limits_with_plain_numbers(kernels):
    args = decode_args()
    args[:4] = map(as_if_on_cuda, args[:4])
    implementation, skipped = select.choose("mla_decode", tuple(args))
    assert implementation.name == "triton" and skipped == [("gluon", "too old a card")]
    q_latent, _, latent, k_rope = kernels[0]
    assert q_latent.shape == (2, 1, 16, 512) and latent.stride() == (128 * 576, 576, 1)
    assert k_rope.storage_offset() == 512 and latent.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (0, torch.empty(2, 1, 512, 16).transpose(2, 3), "q_latent has columns 16 elements apart"),
        (7, -1.0, "scale is -1.0"),
    ],
    ids=["columns", "scale"],
)
def test_decode_leaves_to_the_reference_what_the_entry_refuses(kernels, position, value, reason):
    args = decode_args()
    args[position] = value
    args[:4] = map(as_if_on_cuda, args[:4])
    implementation, skipped = select.choose("mla_decode", tuple(args))
    assert implementation.name == "reference" and all(reason in said for _, said in skipped) and not kernels


def test_decode_runs_the_kernel_without_its_checks_on_contiguous_lengths_and_pages(kernels, monkeypatch):
    from dscompile.kernels import mla_decode as module
    from dscompile.lowering import decode

    calls = []

    def run(*args, impl, batch_invariant, equal_lengths):
        assert not batch_invariant and not equal_lengths
        calls.append((impl, args))
        return "result"

    monkeypatch.setattr(module, "mla_decode_unchecked", run)
    args = decode_args()
    args[4] = torch.arange(4, dtype=torch.int32)[::2]
    args[6] = torch.arange(12, dtype=torch.int32).view(3, 4).T[:2]
    assert decode.run("triton", *args) == "result"
    ((impl, passed),) = calls
    assert impl == "triton" and passed[4].is_contiguous() and passed[6].is_contiguous()
    assert all(a is b or torch.equal(a, b) for a, b in zip(passed, args))
