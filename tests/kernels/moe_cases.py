"""Inputs and plain-PyTorch references of the kernels around the grouped GEMMs: plan, gather, combine, quantise.

References are written for reading, with a sort and loops over k; they take tensors of any device. What must not count
is poisoned: rows of ids outside [0, E) are NaN before they are combined.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny

# name: (tokens, top_k, experts) -> ids [T, K]
PATTERNS = {
    "random": lambda t, k, e: torch.randint(0, e, (t, k)),
    "distinct": lambda t, k, e: torch.stack([torch.randperm(max(e, k))[:k] % e for _ in range(t)]),
    "one expert": lambda t, k, e: torch.full((t, k), e - 1),
    "repeated in a row": lambda t, k, e: torch.randint(0, e, (t, 1)).expand(t, k).contiguous(),
    "some outside": lambda t, k, e: torch.randint(-2, e + 3, (t, k)),
    "all outside": lambda t, k, e: torch.where(torch.rand(t, k) < 0.5, -1, e),
    "ends only": lambda t, k, e: torch.where(torch.rand(t, k) < 0.5, 0, e - 1),
}


def ids(pattern: str, tokens: int, top_k: int, experts: int, device: str = "cpu", dtype: torch.dtype = torch.int64):
    """topk_idx [T, K] after one of PATTERNS, the same for each call."""
    torch.manual_seed(0)
    return PATTERNS[pattern](tokens, top_k, experts).to(device, dtype)


def plan_reference(topk_idx: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """order, position, ends, all int32."""
    inside = (topk_idx >= 0) & (topk_idx < experts)
    key = topk_idx.where(inside, experts).flatten().long()
    order = torch.sort(key, stable=True).indices
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    ends = torch.bincount(key, minlength=experts + 1).cumsum(0)[:experts]
    return order.int(), position.view(topk_idx.shape).int(), ends.int()


def combine_arguments(topk_idx: torch.Tensor, experts: int, columns: int, dtype: torch.dtype) -> tuple:
    """The arguments of `combine`, rows and weights of ids outside poisoned."""
    torch.manual_seed(1)
    order, position, ends = plan_reference(topk_idx, experts)
    z = torch.randn(order.numel(), columns).to(topk_idx.device, dtype)
    z[int(ends[-1]) :] = float("nan")
    weight = torch.rand(topk_idx.shape).to(topk_idx.device)
    weight[(topk_idx < 0) | (topk_idx >= experts)] = float("nan")
    return z, position, weight, topk_idx, experts


def combine_reference(
    z: torch.Tensor, position: torch.Tensor, weight: torch.Tensor, topk_idx: torch.Tensor, experts: int
) -> torch.Tensor:
    """y [T, D] in float64, not rounded."""
    inside = (topk_idx >= 0) & (topk_idx < experts)
    y = z.new_zeros((len(topk_idx), z.shape[1]), dtype=torch.float64)
    for k in range(topk_idx.shape[1]):
        rows = z[position[:, k].long()].double().masked_fill(~inside[:, k, None], 0)
        y += rows * weight[:, k, None].double().masked_fill(~inside[:, k, None], 0)
    return y


def quantize_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [M, K] and scale [ceil(K / 128), M_pad] by the formula in float32."""
    rows, columns = x.shape
    blocks = -(-columns // 128)
    padded = torch.nn.functional.pad(x.float(), (0, blocks * 128 - columns)).view(rows, blocks, 128)
    # By a tensor: on CUDA, PyTorch multiplies by the reciprocal of a plain number.
    scale = padded.abs().amax(2) / torch.full((), 448.0, device=x.device)
    scale = torch.where(scale < SMALLEST_NORMAL, SMALLEST_NORMAL, scale)
    q = (padded / scale[:, :, None]).to(FP8).view(rows, blocks * 128)[:, :columns].contiguous()
    return q, torch.nn.functional.pad(scale.t(), (0, -rows % 4)).contiguous()


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in float32."""
    gate, up = gate_up.float().chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


def steps_apart(q: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """By how many representable values two float8_e4m3fn tensors differ; NaN only equals NaN."""

    def number(x: torch.Tensor) -> torch.Tensor:
        bits = x.view(torch.uint8).int()
        return torch.where(bits > 127, 128 - bits, bits)

    nan = q.float().isnan() != want.float().isnan()
    return (number(q) - number(want)).abs().masked_fill(q.float().isnan() & want.float().isnan(), 0) + 1000 * nan


def representable_rows(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows whose quotients are float8_e4m3fn values: the scale of a block is a power of two, or the block is 0."""
    torch.manual_seed(4)
    q = torch.randint(0, 127, (rows, columns), dtype=torch.uint8) + 128 * torch.randint(0, 2, (rows, columns)).byte()
    q = q.view(FP8).float()
    q[:, ::128] = 448
    scale = 2.0 ** torch.randint(-3, 4, (rows, -(-columns // 128)))
    scale[rows // 2, 0] = 0
    return (q * scale.repeat_interleave(128, 1)[:, :columns]).to(dtype)


def rows_to_quantize(rows: int, columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Normal values of very different sizes by row, with a block of zeros, and a row of one value."""
    torch.manual_seed(2)
    x = torch.randn(rows, columns) * torch.logspace(-3, 3, max(rows, 1))[:rows, None]
    if rows:
        x[rows // 2, :128] = 0
        x[-1] = 3.0
    return x.to(device, dtype)


def activation_arguments(rows: int, columns: int, dtype: torch.dtype, device: str) -> tuple:
    """gate_up [rows, 2 * columns], ends of 5 experts and their bias. The last two rows are no one's, and NaN."""
    torch.manual_seed(5)
    gate_up = (3 * torch.randn(rows, 2 * columns)).to(device, dtype)
    gate_up[-2:] = float("nan")
    ends = torch.tensor([0, 3, 3, 7, rows - 2], dtype=torch.int32, device=device)
    return gate_up, ends, torch.randn(5, 2 * columns).to(device, dtype)


def activation_reference(
    gate_up: torch.Tensor,
    ends: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """h [M, F] in float64, not rounded."""
    rows = torch.arange(len(gate_up), device=gate_up.device)
    if ends is not None:
        gate_up = gate_up.masked_fill((rows >= ends[-1])[:, None], 0)
    if bias is not None:
        expert = torch.searchsorted(ends, rows, right=True).clamp_max(len(ends) - 1)
        gate_up = torch.where((rows >= ends[-1])[:, None], 0, gate_up + bias[expert])
    x = gate_up.double()
    gate, up = (x[:, ::2], x[:, 1::2]) if interleaved else x.chunk(2, 1)
    if activation == "swiglu_oai":
        if limit > 0:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
