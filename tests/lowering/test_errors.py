"""Every mistake in a call: its own class, in three parts, before anything is computed, eagerly and at trace time."""

import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import errors, select
from tests.lowering.test_mla import SIZES, make

B, H, S, T, N, R, V, C = SIZES["longer-cache"]
MLA, DECODE = torch.ops.dsinfra.mla.default, torch.ops.dsinfra.mla_decode.default


def mla_call(**changes):
    names = ("q_nope", "q_rope", "latent", "k_rope", "w_uk", "w_uv", "mask", "scale", "causal")
    call = dict(zip(names, (*make(SIZES["longer-cache"]), None, 0.3, False)))
    return MLA, tuple({**call, **changes}.values())


def decode_call(paged=False, **changes):
    lead = (7, 64) if paged else (B, T)
    call = {
        "q_latent": torch.zeros(B, S, H, C),
        "q_rope": torch.zeros(B, S, H, R),
        "latent": torch.zeros(*lead, C),
        "k_rope": torch.zeros(*lead, R),
        "seqlens": torch.ones(B, dtype=torch.int32),
        "mask": None,
        "page_table": torch.zeros(B, 2, dtype=torch.int32) if paged else None,
        "scale": 0.3,
        "causal": True,
    }
    return DECODE, tuple({**call, **changes}.values())


zeros, ints = torch.zeros, torch.int32

