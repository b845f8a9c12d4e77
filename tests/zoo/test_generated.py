"""A fixed sample of random modules on every run, and that the check behind it sees each kind of failure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from dscompile.passes import masks, recognize_mla
from dscompile.passes.masks import Mask
from tests.zoo.generator import Program, attentions, compare, edited, layers
from tests.zoo.generator.check import Broken, Crash, Discarded, WrongAnswer

# The same modules each time; `python -m tests.zoo.fuzz` draws others.
sample = settings(
    max_examples=6,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


def agrees(program: Program) -> None:
    try:
        compare(program)
    except Discarded:
        pass


@sample
@given(attentions())
def test_attentions_match_or_are_refused(program: Program) -> None:
    agrees(program)


@sample
@given(edited(attentions()))
def test_edited_attentions_match_or_are_refused(program: Program) -> None:
    agrees(program)


@sample
@given(layers())
def test_experts_match_or_are_refused(program: Program) -> None:
    agrees(program)


@sample
@given(edited(layers()))
def test_edited_experts_match_or_are_refused(program: Program) -> None:
    agrees(program)


PLAIN = Program(
    title="attention",
    constants=("B, D = 2, 11", "H, N, R, V, C = 3, 6, 4, 5, 7"),
    init=(
        "self.q = weight(11, H * (N + R), D)",
        "self.kv_a = weight(12, C + R, D)",
        "self.kv_b = weight(13, H * (N + V), C)",
    ),
    forward=(
        "q = F.linear(x, self.q).view(B, -1, H, N + R).transpose(1, 2)",
        "latent, k_rope = F.linear(x, self.kv_a).split([C, R], -1)",
        "kv = F.linear(latent, self.kv_b).view(B, -1, H, N + V).transpose(1, 2)",
        "k = torch.cat([kv[..., :N], k_rope.unsqueeze(1).expand(-1, H, -1, -1)], -1)",
        "o = F.scaled_dot_product_attention(q, k, kv[..., N:], is_causal=True)",
    ),
    arguments="x",
    result="o",
    calls=("(random(1, B, 6, D),)",),
    expect={"mla": True},
)


def changed(**changes: Any) -> Program:
    return replace(PLAIN, **changes)


def test_the_plain_module_passes() -> None:
    verdict = compare(PLAIN)
    assert verdict.matched == {"mla": 1} and not verdict.refused


def test_values_that_were_split_and_joined() -> None:
    value = "v = torch.cat([kv[:, {0}, :, N:], kv[:, {1}, :, N:]], 1)"
    attend = PLAIN.forward[-1].replace("kv[..., N:]", "v")
    again, turned = ((*PLAIN.forward[:-1], value.format(*parts), attend) for parts in ((":1", "1:"), ("1:", ":1")))
    assert compare(changed(forward=again)).matched == {"mla": 1}
    assert compare(changed(forward=turned, expect={})).refused == {"RowsDisagree": 1}


def test_a_fill_value_is_no_length() -> None:
    """-65504, float16's least, stands where a symbolic mask hides a key; a condition on that length is refused."""
    lines = [
        "row, col = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None, :]",
        "mask = torch.full((x.shape[1],) * 2, -65504.0, dtype=work).masked_fill(col <= row, 0)",
        PLAIN.forward[-1].replace("is_causal=True", "attn_mask=mask"),
    ]
    forward = (*PLAIN.forward[:-1], *lines)
    calls = ("(random(1, B, 6, D),)", "(random(1, B, 10, D),)")
    narrow = dict(work="float16", lengths=True, calls=calls)
    assert compare(changed(forward=forward, **narrow)).matched == {"mla": 1}
    named = tuple(line.replace("col <= row", "col <= row.clamp(max=65504)") for line in forward)
    assert compare(changed(forward=named, **narrow, expect={})).refused == {"Unsupported": 1}


