"""Reads of FP8 tensors: products that proofs may look through, and reads that no operator of ours makes.

``fp8_linear(quantize_1x128(x), W)`` is the contraction of x with W, rounded once more on the way: a proof about which
element meets which weight may look through it. A rewrite that then multiplies x itself with the dequantised W rounds
less than the model does.

Every other read is a refusal, with what it does to the tensor.
A graph's FP8 inputs (weights) and the FP8 values it computes are followed through views to their readers. A reader
that converts a weight to a wider dtype means that the model multiplies dequantised values; how large the blocks of its
scales are is read off the tensor it multiplies with. A Triton kernel or an operator of another library could compute
anything: it is refused by name, and its name proves nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import fx

from dscompile.lowering.block_scales import BLOCK
from dscompile.passes.fp8_refusals import Dequantized, OpaqueKernel, PerTensorScale, WrongBlocks
from dscompile.passes.graph import called, module_path, source_line
from dscompile.passes.record import Site
from dscompile.passes.refusals import Refusal

FP8_DTYPES = {
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
}

# Calls of Dynamo's graph, by name, that keep a tensor's values and dtype.
_VIEWS = {
    *("view", "reshape", "t", "transpose", "permute", "contiguous", "detach", "getitem", "flatten", "unflatten"),
    *("unsqueeze", "squeeze", "expand", "slice", "clone", "narrow", "mT", "T", "getattr", "select", "alias"),
}
_CASTS = {"to", "float", "bfloat16", "half", "double", "type", "_to_copy", "convert_element_type"}
_SPREADS = {*_VIEWS, *_CASTS, "repeat_interleave", "repeat", "broadcast_to"}
_PRODUCTS = {"mul", "mul_", "multiply"}
_KERNELS = {"triton_kernel_wrapper_mutation", "triton_kernel_wrapper_functional"}
_SILENT = {"size", "dim", "numel", "is_contiguous", "stride", "sym_size", "_shape_as_tensor"}


class Fp8Operands(NamedTuple):
    """Of one FP8 product in the shadow: rows before quantisation, weight, its scales, and what quantises the rows."""

    x: fx.Node
    weight: fx.Node
    scale: fx.Node
    quantize: fx.Node


def fp8_operands(node: fx.Node) -> Fp8Operands | None:
    """Operands of ``fp8_linear(*quantize_1x128(x), W, scales)``, or None for any other node."""
    if node.target is not torch.ops.dsinfra.fp8_linear.default:
        return None
    values, scales, weight, weight_scale = node.args[:4]
    items = [n.args if n.target is operator.getitem else (None, None) for n in (values, scales)]
    (quantize, first), (other, second) = items
    if (first, second) != (0, 1) or quantize is not other:
        return None
    if quantize.target is not torch.ops.dsinfra.quantize_1x128.default:
        return None
    return Fp8Operands(quantize.args[0], weight, weight_scale, quantize)


def is_fp8(node: object) -> bool:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in FP8_DTYPES


def refused_reads(graph: fx.Graph, understood: Callable[[fx.Node], bool]) -> Iterator[Site]:
    """A refused site for each reader of an FP8 tensor that is not ``understood``."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            if not is_fp8(operand) or node in seen or node.op == "output" or understood(node):
                continue
            if called(node) in _VIEWS | _SILENT and (is_fp8(node) or called(node) in _SILENT):
                continue
            seen.add(node)
            yield _site(node, _refusal(node, operand))


def _site(node: fx.Node, refusal: Refusal) -> Site:
    return Site(
        kind="fp8_linear",
        module_path=module_path(node),
        source=source_line(node),
        node=node.name,
        matched=False,
        decision="left to Inductor",
        reason=refusal.found,
        refusal=refusal.name,
        hint=refusal.hint,
    )


def _refusal(node: fx.Node, operand: fx.Node) -> Refusal:
    value = operand.meta["example_value"]
    shape = list(value.shape)
    if called(node) in _KERNELS:
        return OpaqueKernel(f"a Triton kernel reads the FP8 tensor {shape}", node)
    if called(node) not in _CASTS:
        return OpaqueKernel(f"`{called(node)}` reads the FP8 tensor {shape}", node)
    scale = _scale(node)
    if scale is None or value.dim() < 2:
        return Dequantized(f"the FP8 tensor {shape} is converted to {_dtype(node)}", node)
    return _blocks(node, value, scale.meta["example_value"])


def _blocks(node: fx.Node, weight: torch.Tensor, scale: torch.Tensor) -> Refusal:
    """Why a weight that is multiplied with these scales after a cast has no kernel."""
    shape, scales = list(weight.shape), list(scale.shape)
    if scale.dim() < 2 or all(size == 1 for size in scales[-2:]) and max(shape[-2:]) > BLOCK:
        return PerTensorScale(f"the FP8 weight {shape} has scales {scales} for whole matrices", node)
    if scales[-2:] != [-(-size // BLOCK) for size in shape[-2:]]:
        block = [-(-size // count) for size, count in zip(shape[-2:], scales[-2:], strict=True)]
        return WrongBlocks(f"the FP8 weight {shape} has scales {scales}, one for about {block[0]} x {block[1]}", node)
    return Dequantized(f"the FP8 weight {shape} is dequantised with its scales {scales}", node)


def _dtype(node: fx.Node) -> str:
    value = node.meta.get("example_value")
    return str(value.dtype) if isinstance(value, torch.Tensor) else "another dtype"


def _scale(cast: fx.Node) -> fx.Node | None:
    """The input that a converted weight is multiplied with, behind what spreads it over the blocks, or None."""
    todo = [cast]
    while todo:
        node = todo.pop()
        for user in node.users:
            if called(user) in _PRODUCTS and len(user.args) > 1:
                other = user.args[1] if user.args[0] is node else user.args[0]
                return _root(other) if isinstance(other, fx.Node) else None
            if called(user) in _VIEWS:
                todo.append(user)
    return None


def _root(node: fx.Node) -> fx.Node:
    while node.op not in ("placeholder", "get_attr") and called(node) in _SPREADS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
