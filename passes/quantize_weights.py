"""quantize_weights: linear layers and experts of a 16-bit model in block-scaled FP8, by ``options={"fp8": "block"}``.

Before:  y = x W^T                               After:  y = fp8_linear(*quantize_1x128(x), W8, scales of W8)
Before:  y = down(silu(gate(x)) * up(x))         After:  fp8_linear of both, silu_mul_quantize_1x128, fp8_linear
Before:  y = experts(x, ids, weights, W1, W2)    After:  y = fp8_experts(x, ids, weights, W1_8, s1, W2_8, s2)

*Changes rounding*: weights and rows are rounded to e4m3 with a scale for each block of 128 x 128 and 1 x 128. So it
runs only when it is asked for by name, and each site reports what it costs: the relative error of the weight, and that
of the layer's output on random rows. The copies are made once (``fp8_prepared.py``), and again when a weight changes.

Kept as they are, with the reason in the report: weights of under 128 rows or columns or not a multiple of 16, routers
(their top-k is a hard decision), the head (unless ``fp8_head``), MLA's up-projection (absorbing needs its values), and
all weights of a graph that is differentiated. Rows that several layers read are quantised once. Of experts that are
spread over a group, each rank quantises its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx

from dscompile.lowering.block_scales import (
    BLOCK,
    FP8,
    FP8_MAX,
    SMALLEST_SCALE,
    dequantize_rows,
    dequantize_weight,
    quantize_rows,
)
from dscompile.passes import commits, fp8_gated
from dscompile.passes.emit import Emitter
from dscompile.passes.fp8_gated import Gated
from dscompile.passes.fp8_prepared import Prepared
from dscompile.passes.fp8_refusals import GradientWeights, KeptPrecise
from dscompile.passes.fp8_roles import feeds_output, feeds_topk, live_nodes, up_projections
from dscompile.passes.graph import module_path, source_line, torch_call
from dscompile.passes.memory import Memory
from dscompile.passes.recognize_fp8 import choose, operator_name
from dscompile.passes.record import PassRecord, Site
from dscompile.passes.refusals import Refusal, Unsupported
from dscompile.passes.shadow import Shadow

aten = torch.ops.aten
NAME, PAIR = "quantize_weights", "quantize_weights_joined"
DTYPES = (torch.bfloat16, torch.float16)
SMALLEST, MULTIPLE = 128, 16
PROBE_ROWS = 16
Written = tuple[fx.Node, list[fx.Node]]  # what replaces a node, and the weights it quantises


# ------------------------------------------------------------------ the numbers


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] or [E, N, K] -> e4m3 values and float32 scales [..., ceil(N/128), ceil(K/128)], a matrix at a time."""
    *lead, N, K = weight.shape
    rows, columns = -(-N // BLOCK), -(-K // BLOCK)
    if lead:  # float32 of all experts at once would be four times what is stored
        values = weight.new_empty(weight.shape, dtype=FP8)
        scale = weight.new_empty(*lead, rows, columns, dtype=torch.float32)
        for e, matrix in enumerate(weight):
            values[e], scale[e] = quantize_weight(matrix)
        return values, scale
    wide = torch.nn.functional.pad(weight.float(), (0, columns * BLOCK - K, 0, rows * BLOCK - N))
    blocks = wide.view(rows, BLOCK, columns, BLOCK)
    scale = (blocks.abs().amax((1, 3)) / FP8_MAX).clamp_min(SMALLEST_SCALE)
    values = (blocks / scale[:, None, :, None]).view(rows * BLOCK, -1)[:N, :K]
    return values.to(FP8).contiguous(), scale


def quantize_experts(first: int, last: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a weight [E, N, K], the experts first to last - 1, quantised."""
    return quantize_weight(weight[first:last])


def quantize_pair(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two weights [F, K], F a multiple of 128, as one of [2F, K], quantised."""
    (values, scales) = zip(quantize_weight(gate), quantize_weight(up), strict=True)
    return torch.cat(values), torch.cat(scales)


def errors(weight: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> tuple[float, float]:
    """Relative errors of a quantised weight, and of its product with quantised random rows (an expert's: the first)."""
    weight, values, scale = (x[0] if x.dim() == 3 else x for x in (weight, values, scale))
    wide, stored = weight.float(), dequantize_weight(values, scale)
    seeded = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(PROBE_ROWS, weight.shape[1], generator=seeded, dtype=torch.float32, device="cpu").to(weight.device)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        y, product = x @ wide.t(), dequantize_rows(*quantize_rows(x)) @ stored.t()
    tiny = torch.finfo(torch.float32).tiny
    pairs = ((stored - wide, wide), (product - y, y))
    of_weight, of_output = (float(d.norm() / base.norm().clamp_min(tiny)) for d, base in pairs)
    return of_weight, of_output


# ------------------------------------------------------------------ the pass


def _own(weight: fx.Node) -> tuple[fx.Node, int, int]:
    """(weight of all experts, first, last) of a slice that `expert_parallel` wrote; (itself, 0, 0) of another."""
    if weight.target is aten.slice.Tensor and weight.args[1] == 0 and weight.args[0].op == "placeholder":
        return weight.args[0], *weight.args[2:4]
    return weight, 0, 0


@dataclass
class Quantizer:
    """Rewrites one of Dynamo's graphs."""

    module: fx.GraphModule
    shadow: Shadow
    prepared: Prepared
    bound: Sequence[object]
    head: bool = False
    record: PassRecord = field(default_factory=lambda: PassRecord(NAME))

    def __post_init__(self) -> None:
        self.memory = Memory(self.shadow.graph)
        self._twin = {o.node: s for s, owners in self.shadow.owners.items() for o in owners if o.module is self.module}
        self._rows: dict[fx.Node, list[tuple[fx.Node, fx.Node, fx.Node]]] = {}
        self._absorbable = up_projections(self.bound)
        self._gated: dict[Gated, bool] = {}

    def run(self) -> PassRecord:
        live, gated = live_nodes(self.module.graph), fp8_gated.find(self.module.graph)
        for node in list(self.module.graph.nodes):
            if node in live and torch_call(node) == "linear":
                whole = gated.get(node)
                if whole is None or not self._joined(whole, node):
                    self._site("fp8_linear", node, self._linear)
            elif node in live and node.target is torch.ops.dsinfra.experts.default:
                self._site("fp8_experts", node, self._experts)
        self.module.graph.lint()
        self.module.recompile()
        return self.record

    def _joined(self, gated: Gated, node: fx.Node) -> bool:
        """Writes a gated layer when its first linear layer is met; False if it must be quantised layer by layer."""
        if gated not in self._gated:
            self._gated[gated] = self._write_gated(gated)
        return self._gated[gated]

    def _write_gated(self, gated: Gated) -> bool:
        e, first = Emitter(gated.down), Emitter(gated.gate)  # the rows where other layers find them in time
        layers = (gated.gate, gated.up, gated.down)
        try:
            for layer in layers:
                self._check(layer)
            if not self._unchanged(gated.x, gated.gate, gated.down):
                return False
            rows = self._quantised_rows(first, gated.gate, gated.x)
            pair = self.prepared.add(PAIR, quantize_pair, gated.weights)
            dtype = gated.gate.meta["example_value"].dtype
            both = e.call(torch.ops.dsinfra.fp8_linear.default, *rows, *pair, None, dtype)
            hidden = e.call(torch.ops.dsinfra.silu_mul_quantize_1x128.default, both, None)
            y, product = self._product(e, gated.down, (e.item(hidden, 0), e.item(hidden, 1)))
            measured = [*self._pair_errors(gated), self._errors(gated.down.args[1])]
        except Exception:
            self._forget(e)
            self._forget(first)
            return False  # each layer says for itself what is wrong
        gated.down.replace_all_uses_with(y)
        written = []
        for layer, cost in zip(layers, measured, strict=True):
            site = self._new_site("fp8_linear", layer)
            site.form = "a gated layer's 16-bit weight, quantised by request"
            site.errors = dict(zip(("weight", "output"), cost, strict=True))
            choose(site, product if layer is gated.down else both)
            written.append(site)
        self.record.sites += written
        commits.current().add(written, [(gated.down, y)], [*first.made, *e.made])
        return True

    def _pair_errors(self, gated: Gated) -> list[tuple[float, float]]:
        copy = self.prepared.copy(PAIR, quantize_pair, gated.weights)
        if "errors" not in copy.notes:
            halves = zip(*(value.chunk(2) for value in copy.values), strict=True)
            copy.notes["errors"] = [
                errors(self.prepared.tensor(weight), *half) for weight, half in zip(gated.weights, halves, strict=True)
            ]
        return copy.notes["errors"]

    def _new_site(self, kind: str, node: fx.Node) -> Site:
        form = "16-bit weight, quantised by request"
        return Site(kind, module_path(node), source_line(node), True, form=form, node=node.name)

    def _site(self, kind: str, node: fx.Node, write: Callable[[Emitter, fx.Node], Written]) -> None:
        site, emitter = self._new_site(kind, node), Emitter(node)
        try:
            replacement, weights = write(emitter, node)
            measured = [self._errors(weight) for weight in weights]
        except Refusal as refusal:
            self._keep(site, refusal, emitter)
        except Exception as error:  # a fault of ours costs this site, not the others
            self._keep(site, Unsupported(f"the analysis raised {type(error).__name__}: {error}", node), emitter)
        else:
            site.errors = {"weight": max(m[0] for m in measured), "output": max(m[1] for m in measured)}
            choose(site, replacement if operator_name(replacement) else replacement.args[0])
            node.replace_all_uses_with(replacement)
            commits.current().add([site], [(node, replacement)], emitter.made)
            commits.current().erase(node)  # pure, and without readers now
        self.record.sites.append(site)

    def _forget(self, emitter: Emitter) -> None:
        """Takes back what was written for a site that is kept after all."""
        made = set(emitter.made)
        self._rows = {x: [rows for rows in found if rows[1] not in made] for x, found in self._rows.items()}
        emitter.undo()

    def _keep(self, site: Site, refusal: Refusal, emitter: Emitter) -> None:
        self._forget(emitter)
        site.matched, site.decision = False, "kept in 16 bits"
        site.reason, site.refusal, site.hint = refusal.found, refusal.name, refusal.hint

    def _linear(self, e: Emitter, node: fx.Node) -> Written:
        self._check(node)
        y, _ = self._product(e, node, self._quantised_rows(e, node, node.args[0]))
        return y, [node.args[1]]

    def _check(self, node: fx.Node) -> None:
        """Raises the Refusal of a linear layer that is kept."""
        if len(node.args) < 2:
            raise Unsupported("a linear layer called by keywords", node)
        x, weight = node.args[:2]
        self._check_weight(node, x, weight)
        if weight in self._absorbable:
            raise KeptPrecise("MLA's up-projection: absorbing it needs its values", node)
        if feeds_topk(node):
            raise KeptPrecise("a router: which experts it chooses is a hard decision", node)
        if not self.head and feeds_output(node):
            raise KeptPrecise("the head: its result leaves the graph (options fp8_head quantises it)", node)
        commits.current().permit()

    def _product(self, e: Emitter, node: fx.Node, rows: tuple[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node]:
        """(the linear layer's result over quantised rows, in its shape; the product itself)."""
        x, weight = node.args[:2]
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        dtype = node.meta["example_value"].dtype
        product = e.call(torch.ops.dsinfra.fp8_linear.default, *rows, *self._quantised(weight), bias, dtype)
        sizes = [e.size(x, d) for d in range(e.rank(x) - 1)]
        if len(sizes) == 1:
            return product, product
        return e.call(aten.view.default, product, [*sizes, weight.meta["example_value"].shape[0]]), product

    def _experts(self, e: Emitter, node: fx.Node) -> Written:
        x, ids, weights, w_gate_up, w_down, b_gate_up, b_down, activation, interleaved, _, limit = node.args
        if b_gate_up is not None or b_down is not None or interleaved or limit > 0 or activation != "silu":
            raise Unsupported(f"experts with biases, {activation}, or a clamp have no FP8 form", node)
        for weight in (w_gate_up, w_down):
            self._check_weight(node, x, weight)
        commits.current().permit()
        operands = [*self._quantised(w_gate_up), *self._quantised(w_down)]
        y = e.call(torch.ops.dsinfra.fp8_experts.default, x, ids, weights, *operands, activation)
        return y, [w_gate_up, w_down]

    def _check_weight(self, node: fx.Node, x: fx.Node, weight: fx.Node) -> None:
        value, rows = weight.meta["example_value"], x.meta["example_value"]
        shape = list(value.shape)
        if value.dtype not in DTYPES or rows.dtype != value.dtype:
            raise KeptPrecise(f"the weight {shape} is {value.dtype} and meets {rows.dtype}", node)
        if min(shape[-2:]) < SMALLEST or any(size % MULTIPLE for size in shape[-2:]):
            found = f"the weight {shape} has under {SMALLEST} rows or columns, or no multiple of {MULTIPLE}"
            raise KeptPrecise(found, node)
        if rows.dim() < 2:
            raise Unsupported("a single row", node)
        reason = self.prepared.refusal([_own(weight)[0]])
        if reason:
            raise Unsupported(reason, node)

    def _quantised(self, weight: fx.Node) -> tuple[fx.Node, ...]:
        name, make, source = self._recipe(weight)
        return self.prepared.add(name, make, [source])

    def _recipe(self, weight: fx.Node) -> tuple[str, Callable[..., tuple[torch.Tensor, torch.Tensor]], fx.Node]:
        """(name, function, input of the graph) of the quantised copy of a weight, or of this rank's experts in one."""
        source, first, last = _own(weight)
        if source is weight:
            return NAME, quantize_weight, weight
        return f"{NAME}_{first}_{last}", partial(quantize_experts, first, last), source

    def _quantised_rows(self, e: Emitter, node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        """``quantize_1x128`` of x [..., K], or that of an earlier layer that read the same values."""
        for earlier, values, scale in self._rows.get(x, ()):
            if self._unchanged(x, earlier, node):
                return values, scale
        flat = x if e.rank(x) == 2 else e.call(aten.flatten.using_ints, x, 0, -2)
        pair = e.call(torch.ops.dsinfra.quantize_1x128.default, flat)
        values, scale = e.item(pair, 0), e.item(pair, 1)
        self._rows.setdefault(x, []).append((node, values, scale))
        return values, scale

    def _unchanged(self, x: fx.Node, earlier: fx.Node, later: fx.Node) -> bool:
        """True if nothing writes x between two of its readers; both must be the model's own calls."""
        twins = [self._twin.get(n) for n in (x, earlier, later)]
        if None in twins:
            return False
        value, first, second = twins
        position = self.memory.position
        return self.memory.unchanged(value, position[first], position[second])

    def _errors(self, weight: fx.Node) -> tuple[float, float]:
        """What the quantisation of a weight costs, measured when its copy was made."""
        name, make, source = self._recipe(weight)
        copy = self.prepared.copy(name, make, [source])
        if "errors" not in copy.notes:
            _, first, last = _own(weight)
            whole = self.prepared.tensor(source)
            with torch.no_grad():
                copy.notes["errors"] = errors(whole if source is weight else whole[first:last], *copy.values)
        return copy.notes["errors"]


def run(
    module: fx.GraphModule,
    shadow: Shadow,
    prepared: Prepared,
    bound: Sequence[object],
    *,
    training: bool,
    head: bool = False,
) -> PassRecord:
    """Quantises every eligible weight of Dynamo's graph; none if it is differentiated."""
    return differentiated() if training else Quantizer(module, shadow, prepared, bound, head).run()


def differentiated() -> PassRecord:
    """Nothing is quantised in a graph that gradients flow through."""
    refusal = GradientWeights("the graph is differentiated: FP8 copies have no gradient")
    site = Site("fp8_linear", "", "?", False, decision="kept in 16 bits", reason=refusal.found)
    site.refusal, site.hint = refusal.name, refusal.hint
    return PassRecord(NAME, [site])