def test_experts_by_product_behind_a_sigmoid() -> None:
    """Neither softmax nor bmm stands in the module: weights chosen by row are where to begin."""
    experts = Program(
        title="experts",
        constants=("D, W, E, K = 8, 7, 6, 2",),
        init=("self.w13 = weight(11, E, 2 * W, D)", "self.w2 = weight(12, E, D, W)", "self.gate = weight(13, E, D)"),
        forward=(
            "w, idx = torch.topk(F.linear(x, self.gate).sigmoid(), K)",
            "ids = idx.reshape(-1)",
            "both = torch.matmul(self.w13[ids], x.repeat_interleave(K, 0)[..., None])[..., 0]",
            "gate, up = both.chunk(2, -1)",
            "z = torch.matmul(self.w2[ids], (F.silu(gate) * up)[..., None])[..., 0]",
            "y = (z.view(-1, K, D) * w.unsqueeze(-1)).sum(1)",
        ),
        arguments="x",
        result="y",
        calls=("(random(1, 5, D),)",),
        expect={"experts": True, "route": True},
    )
    assert compare(experts).matched == {"experts": 1, "route": 1}


def test_a_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognize_mla.Recognizer, "_mask", lambda self, attention: Mask("full"))
    with pytest.raises(WrongAnswer, match="result 0 of call 0 is off by"):
        compare(changed(title="causal, taken for full"))


def test_a_wrong_answer_in_bfloat16_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognize_mla.Recognizer, "_mask", lambda self, attention: Mask("full"))
    with pytest.raises(WrongAnswer, match="the bar"):
        compare(changed(work="bfloat16"))


def test_a_fault_of_the_analysis_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise IndexError("boolean index")

    monkeypatch.setattr(masks, "classify", fails)
    forward = (
        *PLAIN.forward[:-1],
        PLAIN.forward[-1].replace("is_causal=True", "attn_mask=torch.ones(6, 6).tril() > 0"),
    )
    with pytest.raises(Crash, match="mla: the analysis raised IndexError: boolean index"):
        compare(changed(forward=forward))


def test_a_lost_match_is_seen() -> None:
    forward = (*PLAIN.forward[:3], "kv = kv + 0.1", *PLAIN.forward[3:])
    with pytest.raises(Broken, match="mla was not found: NoUpProjection at .*py:"):
        compare(changed(forward=forward))


def test_a_lost_refusal_is_seen() -> None:
    with pytest.raises(Broken, match="mla was lowered, and can't be that"):
        compare(changed(expect={"mla": False}))


def test_a_module_that_fails_itself_is_discarded() -> None:
    with pytest.raises(Discarded, match="shape"):
        compare(changed(result="o.view(7, 7)"))
    with pytest.raises(Discarded, match="SyntaxError"):
        compare(changed(result="o if"))


def test_an_order_that_torch_leaves_open_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong answer is excused by nothing else: sorted, the same module is compared."""
    monkeypatch.setattr(recognize_mla.Recognizer, "_mask", lambda self, attention: Mask("full"))
    with pytest.raises(Discarded, match="an order that torch leaves open"):
        compare(changed(forward=(*PLAIN.forward, "ids = x.topk(4, sorted=False)[1]"), result="(o, ids)"))
    with pytest.raises(Discarded, match="an order that torch leaves open"):
        compare(changed(forward=(*PLAIN.forward, "ids = torch.topk(x.sign(), 4)[1]"), result="(o, ids)"))
    with pytest.raises(WrongAnswer, match="result 0 of call 0 is off by"):
        compare(changed(forward=(*PLAIN.forward, "ids = x.topk(4)[1]"), result="(o, ids)"))
    with pytest.raises(WrongAnswer, match="result 0 of call 0 is off by"):
        compare(
            changed(forward=(*PLAIN.forward, "top = torch.topk(x, k=4, dim=1, largest=False)[0]"), result="(o, top)")
        )


def test_a_module_prints_as_a_file_that_runs() -> None:
    text = repr(PLAIN)
    namespace: dict[str, Any] = {}
    exec(compile(text, "printed", "exec"), namespace)
    (inputs,) = namespace["calls"]()
    assert namespace["Model"]()(*inputs).shape == torch.Size([2, 3, 6, 5])
