"""recognize_fp8: block-scaled FP8 products in the ways they are called -> ``quantize_1x128`` and ``fp8_linear``.

Before:  _scaled_mm(q_MK, w_KN, s_a, s_b)  or  _scaled_mm_v2 (``F.scaled_mm``) with BlockWise1x128 x BlockWise128x128
After:   fp8_linear(q, K-block-major s_a, w^T, s_b^T, bias)

Both are sum over K blocks of (q_m . q_n) s_a[m, k] s_b[k, n]: *exact*, up to the order of a float32 sum. What the
scales mean is fixed by the recipe and their shapes, not by their strides, so the layout the kernel reads is made from
them by a transpose, which is free where they lie as cuBLAS wants them. Kernels that adapters put in place arrive as
``dsinfra`` operators already and are only reported. Kernels of the user's that were declared to be such a product, and
checked (``fp8_pairs``), are taken like torch's, with the quantiser in front of them if it was declared too.

This pass runs on Dynamo's graph before its shadow is made: every decision is local to a call, and what follows (MLA
over FP8 projections) sees the operators. It also looks at every other read of an FP8 tensor and says why no kernel
takes it: other blocks, one scale for a tensor, a weight that the model dequantises, a kernel whose arithmetic is not
known here.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator

import torch
from torch import fx
from torch.nn.functional import ScalingType

from dscompile.lowering import select
from dscompile.lowering.block_scales import BLOCK, FP8
from dscompile.passes import commits, fp8_pairs
from dscompile.passes.emit import Emitter
from dscompile.passes.fp8_reads import FP8_DTYPES, is_fp8, refused_reads
from dscompile.passes.fp8_refusals import OpaqueKernel, PerTensorScale, WrongBlocks, WrongFormat
from dscompile.passes.fp8_roles import weight_of
from dscompile.passes.graph import called, module_path, source_line
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.refusals import Refusal, Unsupported
from dscompile.passes.trail import Trail

aten = torch.ops.aten
NAME = "recognize_fp8"
KINDS = {"fp8_linear": "fp8_linear", "fp8_grouped_linear": "fp8_experts", "fp8_experts": "fp8_experts"}

_TENSOR_WISE, _ROW_1X128, _BLOCK_128X128 = (
    int(kind.value) for kind in (ScalingType.TensorWise, ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
)


def operator_name(node: fx.Node) -> str:
    """Name of the ``dsinfra`` operator that a node calls (as overload or packet), or ''."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target._overloadpacket  # type: ignore[attr-defined]
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
        return name if namespace == "dsinfra" else ""
    return ""


def is_anchor(node: fx.Node) -> bool:
    """True if the node makes this pass look at the graph: an input or result in FP8, or an FP8 operator of ours."""
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dtype in FP8_DTYPES or operator_name(node) in KINDS


Found = list[tuple[Site, fx.Node]]


def run(module: fx.GraphModule) -> tuple[PassRecord, Found]:
    """Rewrites every block-scaled product of Dynamo's graph and of the bodies inside it, and reports each FP8 site.

    Also returned: the operator of each matched site.
    """
    record, found = PassRecord(NAME), []
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            for node in list(child.graph.nodes):
                name = called(node)
                if name in _SCALED or fp8_pairs.product_of(node) is not None:
                    found.append(_rewritten(child, node, name))
                elif operator_name(node) in KINDS:
                    found.append((_reported(node), node))
            record.sites += refused_reads(child.graph, _understood)
    record.sites[:0] = [site for site, _ in found]
    return record, found


def settle(found: Found, up_projections: set[fx.Node]) -> None:
    """Corrects the report of products that a later pass replaced: MLA multiplies with the dequantised up-projection."""
    for site, node in found:
        if site.matched and operator_name(node) == "fp8_linear" and weight_of(node.args[2]) in up_projections:
            site.decision = "replaced: the attention multiplies with the dequantised weight, which rounds less"
            site.kernel = site.reason = ""


def _understood(node: fx.Node) -> bool:
    """True if a read of an FP8 tensor by this node is no loose end: an operator of ours, or reported above."""
    return operator_name(node) != "" or called(node) in _SCALED or fp8_pairs.product_of(node) is not None


# ------------------------------------------------------------------ torch's scaled products


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, object]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


