"""transformers' block-FP8 models without the kernels of the hub: ours take their place, traceable, on any device.

transformers runs `FP8Linear` and `FP8Experts` through a bundle of three functions that it downloads on first use; where
the `kernels` package is missing, that first call raises ImportError. Ours have to stand *before* Dynamo traces, which
inlines what it finds, so :func:`watch` puts them in place at the start of every compilation once the backend is in use;
kernels that transformers can load itself are not replaced. After tracing, each FP8 linear is `quantize_1x128` +
`fp8_linear` and the experts of a layer are one `fp8_experts`; uncompiled calls run the same operators.
:func:`uninstall` takes it all back.

| seam in `transformers.integrations.finegrained_fp8` | 5.12 | 5.17 | 5.23 |
|---|---|---|---|
| `load_finegrained_fp8_kernel()` -> `FineGrainedFP8(matmul, batched_matmul, grouped_matmul)` | yes | yes | yes |
| `ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm" / "batched_mm"]` | yes | yes | yes |
| `is_deepgemm_loadable()`, asked before that | no | yes | yes |
| an autograd function around both where the input needs a gradient | no | no | yes, left alone |

The loading function is replaced, not the bundle it keeps in a global: called under Dynamo, it leaves a node in the
graph that no cache of compiled graphs accepts. Blocks other than 128 x 128, one scale for a whole weight and static
activation scales have no kernel: their weights are dequantised in plain torch, and the report says so.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

log = logging.getLogger("dscompile")

MODULE = "transformers.integrations.finegrained_fp8"
BLOCK = 128
_FIELDS = ("matmul", "batched_matmul", "grouped_matmul")
_EXPERTS = ("grouped_mm", "batched_mm")
_LOADER = "load_finegrained_fp8_kernel"
_ASKED_FIRST = "is_deepgemm_loadable"  # since 5.17: linear layers prefer another kernel of the hub where it says yes

_watching = False
_enabled = True
_replaced: dict[str, tuple[Any, Any]] = {}  # what stood in transformers before, by name; and what took its place


def watch() -> None:
    """Install at the start of every compilation from now on; does nothing the second time, and imports nothing."""
    global _watching
    if not _watching:
        _watching = True
        torch._dynamo.callback_handler.register_start_callback(_on_compile_start)
    _on_compile_start(None)


def _on_compile_start(_: Any) -> None:
    module = sys.modules.get(MODULE)
    # Loaded half: another thread may be importing it.
    if _enabled and not _replaced and module is not None and hasattr(module, "ALL_FP8_EXPERTS_FUNCTIONS"):
        try:
            _install(module, replace=False)
        except Exception as error:  # this runs in every compilation, also of models that have nothing to do with it
            uninstall()  # what stands half
            log.warning(
                "dsinfra: FP8 modules of transformers are left as they are: %s: %s", type(error).__name__, error
            )


def install(replace: bool = False) -> bool:
    """Put our functions in transformers' place for kernels, now; -> whether they stand.

    Args:
        replace: also if transformers could load its own kernels, or has.
    """
    global _enabled
    _enabled = True
    import importlib

    return bool(_replaced) or _install(importlib.import_module(MODULE), replace)


def uninstall() -> None:
    """Give transformers back what it had, and stop watching. What was compiled meanwhile is compiled anew.

    What someone put in the place of ours meanwhile stays.
    """
    global _enabled
    _enabled = False
    module = sys.modules.get(MODULE)
    if not _replaced or module is None:
        return
    own = module.ALL_FP8_EXPERTS_FUNCTIONS._local_mapping
    for name, (before, ours) in _replaced.items():
        if name not in _EXPERTS:
            if getattr(module, name, None) is ours:
                setattr(module, name, before)
        elif own.get(name) is ours:
            del module.ALL_FP8_EXPERTS_FUNCTIONS[name]
            if before is not None:
                module.ALL_FP8_EXPERTS_FUNCTIONS[name] = before
    _replaced.clear()


def _install(module: ModuleType, replace: bool) -> bool:
    reason = unsupported(module)
    if reason:
        log.info("dsinfra: FP8 modules of transformers are left as they are: %s", reason)
        return False
    loader_is_theirs = getattr(getattr(module, _LOADER), "__module__", MODULE) == MODULE
    loaded = getattr(module, "_FINEGRAINED_FP8", None) is not None
    if not replace and (loaded or not loader_is_theirs or module.is_kernels_available()):
        return False
    from transformers.activations import ACT2FN

    import dscompile.lowering.ops  # noqa: F401  (registers the operators)

    bundle = module.FineGrainedFP8(matmul, batched_matmul, grouped_matmul)
    for name, ours in ((_LOADER, lambda: bundle), (_ASKED_FIRST, lambda *_, **__: False)):
        if hasattr(module, name):
            _replaced[name] = getattr(module, name), ours
            setattr(module, name, ours)
    silu = (torch.nn.SiLU, type(ACT2FN["silu"]))
    functions = module.ALL_FP8_EXPERTS_FUNCTIONS
    for name in _EXPERTS:
        registered = functions._local_mapping.get(name)  # by the user: transformers' own are in the global table
        if registered is None or replace:
            ours_for_experts = _experts_forward(functions[name], silu)
            _replaced[name] = registered, ours_for_experts
            functions[name] = ours_for_experts
    return True


def unsupported(module: ModuleType) -> str:
    """Why these transformers have no seam that this adapter knows; empty if they have."""
    fields = tuple(getattr(getattr(module, "FineGrainedFP8", None), "__dataclass_fields__", ()))
    if fields != _FIELDS:
        return f"the bundle of kernels has the fields {fields}, known are {_FIELDS}"
    if not hasattr(module, _LOADER):
        return f"there is no `{_LOADER}` to replace"
    functions = getattr(module, "ALL_FP8_EXPERTS_FUNCTIONS", None)
    if functions is None or not hasattr(functions, "_local_mapping") or any(n not in functions for n in _EXPERTS):
        return f"there is no table of experts functions with {_EXPERTS}"
    return ""


# ------------------------------------------------------------------ the bundle


def matmul(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale_inv: torch.Tensor,
    block_size: Sequence[int] | None = None,
    output_dtype: torch.dtype | None = None,
    activation_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] times an FP8 weight [N, K] with scales -> [..., N], in `output_dtype` or the input's."""
    dtype = output_dtype or input.dtype
    if not _blocked(weight, weight_scale_inv, block_size) or activation_scale is not None:
        return F.linear(input.to(dtype), dequantized(weight, weight_scale_inv, block_size, dtype))
    x_MK, weight_scale = input.reshape(-1, input.shape[-1]), _float32(weight_scale_inv)
    if torch.is_grad_enabled() and input.requires_grad:  # adapters trained on top of frozen FP8 layers
        y_MN = torch.ops.dsinfra.fp8_linear_bf16(x_MK, weight.detach(), weight_scale, None).to(dtype)
    else:
        y_MN = torch.ops.dsinfra.fp8_linear(*torch.ops.dsinfra.quantize_1x128(x_MK), weight, weight_scale, None, dtype)
    return y_MN.reshape(*input.shape[:-1], weight.shape[0])


