"""A whole model in the form of DeepSeek's own inference code: `forward(tokens, start_pos)`, with caches of its own.

The attention is `reference_form.ReferenceMLA`; experts are a loop over `bincount(...).tolist()`, which ends Dynamo's
graph; the router masks groups and adds its bias in place. Weights are in 16 bits, or in block-scaled FP8 behind the
two kernels `act_quant` and `fp8_gemm`, which are opaque to every compiler.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo import fp8
from tests.zoo.case import MICRO_SIZE, Example, Precision, Size
from tests.zoo.reference_form import ReferenceMLA, Widths

VOCABULARY = 512
MICRO = Widths(D=128, H=4, Q=128, C=128, N=64, R=32, V=64)
TRUE = Widths(D=1024, H=16, Q=512, C=512, N=128, R=64, V=128)


class Dense(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, D: int, width: int):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(D, width, False), nn.Linear(width, D, False), nn.Linear(D, width, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Router(nn.Module):
    """Sigmoid scores plus a bias choose the best of `groups` and in it the best experts; weights leave the bias out."""

    def __init__(self, D: int, experts: int, top_k: int, groups: int):
        super().__init__()
        self.top_k, self.groups = top_k, groups
        self.weight = nn.Parameter(torch.randn(experts, D) * 0.5)
        self.bias = nn.Parameter(torch.randn(experts) * 0.1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = F.linear(x, self.weight).sigmoid()
        original, scores = scores, scores + self.bias
        scores = scores.view(x.size(0), self.groups, -1)
        best = scores.topk(2, dim=-1)[0].sum(dim=-1).topk(1, dim=-1)[1]
        mask = scores.new_ones(x.size(0), self.groups, dtype=torch.bool).scatter_(1, best, False)
        scores = scores.masked_fill_(mask.unsqueeze(-1), float("-inf")).flatten(1)
        chosen = torch.topk(scores, self.top_k, dim=-1)[1]
        weights = original.gather(1, chosen)
        weights /= weights.sum(dim=-1, keepdim=True)
        return (weights * 2.5).type_as(x), chosen


class Experts(nn.Module):
    """One module an expert, called where the counts on the host say that it has tokens; and a shared one."""

    def __init__(self, D: int, width: int, experts: int = 8, top_k: int = 2):
        super().__init__()
        self.gate = Router(D, experts, top_k, groups=2)
        self.experts = nn.ModuleList(Dense(D, width) for _ in range(experts))
        self.shared = Dense(D, width)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x = x_BSD.view(-1, x_BSD.size(-1))
        weights, chosen = self.gate(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        for number, count in enumerate(counts):
            if count:
                token, place = torch.where(chosen == number)
                y[token] += self.experts[number](x[token]) * weights[token, place, None]
        return (y + self.shared(x)).view(x_BSD.shape)


class Layer(nn.Module):
    def __init__(self, form: str, widths: Widths, experts: bool):
        super().__init__()
        self.attn = ReferenceMLA(form, widths=widths)  # type: ignore[arg-type]
        self.ffn = Experts(widths.D, 128) if experts else Dense(widths.D, 256)
        self.attn_norm, self.ffn_norm = nn.RMSNorm(widths.D), nn.RMSNorm(widths.D)

    def forward(self, x: torch.Tensor, start_pos: int) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), start_pos)
        return x + self.ffn(self.ffn_norm(x))


class ReferenceModel(nn.Module):
    """A dense layer and one of experts."""

    def __init__(self, form: str, widths: Widths):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, widths.D)
        self.layers = nn.ModuleList(Layer(form, widths, experts) for experts in (False, True))
        self.norm, self.head = nn.RMSNorm(widths.D), nn.Linear(widths.D, VOCABULARY, False)

    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h, start_pos)
        return self.head(self.norm(h))


def build(form: str, quantised: bool, precision: Precision, size: Size = MICRO_SIZE) -> nn.Module:
    """The model; `quantised` puts FP8 behind its linear layers, or what FP8 stores where arithmetic is wider."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = precision.settle(ReferenceModel(form, MICRO if size.name == "micro" else TRUE)).eval()
    for name, module in list(model.named_modules()) if quantised else []:
        if isinstance(module, nn.Linear) and name != "head":
            values, scale = fp8.quantized(module.weight.detach().float())
            if precision.working is torch.float32:
                module.weight.data = fp8.dequantized(values, scale)
            else:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, fp8.DeclaredLinear.of(values, scale))
    if quantised:
        fp8.declare(size.device)
    return model.to(size.device)


def example(model: nn.Module, steps: int = 0) -> Example:
    """A prompt of 10 tokens and `steps` single ones behind it."""
    device = model.head.weight.device  # type: ignore[union-attr]
    lengths = (10, *[1] * steps)
    ids = [torch.randint(VOCABULARY, (2, n), generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)]
    first, *rest = [(tokens.to(device), 0 if i == 0 else 9 + i) for i, tokens in enumerate(ids)]
    return Example(model, first, {}, tuple(rest))