_V1 = ("self", "mat2", "scale_a", "scale_b", "bias", "scale_result", "out_dtype", "use_fast_accum")
_V2 = ("self", "mat2", "scale_a", "recipe_a", "swizzle_a", "scale_b", "recipe_b", "swizzle_b", "bias", "out_dtype")
_SCALED = {"_scaled_mm": _V1, "_scaled_mm_v2": _V2}


def _rewritten(module: fx.GraphModule, node: fx.Node, name: str) -> tuple[Site, fx.Node]:
    pair = fp8_pairs.product_of(node)
    form = f"torch.{name}" if pair is None else f"{name}, declared to be"
    site = Site("fp8_linear", module_path(node), source_line(node), True, form=f"{form}, 1x128 by 128x128 blocks")
    emitter, trail = Emitter(node), Trail("a product of rows scaled by 1 x 128 and a weight by 128 x 128")
    try:
        if pair is not None:
            product, replacement = _declared(emitter, node, pair, trail)
        else:
            arguments = _arguments(node, _SCALED[name])
            if name == "_scaled_mm_v2":
                arguments = _one_level(arguments, node)
                trail.holds("the recipe says blocks of 1 x 128 and 128 x 128, with one level of scales")
            product = replacement = _written(emitter, node, arguments, trail)
    except Refusal as refusal:
        emitter.undo()
        return trail.into(_refused(site, node, refusal)), node
    except Exception as error:
        emitter.undo()
        return _refused(site, node, Unsupported(f"the operator could not be written: {error}", node)), node
    node.replace_all_uses_with(replacement)
    commits.current().add([site], [(node, replacement)], emitter.made)
    commits.current().erase(node)  # pure, and without readers now
    module.graph.lint()
    module.recompile()
    choose(site, product)
    return trail.into(site), product


def _one_level(arguments: dict[str, object], node: fx.Node) -> dict[str, object]:
    """The arguments of ``_scaled_mm_v2`` with one scale a side; refuses other recipes."""
    recipes = [list(arguments[f"recipe_{side}"]) for side in "ab"]  # type: ignore[call-overload]
    if recipes == [[_TENSOR_WISE], [_TENSOR_WISE]]:
        raise PerTensorScale("both operands have one scale for the whole tensor", node)
    if recipes != [[_ROW_1X128], [_BLOCK_128X128]]:
        raise WrongBlocks(f"the recipes are {recipes[0]} by {recipes[1]}", node)
    if any(any(arguments.get(f"swizzle_{side}") or ()) for side in "ab"):  # type: ignore[arg-type]
        raise WrongBlocks("the scales are swizzled", node)
    scale_a, scale_b = (list(arguments[f"scale_{side}"])[0] for side in "ab")  # type: ignore[call-overload]
    return {**arguments, "scale_a": scale_a, "scale_b": scale_b}


