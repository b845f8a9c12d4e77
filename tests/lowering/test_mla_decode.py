"""`dsinfra::mla_decode` on the CPU: reference over plain and paged caches, poison, shape function, FLOPs."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dscompile.lowering.ops  # noqa: F401  (registers the operators)
from dscompile.lowering import errors
from tests.lowering import oracle

DECODE = torch.ops.dsinfra.mla_decode.default

# name: B, S, H, C, R, T (capacity), lengths
CASES = {
    "ragged": (4, 1, 3, 16, 8, 130, (130, 1, 64, 77)),
    "two-queries": (3, 2, 2, 16, 8, 70, (70, 2, 65)),
    "empty-request": (2, 1, 2, 16, 8, 10, (0, 10)),
    "shorter-than-queries": (2, 4, 2, 16, 8, 10, (2, 10)),
    "no-rope": (2, 1, 2, 16, 0, 20, (20, 7)),
    "odd-width": (2, 1, 5, 13, 3, 65, (65, 33)),
}


def make(case, paged=False, dtype=torch.float32, poison=float("nan")):
    """Arguments up to page_table; every cached row past a length, and every page nobody owns, is poisoned."""
    B, S, H, C, R, T, lengths = case
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, S, H, C + R, generator=g).to(dtype)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    pages_each = -(-T // 64)
    rows = torch.randn(B, pages_each * 64, C + R, generator=g).to(dtype)
    for b, length in enumerate(lengths):
        rows[b, length:] = poison
    if not paged:
        cache, page_table = rows[:, :T], None
    else:
        owned = torch.randperm(B * pages_each + 3, generator=g)[: B * pages_each].view(B, pages_each)
        cache = torch.full((B * pages_each + 3, 64, C + R), poison, dtype=dtype)
        cache[owned.flatten()] = rows.view(-1, 64, C + R)
        page_table = owned.to(torch.int32)
        for b, length in enumerate(lengths):
            page_table[b, -(-length // 64) :] = -1000
    return [q[..., :C], q[..., C:], cache[..., :C], cache[..., C:], seqlens], page_table


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", [None, 1, "B"], ids=["no-mask", "mask-1", "mask-B"])
@pytest.mark.parametrize("paged", [False, True], ids=["plain", "paged"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_oracle_and_ignores_poison(case, paged, masked, causal):
    args, page_table = make(case, paged)
    T = args[2].shape[1] if page_table is None else page_table.shape[1] * 64
    mask = None
    if masked:
        shape = (case[0] if masked == "B" else 1, case[1], T)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4
    o, lse = DECODE(*args, mask, page_table, 0.2, causal)
    expected_o, expected_lse = oracle.mla_decode(*args, mask, page_table, 0.2, causal)
    torch.testing.assert_close(o.double(), expected_o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert o.is_contiguous() and lse.shape == o.shape[:3]


def test_request_that_sees_nothing():
    args, _ = make(CASES["empty-request"])
    o, lse = DECODE(*args, None, None, 0.2, True)
    assert torch.all(o[0] == 0) and torch.all(lse[0] == -math.inf) and torch.isfinite(lse[1]).all()


def test_equals_mla_absorbed():
    """The two operators are two forms of one attention: absorb W_uk into the query, apply W_uv to the result."""
    B, H, S, T, N, R, V, C = 2, 3, 2, 9, 8, 4, 6, 16
    g = torch.Generator().manual_seed(4)
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = (
        torch.randn(*shape, dtype=torch.float64, generator=g)
        for shape in ((B, H, S, N), (B, H, S, R), (B, T, C), (B, T, R), (H, N, C), (H, V, C))
    )
    o, lse = torch.ops.dsinfra.mla(q_nope, q_rope, latent, k_rope, w_uk, w_uv, None, 0.2, True)
    q_latent = torch.einsum("bhsn,hnc->bshc", q_nope, w_uk)
    seqlens = torch.full((B,), T, dtype=torch.int32)
    mixed, absorbed_lse = DECODE(q_latent, q_rope.transpose(1, 2), latent, k_rope, seqlens, None, None, 0.2, True)
    torch.testing.assert_close(torch.einsum("bshc,hvc->bhsv", mixed, w_uv), o)
    torch.testing.assert_close(absorbed_lse.transpose(1, 2), lse)


@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
@pytest.mark.parametrize("paged", [False, True], ids=["plain", "paged"])
def test_a_request_does_not_depend_on_its_neighbours(paged, masked):
    """Asked to be, results are those of each request alone, bit for bit: also where its neighbours change."""
    args, page_table = make((6, 2, 3, 16, 8, 130, (130, 1, 64, 77, 0, 129)), paged)
    q_latent, q_rope, latent, k_rope, seqlens = args
    T = latent.shape[1] if page_table is None else page_table.shape[1] * 64
    mask = torch.rand((6, 2, T), generator=torch.Generator().manual_seed(3)) > 0.4 if masked else None
    o, lse = DECODE(*args, mask, page_table, 0.2, True, None, True)
    expected_o, expected_lse = oracle.mla_decode(*args, mask, page_table, 0.2, True)
    torch.testing.assert_close(o.double(), expected_o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    for some in ([0], [3, 1], [5, 4, 3, 0]):
        cache = (latent, k_rope) if paged else (latent[some], k_rope[some])
        table = page_table[some] if paged else None
        part = q_latent[some], q_rope[some], *cache, seqlens[some], mask[some] if masked else None, table
        o_some, lse_some = DECODE(*part, 0.2, True, None, True)
        assert torch.equal(o_some, o[some]) and torch.equal(lse_some, lse[some])


@pytest.mark.parametrize("paged", [False, True], ids=["plain", "paged"])
def test_opcheck(paged):
    args, page_table = make(CASES["ragged"], paged, poison=0.0)
    torch.library.opcheck(DECODE, (*args, None, page_table, 0.2, True))


def test_compiles_once_for_all_batches_and_capacities():
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    compiled = torch.compile(
        lambda *a: DECODE(*a, None, None, 0.2, True)[0] + 1, backend=backend, dynamic=True, fullgraph=True
    )
    with torch.no_grad():
        for B, T in ((2, 20), (3, 33), (5, 70)):
            args, _ = make((B, 4, 3, 16, 8, T, (T,) * B))
            assert torch.equal(compiled(*args), DECODE(*args, None, None, 0.2, True)[0] + 1)
    assert len(graphs) == 1


def test_autocast():
    args, _ = make(CASES["ragged"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, lse = DECODE(*args, None, None, 0.2, True)
    expected = DECODE(*(x.bfloat16() for x in args[:4]), args[4], None, None, 0.2, True)
    assert o.dtype == torch.bfloat16 and torch.equal(o, expected[0]) and torch.equal(lse, expected[1])


def test_inference_mode_takes_inputs_that_require_grad():
    args, _ = make(CASES["ragged"])
    args[0] = args[0].clone().requires_grad_()
    with torch.inference_mode():
        o, _ = DECODE(*args, None, None, 0.2, True)
    assert torch.isfinite(o).all()


@pytest.mark.parametrize("position", range(4), ids=["q_latent", "q_rope", "latent", "k_rope"])
def test_gradients_are_refused_with_the_way_out(position):
    args, _ = make(CASES["ragged"])
    args[position] = args[position].clone().requires_grad_()
    with pytest.raises(errors.NotDifferentiable, match=r"no_grad.*dsinfra::mla to train"):
        DECODE(*args, None, None, 0.2, True)


@pytest.mark.parametrize("paged", [False, True], ids=["plain", "paged"])
def test_flops(paged):
    B, S, H, C, R, T, _ = CASES["ragged"]
    args, page_table = make(CASES["ragged"], paged)
    with FlopCounterMode(display=False) as counter:
        DECODE(*args, None, page_table, 0.2, True)
    assert counter.get_total_flops() == 2 * B * S * H * (192 if paged else T) * (2 * C + R)
