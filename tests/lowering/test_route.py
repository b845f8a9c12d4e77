"""`dsinfra::route` on the CPU: against sorted lists, torch.topk and the routers of published models; its gradient."""

import itertools

import pytest
import torch

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import errors, select
from tests.lowering import experts_oracle
from tests.lowering.graphs import compile_counting

ROUTE = torch.ops.dsinfra.route.default

# name: top_k, score, n_group, topk_group, group_score, renormalize, eps, scale
FORMS = {
    "softmax": (2, "softmax", 1, 1, "max", False, 0.0, 1.0),
    "softmax-renormalised": (3, "softmax", 1, 1, "max", True, 0.0, 1.0),
    "softmax-groups-max": (3, "softmax", 4, 2, "max", False, 0.0, 16.0),
    "softmax-groups-max-zero": (3, "softmax", 4, 2, "max_zero", False, 0.0, 16.0),
    "sigmoid-groups-top2": (4, "sigmoid", 4, 2, "top2", True, 1e-20, 2.5),
    "sigmoid-groups-top2-zero": (4, "sigmoid", 4, 2, "top2_zero", True, 1e-20, 2.5),
    "softmax-topk": (4, "softmax_topk", 1, 1, "max", False, 0.0, 1.0),
    "all-experts": (16, "sigmoid", 1, 1, "max", True, 1e-20, 1.0),
    "top-1": (1, "softmax", 1, 1, "max", False, 0.0, 1.0),
}


def logits_of(T=11, E=16, dtype=torch.float32, seed=0):
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bias_of(E=16):
    return torch.randn(E, generator=torch.Generator().manual_seed(9)) / 4


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_matches_oracle(form, dtype, with_bias):
    logits, bias = logits_of(dtype=dtype), bias_of() if with_bias else None
    idx, weight = ROUTE(logits, bias, *form)
    ids, weights = experts_oracle.route(logits, bias, *form)
    assert idx.dtype == torch.int64 and weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert idx.tolist() == ids
    torch.testing.assert_close(weight.double(), torch.tensor(weights).double(), rtol=1e-5, atol=1e-7)


def test_equal_scores_go_to_the_lowest_index():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 1.0], [0.0] * 6])
    idx, _ = ROUTE(logits, None, 4, "softmax", 1, 1, "max", False, 0.0, 1.0)
    assert idx.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    idx, _ = ROUTE(logits, None, 2, "sigmoid", 3, 1, "top2", False, 0.0, 1.0)
    assert idx.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradcheck(form, with_bias):
    bias = bias_of().double() if with_bias else None
    logits = logits_of(3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: ROUTE(logits, bias, *form)[1], (logits,))


def test_the_choice_and_the_bias_have_no_gradient():
    idx, weight = ROUTE(logits_of().requires_grad_(), bias_of(), *FORMS["sigmoid-groups-top2"])
    assert not idx.requires_grad and weight.requires_grad
    with pytest.raises(errors.NotDifferentiable, match=r"bias \[16\] that requires grad"):
        ROUTE(logits_of(), bias_of().requires_grad_(), *FORMS["sigmoid-groups-top2"])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_opcheck(form):
    # Without a gradient, which its own sum over all results can't take of a first one of integers; see the next test.
    torch.library.opcheck(ROUTE, (logits_of(), bias_of(), *form))


def test_compiles_once_for_all_lengths():
    bias = bias_of()

    def router(logits):
        idx, weight = ROUTE(logits, bias, 4, "sigmoid", 4, 2, "top2", True, 1e-20, 2.5)
        return idx + 1, weight * 2

    compiled, graphs = compile_counting(router)
    for T in (3, 7, 20):
        logits = logits_of(T).requires_grad_()
        ours, eager = compiled(logits), router(logits)
        assert torch.equal(ours[0], eager[0]) and torch.equal(ours[1], eager[1])
        assert torch.equal(*(torch.autograd.grad(out[1].square().sum(), logits)[0] for out in (ours, eager)))
    assert len(graphs) == 1


def test_autocast_changes_nothing():
    logits = logits_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        idx, weight = ROUTE(logits, None, *FORMS["softmax"])
    expected = ROUTE(logits, None, *FORMS["softmax"])
    assert weight.dtype == torch.float32 and torch.equal(idx, expected[0]) and torch.equal(weight, expected[1])


def test_table():
    assert select.table("route").names == ("kernel", "reference")
    assert select.choose("route", (logits_of(), None, *FORMS["softmax"]))[0].name == "reference"


# ------------------------------------------------------------------ routers of published models


def sorted_pairs(idx, weight):
    order = idx.argsort(-1)
    return idx.gather(-1, order), weight.gather(-1, order)


def router_of(model_type, **settings):
    from transformers import AutoConfig, AutoModel

    base = dict(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **{**base, **settings}))
    (router,) = list(itertools.islice((m for m in model.modules() if type(m).__name__.endswith("Router")), 1))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in itertools.chain(router.parameters(), router.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=g) / 4)
    return router


def test_is_deepseek_v3s_router():
    mla = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_mtp_layers=0)
    router = router_of(
        "deepseek_v3",
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=0,
        **mla,
    )
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(4))
    logits, weight, idx = router(hidden)
    bias, scale = router.e_score_correction_bias, router.routed_scaling_factor
    ours = ROUTE(logits, bias, 4, "sigmoid", 4, 2, "top2", router.norm_topk_prob, 1e-20, scale)
    for a, b in zip(sorted_pairs(*ours), sorted_pairs(idx, weight)):
        torch.testing.assert_close(a, b)


def test_is_qwen3_moes_router():
    router = router_of("qwen3_moe", num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, head_dim=16)
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(4))
    probabilities, weight, idx = router(hidden)
    logits = torch.nn.functional.linear(hidden, router.weight)
    ours = ROUTE(logits, None, 4, "softmax", 1, 1, "max", True, 0.0, 1.0)
    for a, b in zip(sorted_pairs(*ours), sorted_pairs(idx, weight.float())):
        torch.testing.assert_close(a, b)


def test_is_gpt_oss_router():
    router = router_of("gpt_oss", num_local_experts=16, num_experts_per_tok=4, head_dim=16)
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(4))
    logits, weight, idx = router(hidden)
    ours = ROUTE(logits, None, 4, "softmax_topk", 1, 1, "max", False, 0.0, 1.0)
    assert torch.equal(ours[0], idx)
    torch.testing.assert_close(ours[1], weight)
