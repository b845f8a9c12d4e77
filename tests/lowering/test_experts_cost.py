"""The predicted cost of an expert layer follows its sizes, and says what it is made of."""

import pytest

from dscompile.lowering import heuristics as h

V3 = {"D": 7168, "F": 2048, "E": 256, "K": 8}


def test_experts_hit():
    assert h.experts_hit(0, 256, 8) == 0
    assert h.experts_hit(1, 256, 8) == pytest.approx(8)
    assert h.experts_hit(3, 8, 8) == 8
    assert h.experts_hit(128, 256, 8) == pytest.approx(256 * (1 - (31 / 32) ** 128))
    assert h.experts_hit(10_000, 256, 8) == pytest.approx(256)


def test_one_token_reads_its_experts_weights():
    cost = h.experts_cost(1, **V3)
    weights = 8 * 3 * 7168 * 2048 * 2
    assert weights < cost.bytes_moved < 1.01 * weights
    assert cost.seconds == pytest.approx(weights / h.H100.bandwidth, rel=0.01)
    assert cost.flops == 6 * 8 * 7168 * 2048


def test_many_tokens_cost_their_products():
    cost = h.experts_cost(65536, **V3)
    products = cost.flops / h.H100.gemm
    assert 1.5 * products < cost.seconds < 1.8 * products


@pytest.mark.parametrize("card", [h.H100, h.H200, h.A100, h.DEFAULT, h.CPU], ids=lambda card: card.name)
def test_grows_with_tokens_and_falls_with_fusion(card):
    costs = [h.experts_cost(T, **V3, card=card).seconds for T in (1, 2, 16, 128, 1024, 8192)]
    assert costs == sorted(costs) and len(set(costs)) == len(costs)
    fused, unfused = (h.experts_cost(8192, **V3, card=card, swiglu_fused=fused) for fused in (True, False))
    assert fused.seconds < unfused.seconds and fused.bytes_moved < unfused.bytes_moved


def test_fp8_halves_weights_and_products():
    for T in (1, 65536):
        wide, fp8 = h.experts_cost(T, **V3), h.experts_cost(T, **V3, weight_bytes=1)
        assert 0.45 < fp8.seconds / wide.seconds < 0.75
    no_fp8_units = h.experts_cost(65536, **V3, weight_bytes=1, card=h.A100)
    assert no_fp8_units.seconds > no_fp8_units.flops / h.A100.gemm


# microseconds measured on one H100 80GB HBM3 (torch 2.11.0+cu130, triton 3.6.0), fused, bf16, in a CUDA graph
@pytest.mark.parametrize(
    ("sizes", "T", "measured"),
    [
        ((2048, 768, 128, 8), 1, 37),
        ((2048, 768, 128, 8), 16, 297),
        ((2048, 768, 128, 8), 128, 425),
        ((7168, 2048, 64, 8), 1, 244),
        ((7168, 2048, 64, 8), 16, 1622),
        ((7168, 2048, 64, 8), 128, 1902),
    ],
    ids=str,
)
def test_decode_is_predicted(sizes, T, measured):
    """Within a fifth, and 15 us of launches and latencies that a roofline doesn't know."""
    predicted = h.experts_cost(T, *sizes).seconds * 1e6
    assert 0.8 * measured - 15 < predicted < 1.2 * measured


def test_says_what_it_is_made_of():
    text = str(h.experts_cost(1, **V3))
    assert text == "235.1 us predicted on H100 (0.7 GFLOP, 705.2 MB, 8 experts hit)"