def _written(e: Emitter, node: fx.Node, arguments: dict[str, object], trail: Trail) -> fx.Node:
    """``fp8_linear`` in front of the call; raises a Refusal if the call computes something else."""
    a, b, scale_a, scale_b = (arguments[n] for n in ("self", "mat2", "scale_a", "scale_b"))
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    assert isinstance(scale_a, fx.Node) and isinstance(scale_b, fx.Node)
    x, w, s_a, s_b = (n.meta["example_value"] for n in (a, b, scale_a, scale_b))
    _check_blocks(node, x, w, s_a, s_b)
    trail.holds("both operands are e4m3, with a float32 scale for each block")
    dtype = arguments.get("out_dtype")
    if arguments.get("scale_result") is not None or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise WrongFormat(f"the result is {dtype or x.dtype}, or scaled: products are rounded to 16 or 32 bits", node)
    trail.holds("the result is rounded once, to 16 or 32 bits")
    commits.current().permit()
    x_scale = _block_major(e, e.call(aten.t.default, scale_a), x.shape[0])
    w_scale = e.call(aten.t.default, scale_b)
    w_scale = e.call(aten.contiguous.default, e.narrow(w_scale, 1, 0, -(-w.shape[0] // BLOCK)))
    w_NK = e.call(aten.t.default, b)
    bias = arguments.get("bias")
    return e.call(torch.ops.dsinfra.fp8_linear.default, a, x_scale, w_NK, w_scale, bias, dtype)


def _check_blocks(node: fx.Node, x: torch.Tensor, w: torch.Tensor, s_a: torch.Tensor, s_b: torch.Tensor) -> None:
    """Refuses unless s_a has a scale for 1 x 128 of x [M, K], and s_b one for 128 x 128 of w [K, N]."""
    if (x.dtype, w.dtype) != (FP8, FP8):
        raise WrongFormat(f"the operands are {x.dtype} and {w.dtype}; the kernels multiply {FP8}", node)
    if s_a.dim() != 2 or s_b.dim() != 2:
        raise PerTensorScale(f"scales of shape {list(s_a.shape)} and {list(s_b.shape)}", node)
    (M, K), N = x.shape, w.shape[1]
    k_blocks, n_blocks = -(-K // BLOCK), -(-N // BLOCK)
    padded = -(-k_blocks // 4) * 4  # cuBLAS's layout of the second operand's scales; _scaled_mm_v2 asks for all of it
    tensor_wise = _static(M, 1) and k_blocks == n_blocks == 1
    if tensor_wise:
        raise PerTensorScale("each operand has one scale, which torch takes for the whole tensor's", node)
    if s_a.dtype != torch.float32 or s_b.dtype != torch.float32:
        raise WrongBlocks(f"the scales are {s_a.dtype} and {s_b.dtype}: MX and NV formats have no kernel here", node)
    fits_a = _agree(s_a.shape[0], M) and s_a.shape[1] == k_blocks
    if not fits_a or s_b.shape[0] not in (k_blocks, padded) or s_b.shape[1] != n_blocks:
        raise WrongBlocks(
            f"scales {list(s_a.shape)} and {list(s_b.shape)} for [{M}, {K}] x [{K}, {N}]: not [{M}, {k_blocks}] and "
            f"[{k_blocks}, {n_blocks}]",
            node,
        )


def _static(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Equal by their expressions: comparing symbolic sizes would install a guard."""
    left, right = (x if isinstance(x, int) else x.node.expr for x in (a, b))
    return bool(left == right)


def _agree(rows: int | torch.SymInt, M: int | torch.SymInt) -> bool:
    """Equal by their expressions, or by a guard: the product itself runs only where each of M rows has its scale.

    Not every torch compares the two while it traces the product (2.11 doesn't on CPUs), so two symbols may be left.
    """
    known = all(isinstance(size, int) or size.node.has_hint() for size in (rows, M))
    return _static(rows, M) or (known and bool(rows == M))


def _block_major(e: Emitter, scale: fx.Node, rows: int | torch.SymInt) -> fx.Node:
    """Scales [K/128, M] as the GEMM reads them: rows contiguous, padded with zeros to a multiple of 4."""
    if not isinstance(rows, int) or rows % 4:
        # Always four columns more, cut to size: a padding of symbolic width would be compiled for 0, 1 and others.
        zeros = e.call(aten.new_zeros.default, scale, [e.size(scale, 0), 4])
        size = e.size(scale, 1)
        scale = e.call(aten.cat.default, [scale, zeros], 1)
        end: object = -(-rows // 4) * 4 if isinstance(rows, int) else None
        if end is None:  # spelled as the operator's own check spells it, so that no guard is installed
            end = e.call(operator.mul, e.call(operator.floordiv, e.plus(size, 3), 4), 4)
        scale = e.call(aten.slice.Tensor, scale, 1, 0, end)
    if scale.meta["example_value"].shape[0] == 1:  # any stride of the single row is contiguous to torch
        return e.call(aten.unsqueeze.default, e.call(aten.squeeze.dim, scale, 0), 0)
    return e.call(aten.contiguous.default, scale)


# ------------------------------------------------------------------ products that were declared


def _declared(e: Emitter, node: fx.Node, pair: fp8_pairs.Fp8Pair, trail: Trail) -> tuple[fx.Node, fx.Node]:
    """(``fp8_linear``, its result in the shape of the call's) in front of the call; raises a Refusal."""
    found = fp8_pairs.operands(node, pair)
    if found is None:
        raise OpaqueKernel(f"`{called(node)}` has other arguments than it was checked with", node)
    a, a_s, b, b_s = found
    x, s_x, w, s_w = (_value(n) for n in found)
    if any(t.device.type != pair.device for t in (x, s_x, w, s_w)):
        raise OpaqueKernel(f"`{called(node)}` was checked on {pair.device}, and runs on {x.device}", node)
    _check_declared(node, x, s_x, w, s_w)
    trail.holds("both operands are e4m3, with a float32 scale for each block")
    commits.current().permit()
    quantize = a.args[0] if a.target is operator.getitem else None
    rows = fp8_pairs.quantized(quantize, pair)
    if rows is not None and (a.args, a_s.args, a_s.target) == ((quantize, 0), (quantize, 1), operator.getitem):
        trail.holds("its rows are what the quantiser of the pair made")
        before = Emitter(quantize)  # where the quantiser reads x: it may be written later
        before.made = e.made
        flat = before.call(aten.flatten.using_ints, rows, 0, -2) if len(x.shape) > 2 else rows
        both = before.call(torch.ops.dsinfra.quantize_1x128.default, flat)
        values, scales = before.item(both, 0), before.item(both, 1)
    else:
        values = e.call(aten.flatten.using_ints, a, 0, -2) if len(x.shape) > 2 else a
        scales = e.call(aten.flatten.using_ints, a_s, 0, -2) if len(x.shape) > 2 else a_s
        scales = _block_major(e, e.call(aten.t.default, scales), values.meta["example_value"].shape[0])
    dtype = _value(node).dtype
    w_scale = e.call(aten.contiguous.default, b_s)
    product = e.call(torch.ops.dsinfra.fp8_linear.default, values, scales, b, w_scale, None, dtype)
    if len(x.shape) == 2:
        return product, product
    sizes = [e.size(a, dim) for dim in range(len(x.shape) - 1)]
    return product, e.call(aten.view.default, product, [*sizes, w.shape[0]])


def _check_declared(node: fx.Node, x: torch.Tensor, s_x: torch.Tensor, w: torch.Tensor, s_w: torch.Tensor) -> None:
    """Refuses unless the tensors are laid out as those that the pair was checked with."""
    if (x.dtype, w.dtype) != (FP8, FP8):
        raise WrongFormat(f"the operands are {x.dtype} and {w.dtype}; the kernels multiply {FP8}", node)
    fits = len(x.shape) >= 2 and len(w.shape) == 2 and isinstance(x.shape[-1], int) and x.shape[-1] % BLOCK == 0
    scales = fits and (tuple(s_x.shape[-1:]), tuple(s_w.shape)) == (
        (x.shape[-1] // BLOCK,),
        (-(-w.shape[0] // BLOCK), x.shape[-1] // BLOCK),
    )
    lead = scales and len(s_x.shape) == len(x.shape) and all(map(_static, s_x.shape[:-1], x.shape[:-1]))
    if not lead or (s_x.dtype, s_w.dtype) != (torch.float32, torch.float32) or w.shape[1] != x.shape[-1]:
        raise WrongBlocks(
            f"scales {list(s_x.shape)} {s_x.dtype} and {list(s_w.shape)} {s_w.dtype} for {list(x.shape)} by "
            f"{list(w.shape)}",
            node,
        )


# ------------------------------------------------------------------ the report


def _reported(node: fx.Node) -> Site:
    """An operator that an adapter's kernels brought into the graph."""
    name = operator_name(node)
    read = [a for a in node.args if isinstance(a, fx.Node) and is_fp8(a)]
    weights = read if name == "fp8_experts" else read[1:]
    shapes = ", ".join(str(list(_value(a).shape)) for a in weights)
    site = Site(KINDS[name], module_path(node), _users_line(node), True, form=f"{name} in place, weight {shapes}")
    site.node = node.name
    choose(site, node)
    return site


def _users_line(node: fx.Node) -> str:
    """Where the model calls what an adapter put in place: the innermost line outside of this package."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    outside = [frame for frame in frames if "dscompile/adapters/" not in frame[0]]
    return "/".join(outside[-1][0].split("/")[-2:]) + f":{outside[-1][1]}" if outside else source_line(node)


def _value(node: fx.Node) -> torch.Tensor:
    return node.meta.get("example_value")


def choose(site: Site, node: fx.Node) -> None:
    """Names the implementation that the operator's own table would choose."""
    name = operator_name(node)
    implementation, skipped = select.choose(name, tuple(fx.node.map_arg(node.args, _value)))
    site.decision, site.kernel = name, implementation.name
    site.reason = "; ".join(f"{other}: {reason}" for other, reason in skipped)


def _refused(site: Site, node: fx.Node, refusal: Refusal) -> Site:
    site.matched, site.decision = False, "left to Inductor"
    site.reason, site.refusal, site.hint = refusal.found, refusal.name, refusal.hint
    site.source, site.node = refusal.source(node), node.name
    return site


def anchors(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Nodes of a graph, and of the bodies inside it, that concern this pass."""
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            yield from (node for node in child.graph.nodes if is_anchor(node))
