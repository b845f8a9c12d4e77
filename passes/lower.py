"""lower: every operator gets its implementation, and an expanded ``mla`` that torch's own kernel runs is written out.

Before:  o = mla(q_nope, q_rope, c, k_rope, W_uk, W_uv, mask)
After:   k = [W_uk c | k_rope], v = W_uv c, o = attention(q, k, v, mask) as ATen calls, on CUDA in inference

*Exact*: the same products in the same dtypes as the model's own code. Written out, the copies that build q and k are
fused with their neighbours and nothing is launched through Python, so the site is never slower than before; what is
gained is the proof: a causal flag instead of a mask operand, and cuDNN's kernel by name. Training keeps the operator,
whose backward builds keys and values again instead of saving them; so does a causal mask over more keys than queries.
"""

from __future__ import annotations

import torch
from torch import fx

from dscompile.lowering import heuristics, select
from dscompile.passes import commits
from dscompile.passes.absorb import hint
from dscompile.passes.bind import Bindings, expressions
from dscompile.passes.emit import Emitter
from dscompile.passes.experts_bind import Written
from dscompile.passes.graph import settle
from dscompile.passes.record import PassRecord
from dscompile.passes.structure import Structure

aten = torch.ops.aten
NAME = "lower"


def run(bound: list[Bindings | Written]) -> PassRecord:
    """Chooses for each site; the call itself asks the same table again at run time."""
    try:
        for site in bound:
            _lower(site)
    finally:  # also what was written before a failure
        settle(site.module for site in bound if isinstance(site, Bindings) and site.node is site.out)
    return PassRecord(NAME, [b.site for b in bound])


def _lower(site: Bindings | Written) -> None:
    args = fx.node.map_arg(site.node.args, lambda n: n.meta["example_value"])
    name = str(site.node.target._schema.name).split("::")[1]  # type: ignore[union-attr]
    implementation, skipped = select.choose(name, tuple(args))
    site.site.kernel = implementation.name
    site.site.reason = "; ".join(f"{other}: {reason}" for other, reason in skipped)
    if name == "experts":
        site.site.predicted = _experts_costs(args[0], args[1], args[4])
    if name == "mla" and isinstance(site.structure, Structure) and _written_out(site):  # type: ignore[union-attr]
        site.site.kernel = _write_out(site, implementation.name)  # type: ignore[arg-type]
    for twin in site.twins:
        twin.decision, twin.kernel, twin.reason = site.site.decision, site.site.kernel, site.site.reason
        twin.predicted = site.site.predicted


def _experts_costs(x: torch.Tensor, topk_idx: torch.Tensor, w_down: torch.Tensor) -> dict[str, float]:
    """Predicted seconds of an expert layer's two kernels, for x [T, D], topk_idx [T, K] and w_down [E, D, F]."""
    (T, D), (E, _, F) = map(hint, x.shape), map(hint, w_down.shape)
    sizes = (T, D, F, E, hint(topk_idx.shape[1]), w_down.itemsize, x.itemsize, heuristics.card_for(x.device))
    return {
        name: heuristics.experts_cost(*sizes, swiglu_fused=fused).seconds
        for name, fused in (("fused", True), ("pieces", False))
    }


def _written_out(site: Bindings) -> bool:
    q_nope, _, latent, *_, causal = site.node.args
    q, c = q_nope.meta["example_value"], latent.meta["example_value"]
    square = expressions((q.shape[2],)) == expressions((c.shape[1],))
    return q.is_cuda and not site.training and (square or not causal) and commits.current().permitted()


def _write_out(site: Bindings, implementation: str) -> str:
    """Replaces the operator; -> what the report calls the kernel."""
    q_nope, q_rope, latent, k_rope, w_uk, w_uv, mask, scale, causal = site.node.args
    e = Emitter(site.node)
    heads = e.size(w_uk, 0)
    parts = [e.call(aten.transpose.int, x, 1, 2) for x in (q_nope, q_rope)]
    q = e.call(aten.transpose.int, e.call(aten.cat.default, parts, -1), 1, 2)
    nope, value = _up_projected(e, site, latent, w_uk, w_uv)
    batch, keys = e.size(latent, 0), e.size(latent, 1)
    turned = e.call(aten.expand.default, e.call(aten.unsqueeze.default, k_rope, 2), [batch, keys, heads, -1])
    k = e.call(aten.transpose.int, e.call(aten.cat.default, [nope, turned], -1), 1, 2)
    v = e.call(aten.transpose.int, value, 1, 2)
    if implementation == "cudnn" and mask is None:
        call = aten._scaled_dot_product_cudnn_attention.default
        o = e.item(e.call(call, q, k, v, None, False, 0.0, causal, False, scale=scale), 0)
        kernel = "torch's cuDNN attention"
    else:
        call = aten.scaled_dot_product_attention.default
        o = e.call(call, q, k, v, mask, 0.0, causal, scale=scale)
        kernel = "torch's attention" + (" with the mask" if mask is not None else "")
    site.out.replace_all_uses_with(o)
    commits.current().add([site.site, *site.twins], [(site.out, o)], e.made)
    for dead in (site.out, site.node):  # ours, pure, and without readers now
        commits.current().erase(dead)
    site.node, site.out = o, o
    return kernel


def _up_projected(e: Emitter, site: Bindings, latent: fx.Node, w_uk: fx.Node, w_uv: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(k_nope [B, T, H, N], v [B, T, H, V]): one GEMM where one weight holds both."""
    s = site.structure
    assert isinstance(s, Structure)
    if site.fused is None:
        return tuple(  # type: ignore[return-value]
            e.call(
                aten.unflatten.int,
                e.call(aten.linear.default, latent, e.call(aten.flatten.using_ints, w, 0, 1)),
                2,
                size,
            )
            for w, size in ((w_uk, [s.heads, s.nope]), (w_uv, [s.heads, s.value]))
        )
    both = e.call(aten.unflatten.int, e.call(aten.linear.default, latent, site.fused), 2, [s.heads, s.nope + s.value])
    blocks = ((s.w_uk.offset, s.nope), (s.w_uv.offset, s.value))
    nope, value = (e.call(aten.slice.Tensor, both, -1, first, first + width) for first, width in blocks)
    return nope, value