def grouped_matmul(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale_inv: torch.Tensor,
    offsets: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """x [M, K] sorted by group times weights [G, N, K]; group g owns rows offsets[g-1]..offsets[g) -> [M, N]."""
    ends = offsets.to(torch.int32)
    if not _blocked(weight, weight_scale_inv, block_size):
        wide = dequantized(weight, weight_scale_inv, block_size, input.dtype)
        return torch.ops.dsinfra.grouped_linear(input, wide, ends)
    q, scale = torch.ops.dsinfra.quantize_1x128(input)
    return torch.ops.dsinfra.fp8_grouped_linear(q, scale, weight, _float32(weight_scale_inv), ends, input.dtype)


def batched_matmul(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale_inv: torch.Tensor,
    block_size: Sequence[int] | None = None,
    expert_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K], row m times weight `expert_ids[m]` of [E, N, K] -> [M, N]; rows of ids >= E are zero."""
    assert expert_ids is not None
    ids, order = torch.sort(expert_ids, stable=True)
    experts = torch.arange(weight.shape[0], device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
    y = grouped_matmul(input[order], weight, weight_scale_inv, ends, ends, block_size)
    return y[torch.argsort(order)]


def _blocked(weight: torch.Tensor, scale: torch.Tensor, block_size: Sequence[int] | None) -> bool:
    """True if the weight [..., N, K] has one scale for each block of 128 x 128."""
    blocks = tuple(-(-size // BLOCK) for size in weight.shape[-2:])
    return (
        weight.dtype == torch.float8_e4m3fn
        and block_size is not None
        and tuple(block_size) == (BLOCK, BLOCK)
        and tuple(scale.shape[-2:]) == blocks
    )


def _float32(scale: torch.Tensor) -> torch.Tensor:
    """Scales as the operators read them: a power of two stored as its exponent (ue8m0) is exact in float32.

    transformers makes them parameters that require grad, and gives them none.
    """
    scale = scale.detach() if torch.is_grad_enabled() and scale.requires_grad else scale
    return scale if scale.dtype == torch.float32 else scale.to(torch.float32)


def dequantized(
    weight: torch.Tensor, scale: torch.Tensor, block_size: Sequence[int] | None, dtype: torch.dtype
) -> torch.Tensor:
    """FP8 weight [..., N, K] times its scales (one a block of `block_size`, or one in all), rounded once to `dtype`."""
    if weight.dtype != torch.float8_e4m3fn:
        raise NotImplementedError(
            f"A weight {list(weight.shape)} of {weight.dtype} can't be dequantised here: only float8_e4m3fn weights "
            "have operators. Load the model with its weights dequantised, or install transformers' own kernels."
        )
    scale = scale.to(torch.float32)
    if block_size is not None and scale.dim() >= 2:
        (rows, columns), (block_n, block_k) = weight.shape[-2:], block_size
        scale = scale.repeat_interleave(block_n, -2)[..., :rows, :].repeat_interleave(block_k, -1)[..., :columns]
    return (weight.to(torch.float32) * scale).to(dtype)


# ------------------------------------------------------------------ experts


def _experts_forward(original: Callable[..., torch.Tensor], silu: tuple[type, ...]) -> Callable[..., torch.Tensor]:
    """transformers' forward of a layer's FP8 experts, as one operator where that computes the same."""

    def forward(
        self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if not _plain_swiglu(self, silu) or (torch.is_grad_enabled() and hidden_states.requires_grad):
            return original(self, hidden_states, top_k_index, top_k_weights)
        return torch.ops.dsinfra.fp8_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_proj,
            _float32(self.gate_up_proj_scale_inv),
            self.down_proj,
            _float32(self.down_proj_scale_inv),
            "silu",
        )

    return forward


def _plain_swiglu(experts: Any, silu: tuple[type, ...]) -> bool:
    """True if each expert is down(silu(gate) * up) over block-scaled weights with dynamic activation scales."""
    return (
        experts.has_gate
        and experts.activation_scheme == "dynamic"
        and isinstance(experts.act_fn, silu)
        and all(getattr(experts, name, None) is None for name in ("limit", "swiglu_alpha", "gate_softcap"))
        and _blocked(experts.gate_up_proj, experts.gate_up_proj_scale_inv, experts.block_size)
        and _blocked(experts.down_proj, experts.down_proj_scale_inv, experts.block_size)
    )