MISTAKES = {
    "mla: query of 3 dimensions": (mla_call(q_nope=zeros(H, S, N)), errors.ShapeMismatch, r"q_nope has 3 dimensions"),
    "mla: query parts disagree": (
        mla_call(q_rope=zeros(B, H, S + 1, R)),
        errors.ShapeMismatch,
        r"q_rope \[2, 2, 4, 4\]",
    ),
    "mla: cache parts disagree": (mla_call(k_rope=zeros(B, T + 1, R)), errors.ShapeMismatch, r"k_rope \[2, 10, 4\]"),
    "mla: cache of other requests": (
        mla_call(latent=zeros(B + 1, T, C), k_rope=zeros(B + 1, T, R)),
        errors.ShapeMismatch,
        r"latent \[3, 9, 16\]",
    ),
    "mla: rope widths": (mla_call(k_rope=zeros(B, T, R + 1)), errors.ShapeMismatch, r"Make R agree"),
    "mla: heads of the weight": (mla_call(w_uk=zeros(H + 1, N, C)), errors.ShapeMismatch, r"w_uk \[3, 8, 16\]"),
    "mla: latent width": (mla_call(w_uk=zeros(H, N, C + 1)), errors.LatentWidthMismatch, r"w_uk \[2, 8, 17\]"),
    "mla: value weight's width": (mla_call(w_uv=zeros(H, V, C + 1)), errors.LatentWidthMismatch, r"w_uv \[2, 6, 17\]"),
    "mla: integer query": (mla_call(q_nope=zeros(B, H, S, N, dtype=ints)), errors.DtypeMismatch, r"is torch.int32"),
    "mla: two dtypes": (mla_call(latent=zeros(B, T, C).half()), errors.DtypeMismatch, r"latent .* is torch.float16"),
    "mla: two devices": (mla_call(w_uv=zeros(H, V, C, device="meta")), errors.DeviceMismatch, r"w_uv .* is on meta"),
    "mla: mask's shape": (mla_call(mask=zeros(S, T + 1).bool()), errors.MaskError, r"mask \[3, 10\] for scores"),
    "mla: mask of 5 dimensions": (mla_call(mask=zeros(1, 1, 1, S, T).bool()), errors.MaskError, r"can't be broadcast"),
    "mla: mask's dtype": (mla_call(mask=zeros(S, T, dtype=ints)), errors.MaskError, r"of torch.int32"),
    "mla: mask and causal": (mla_call(mask=zeros(S, T).bool(), causal=True), errors.MaskError, r"and causal=True"),
    "decode: query of 3 dimensions": (
        decode_call(q_latent=zeros(B, H, C)),
        errors.ShapeMismatch,
        r"q_latent has 3 dimensions",
    ),
    "decode: query parts disagree": (
        decode_call(q_rope=zeros(B, S, H + 1, R)),
        errors.ShapeMismatch,
        r"q_rope \[2, 3, 3, 4\]",
    ),
    "decode: widths": (decode_call(latent=zeros(B, T, C + 1)), errors.ShapeMismatch, r"Make C and R agree"),
    "decode: cache parts disagree": (
        decode_call(k_rope=zeros(B, T + 1, R)),
        errors.ShapeMismatch,
        r"k_rope \[2, 10, 4\]",
    ),
    "decode: cache of other requests": (
        decode_call(latent=zeros(7, T, C), k_rope=zeros(7, T, R)),
        errors.ShapeMismatch,
        r"no page table",
    ),
    "decode: seqlens' length": (
        decode_call(seqlens=torch.ones(B + 1, dtype=ints)),
        errors.SeqlensError,
        r"seqlens \[3\] .* for 2 requests",
    ),
    "decode: seqlens' dtype": (
        decode_call(seqlens=torch.ones(B, dtype=torch.int64)),
        errors.SeqlensError,
        r"of torch.int64",
    ),
    "decode: page table's dtype": (
        decode_call(True, page_table=zeros(B, 2, dtype=torch.int64)),
        errors.PageTableError,
        r"of torch.int64",
    ),
    "decode: page table's rows": (
        decode_call(True, page_table=zeros(B + 1, 2, dtype=ints)),
        errors.PageTableError,
        r"\[3, 2\]",
    ),
    "decode: page size": (
        decode_call(True, latent=zeros(7, 32, C), k_rope=zeros(7, 32, R)),
        errors.PageTableError,
        r"pages of 32 rows",
    ),
    "decode: float mask": (decode_call(mask=zeros(1, S, T)), errors.MaskError, r"of torch.float32"),
    "decode: mask with heads": (decode_call(mask=zeros(B, H, S, T).bool()), errors.MaskError, r"Drop the head"),
    "decode: mask short of the capacity": (decode_call(mask=zeros(B, S, T - 1).bool()), errors.MaskError, r"T 9"),
    "decode: two dtypes": (decode_call(latent=zeros(B, T, C).double()), errors.DtypeMismatch, r"torch.float64"),
    "decode: two devices": (
        decode_call(seqlens=torch.ones(B, dtype=ints, device="meta")),
        errors.DeviceMismatch,
        r"seqlens .* on meta",
    ),
}


@pytest.mark.parametrize(("call", "error", "says"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_named_before_anything_is_computed(monkeypatch, call, error, says):
    op, args = call
    monkeypatch.setattr(select.Table, "choose", lambda self, args: pytest.fail("an implementation was chosen"))
    with pytest.raises(error, match=says) as raised:
        op(*args)
    assert raised.type is error
    found, why, change = raised.value.found, raised.value.why, raised.value.change
    assert found.startswith(op._schema.name.split("::")[1] + ":") and why and change


@pytest.mark.parametrize(("call", "error", "says"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_named_at_trace_time(call, error, says):
    op, args = call
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
    with mode, pytest.raises(error, match=says):
        op(*fakes)


def test_mistake_reaches_the_user_of_torch_compile():
    op, args = MISTAKES["mla: latent width"][0]
    with pytest.raises(Exception, match="The up-projections contract their last dimension with the latent's"):
        torch.compile(op, backend="aot_eager", fullgraph=True)(*args)


def test_message_joins_the_three_parts_and_survives_pickling():
    error = errors.ShapeMismatch("found this", "it can't be", "change that")
    assert str(error) == "found this. it can't be. change that." and isinstance(error, ValueError)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.ShapeMismatch and str(copy) == str(error)
