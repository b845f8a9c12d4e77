"""Predicted costs of MLA's two forms: where each wins, and that the figures follow the sizes."""

import pytest
import torch

from dscompile.lowering import heuristics as h

V3 = {"H": 128, "N": 128, "R": 64, "V": 128, "C": 512}
LITE = {"H": 16, "N": 128, "R": 64, "V": 128, "C": 512}


@pytest.mark.parametrize("model", [V3, LITE], ids=["128-heads", "16-heads"])
@pytest.mark.parametrize("card", [h.H100, h.H200, h.A100, h.DEFAULT, h.CPU], ids=lambda card: card.name)
def test_decode_absorbs_and_prefill_expands(model, card):
    assert h.prefer_absorbed(1, 1, 8192, **model, card=card)[0]
    assert h.prefer_absorbed(64, 2, 4096, **model, card=card)[0]
    assert not h.prefer_absorbed(1, 4096, 4096, **model, card=card)[0]


def test_reason_gives_both_times():
    absorb, reason = h.prefer_absorbed(1, 1, 8192, **V3)
    absorbed, expanded = h.absorbed_cost(1, 1, 8192, **V3), h.expanded_cost(1, 1, 8192, **V3)
    assert absorb and reason.startswith("absorbed:")
    assert f"{absorbed * 1e6:.1f} us absorbed" in reason and f"{expanded * 1e6:.1f} us expanded" in reason


def test_there_is_one_crossing_as_queries_grow():
    """More queries amortise the expansion, so the choice turns once, at some tens to hundreds of queries."""
    choices = [h.prefer_absorbed(1, S, 8192, **V3)[0] for S in range(1, 8193, 32)]
    turn = choices.index(False)
    assert 1 < turn * 32 < 1024 and all(choices[:turn]) and not any(choices[turn:])


@pytest.mark.parametrize(("S", "T", "microseconds"), [(4096, 4096, 1149.6), (8192, 8192, 4572.5)])
def test_prefill_attention_agrees_with_the_measured_kernel(S, T, microseconds):
    """Without the up-projections: cuDNN's causal forward at 128 heads on an H100, within 5 %."""
    up = 2 * T * V3["H"] * V3["C"] * (V3["N"] + V3["V"]) / h.H100.gemm
    attention = h.expanded_cost(1, S, T, **V3) - up
    assert attention * 1e6 == pytest.approx(microseconds, rel=0.05)


def test_decode_is_bound_by_reading_the_latent_at_few_heads():
    """16 heads, 64 requests of 8192 rows: the latent is read once, at the card's bandwidth."""
    read = 64 * 8192 * 576 * 2 / h.H100.bandwidth
    assert h.absorbed_cost(64, 1, 8192, **LITE) == pytest.approx(read, rel=0.05)


def test_a_mask_operand_costs_what_was_measured():
    """cuDNN with an additive bias at 128 heads on an H100: 3.84 ms, three times the causal kernel's."""
    up = 2 * 4096 * V3["H"] * V3["C"] * (V3["N"] + V3["V"]) / h.H100.gemm
    masked = h.expanded_cost(1, 4096, 4096, **V3, masked=True)
    assert (masked - up) * 1e6 == pytest.approx(3840, rel=0.01)
    assert masked > 3 * h.expanded_cost(1, 4096, 4096, **V3)


def test_a_length_costs_the_expanded_form_its_operand_and_the_absorbed_form_nothing():
    sizes = dict(B=1, S=8, T=8192, **V3)
    plain, masked, length = (h.prefer_absorbed(**sizes, **kind)[1] for kind in ({}, {"masked": True}, {"length": True}))
    absorbed, expanded = h.absorbed_cost(**sizes) * 1e6, h.expanded_cost(**sizes, masked=True) * 1e6
    assert f"{absorbed:.1f} us absorbed against {expanded:.1f} us expanded" in length
    assert "with a mask operand)" in masked and "with a mask operand unless absorbed)" in length and "mask" not in plain


def choice(S, **changes):
    return h.prefer_absorbed(1, S, 8192, **V3, **changes)[0]


def test_many_queries_absorb_by_a_margin_only(monkeypatch):
    times = {"absorbed": 0.9, "expanded": 1.0}
    monkeypatch.setattr(h, "absorbed_cost", lambda *_, **__: times["absorbed"])
    monkeypatch.setattr(h, "expanded_cost", lambda *_, **__: times["expanded"])
    assert choice(1) and choice(16) and not choice(17)
    assert "less than 0.8 of expanded" in h.prefer_absorbed(1, 17, 8192, **V3)[1]
    times["absorbed"] = 0.79
    assert choice(17)
    times["absorbed"] = 1.01
    assert not choice(1)


@pytest.mark.parametrize(("S", "T", "visible"), [(4, 4, 10), (2, 5, 9), (1, 7, 7), (5, 2, 3)])
def test_visible_share_counts_the_scores(S, T, visible):
    counted = sum(max(0, min(T, i + T - S + 1)) for i in range(S))
    assert counted == visible
    assert h.visible_share(S, T, True) * S * T == pytest.approx(visible)
    assert h.visible_share(S, T, False) == 1.0 == h.visible_share(0, T, True)


def test_cards_by_name():
    assert h.card_named("NVIDIA H100 80GB HBM3") is h.H100 and h.card_named("NVIDIA A100-SXM4-80GB") is h.A100
    assert h.card_named("NVIDIA H200") is h.H200 and h.card_named("something else") is h.DEFAULT


def test_cards_by_device(monkeypatch):
    assert h.card_for(torch.device("cpu")) is h.CPU and h.card_for(torch.device("meta")) is h.DEFAULT
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert h.card_for(torch.device("cuda")) is h.DEFAULT
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: ["NVIDIA H100 80GB HBM3", "NVIDIA H200"][d.index])
    assert h.card_for(torch.device("cuda", 0)) is h.H100 and h.card_for(torch.device("cuda", 1)) is h.H200
