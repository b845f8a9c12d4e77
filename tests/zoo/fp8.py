"""Micro models in block-scaled FP8, each with a float32 twin whose weights are the dequantised ones.

The twin is the yardstick: it differs from the FP8 model by the rounding of activations alone. Dimensions are multiples
of 128, as in the models that ship in FP8; scales are float32, one for 128 x 128. Also here: FP8 linear layers as people
write them by hand, and custom operators of another library with the call shapes of DeepSeek's reference kernels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import ScalingType

from dscompile.passes.fp8_pairs import register_fp8_pair
from tests.zoo import hf
from tests.zoo.case import MICRO_SIZE, Precision, Size

FP8 = torch.float8_e4m3fn
MICRO_FP8: dict[str, Any] = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
}


def quantized(weight: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., N, K] float32 -> e4m3 values and float32 scales [..., ceil(N/block), ceil(K/block)]."""
    *lead, N, K = weight.shape
    rows, columns = -(-N // block), -(-K // block)
    padded = F.pad(weight, (0, columns * block - K, 0, rows * block - N)).view(*lead, rows, block, columns, block)
    scale = padded.abs().amax((-3, -1)) / 448
    values = (padded / scale.clamp_min(1e-30)[..., :, None, :, None]).view(*lead, rows * block, columns * block)
    return values[..., :N, :K].contiguous().to(FP8), scale


def dequantized(values: torch.Tensor, scale: torch.Tensor, block: int = 128) -> torch.Tensor:
    """The float32 matrices that `quantized` stored."""
    N, K = values.shape[-2:]
    spread = scale.repeat_interleave(block, -2)[..., :N, :].repeat_interleave(block, -1)[..., :K]
    return values.float() * spread


def hf_pair(
    model_type: str = "deepseek_v3", block: int = 128, size: Size = MICRO_SIZE, **overrides: Any
) -> tuple[nn.Module, nn.Module]:
    """(transformers' FP8 model in bfloat16, its float32 twin), of equal weights."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    settings = {name: overrides.pop(name) for name in ("activation_scheme", "scale_fmt") if name in overrides}
    widths = MICRO_FP8 if size.name == "micro" else {}
    twin = hf.build_model(model_type, Precision(), size=size, **{**widths, **overrides})
    for parameter in twin.parameters():
        parameter.data = parameter.data.bfloat16().float()
    config = FineGrainedFP8Config(weight_block_size=(block, block), **settings)
    model = replace_with_fp8_linear(copy.deepcopy(twin).bfloat16(), ["lm_head"], config)
    for name, module in model.named_modules():
        for parameter_name, parameter in list(module.named_parameters(recurse=False)):
            weight = parameter.dim() > 1 and not parameter_name.endswith("_scale_inv")
            if parameter.device.type == "meta" and weight:
                _store(module, parameter_name, twin.get_submodule(name), block)
    return model.eval(), twin


def _store(module: nn.Module, name: str, twin: nn.Module, block: int) -> None:
    """Quantises the twin's weight into the module, and leaves the twin what was stored."""
    weight = getattr(twin, name)
    values, scale = quantized(weight.detach(), block)
    weight.data = dequantized(values, scale, block)
    setattr(module, name, nn.Parameter(values, requires_grad=False))
    setattr(module, f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
    if getattr(module, "activation_scheme", "dynamic") == "static":
        module.activation_scale = nn.Parameter(torch.tensor(0.02), requires_grad=False)


# Dynamo of torch 2.11 ends the graph at `F.scaled_mm`, on every device, and its CPUs have no kernel for it.
TRACES_SCALED_MM = not torch.__version__.startswith("2.11.")


class ScaledLinear(nn.Module):
    """A linear layer over torch's own scaled product, as written with `scaled_mm` or `_scaled_mm`.

    Without a spelling it is written with the one that every supported torch traces.
    """

    def __init__(self, N: int, K: int, spelling: str = "scaled_mm" if TRACES_SCALED_MM else "_scaled_mm"):
        super().__init__()
        values, scale = quantized(torch.randn(N, K))
        self.register_buffer("weight", values)
        padded = F.pad(scale, (0, -scale.shape[1] % 4)).contiguous()  # cuBLAS's layout of these scales
        self.register_buffer("scale", padded)
        self.spelling, self.blocks = spelling, scale.shape[1]

    def forward(self, q_MK: torch.Tensor, scale_MB: torch.Tensor) -> torch.Tensor:
        if self.spelling == "_scaled_mm":
            scale = self.scale[:, : self.blocks].t()
            return torch._scaled_mm(q_MK, self.weight.t(), scale_a=scale_MB, scale_b=scale, out_dtype=torch.bfloat16)
        recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        return F.scaled_mm(q_MK, self.weight.t(), scale_MB, recipes[0], self.scale.t(), recipes[1])

    def expected(self, q_MK: torch.Tensor, scale_MB: torch.Tensor) -> torch.Tensor:
        """In float32, by definition."""
        x = q_MK.float() * scale_MB.repeat_interleave(128, 1)[:, : q_MK.shape[1]]
        return x @ dequantized(self.weight, self.scale[:, : self.blocks]).t()


def rows(M: int, K: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised rows [M, K] with their scales [M, K/128] as cuBLAS wants them: neighbouring rows side by side."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(seed))
    scale = x.view(M, K // 128, 128).abs().amax(-1) / 448
    values = (x.view(M, -1, 128) / scale.unsqueeze(-1)).view(M, K).to(FP8)
    return values, scale.t().contiguous().t()


class DequantizedLinear(nn.Module):
    """An FP8 weight that the module multiplies in the dtype of its input, with scales of `block` x `block`, or one."""

    def __init__(self, N: int, K: int, block: int | None = 128):
        super().__init__()
        values, scale = quantized(torch.randn(N, K), block or max(N, K))
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale if block else scale.reshape(1))
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale
        if self.block:
            scale = scale.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
        return F.linear(x, (self.weight.float() * scale).to(x.dtype))


@torch.library.custom_op("dsinfra_test_kernels::act_quant", mutates_args=())
def act_quant(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The call shape of DeepSeek's reference kernel: values like x, scales [..., K / block_size]."""
    blocks = x.float().unflatten(-1, (-1, block_size))
    scale = blocks.abs().amax(-1) / 448
    return (blocks / scale.unsqueeze(-1)).flatten(-2).to(FP8), scale


@act_quant.register_fake
def _(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(*x.shape[:-1], x.shape[-1] // block_size, dtype=torch.float32)


@torch.library.custom_op("dsinfra_test_kernels::fp8_gemm", mutates_args=())
def fp8_gemm(a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor) -> torch.Tensor:
    """The call shape of DeepSeek's reference kernel."""
    x = a.float() * a_s.repeat_interleave(128, -1)
    return (x @ dequantized(b, b_s).t()).to(torch.bfloat16)


@fp8_gemm.register_fake
def _(a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor) -> torch.Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[0], dtype=torch.bfloat16)


class KernelLinear(nn.Module):
    """A linear layer over those two operators, as DeepSeek's reference module calls its kernels."""

    def __init__(self, N: int, K: int):
        super().__init__()
        self.store(*quantized(torch.randn(N, K)))

    @classmethod
    def of(cls, values: torch.Tensor, scale: torch.Tensor) -> KernelLinear:
        """Over a weight that is quantised already."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.store(values, scale)
        return made

    def store(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, scale = act_quant(x.contiguous(), 128)
        return fp8_gemm(values, scale, self.weight, self.scale)


def declared_act_quant(x: torch.Tensor, block_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """As DeepSeek's function that launches a kernel; a block of zeros gives NaN there, too."""
    return act_quant(x, block_size)


def declared_fp8_gemm(a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor) -> torch.Tensor:
    """As DeepSeek's function that launches a kernel."""
    return fp8_gemm(a, a_s, b, b_s)


def declare(device: str) -> None:
    """What a user adds to a model that calls them."""
    register_fp8_pair(declared_act_quant, declared_fp8_gemm, device=torch.device(device).type)


class DeclaredLinear(KernelLinear):
    """The same over the two functions that `declare` declares."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, scale = declared_act_quant(x.contiguous(), 128)
        return declared_fp8_gemm(values, scale, self.weight, self.scale)
