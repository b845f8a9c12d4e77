"""A whole model through the backend: prefill and greedy decoding of a small DeepSeek-V3, compared with eager.

The model is transformers' own, unmodified, with random weights; `generate()` is told the backend through its
`CompileConfig`, as a user would tell it. On a CPU the weights are float32 and every token must equal eager's. With a
CUDA device the widths are DeepSeek's own (latent 512, rope 64, heads of 128), the weights bfloat16, the logits must be
no more than twice as far from a float32 run as eager's are, and one decoding step is timed beside Inductor's, both in
the mode `reduce-overhead`.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, PreTrainedModel, StaticCache

from dscompile import report
from dscompile._entry import BACKEND_NAME

NEW_TOKENS = 32

# Small enough for two CPU cores; one dense layer, then mixture-of-experts layers.
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # every run yields the same number of tokens
    "initializer_range": 0.1,  # wide enough that random weights do not repeat one token for ever
}

# The head widths of DeepSeek-V3, which the Hopper kernels are written for, in a model that fits any card.
TRUE_WIDTHS: dict[str, Any] = SMALL | {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Setting:
    """What the demo runs on one kind of device."""

    device: str
    dtype: torch.dtype
    config: dict[str, Any]
    requests: int
    prompt: int  # tokens


CPU = Setting("cpu", torch.float32, SMALL, requests=2, prompt=16)
CUDA = Setting("cuda", torch.bfloat16, TRUE_WIDTHS, requests=16, prompt=2048)


def build(model_type: str, config: dict[str, Any], device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of transformers with random weights, the same for the same arguments, ready for inference."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=dtype)
    return model.to(device).eval()


def example(
    model_type: str, changes: dict[str, Any], *, decode: bool = False
) -> tuple[PreTrainedModel, tuple[torch.Tensor], dict[str, Any]]:
    """A small model and the arguments of one call: (model, args, kwargs).

    The call is a prompt of [2, 16] tokens, or with `decode` one token of each request against a filled static cache.
    `changes` replaces fields of the configuration.
    """
    setting = CUDA if torch.cuda.is_available() else CPU
    model = build(model_type, setting.config | changes, setting.device, setting.dtype)
    ids_BS = _prompt(model, requests=2, length=16)
    if not decode:
        return model, (ids_BS,), {"use_cache": False}
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(ids_BS, past_key_values=cache)
    return model, (ids_BS[:, -1:],), {"past_key_values": cache}


def _prompt(model: PreTrainedModel, requests: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    # Token 0 pads; a prompt has none, so that no attention mask is needed.
    return torch.randint(3, model.config.vocab_size, (requests, length), generator=generator).to(model.device)


def static_cache(model: PreTrainedModel, ids_BS: torch.Tensor, tokens: int) -> StaticCache:
    """An empty cache for the prompts and `tokens` more, its tensors made.

    A cache makes them at its first use; inside compiled code it can't mark their addresses as static, and without that
    CUDA graphs are given up.
    """
    cache = StaticCache(config=model.config, max_cache_len=ids_BS.shape[1] + tokens)
    with torch.no_grad():
        model(ids_BS[:, :1], past_key_values=cache)
    cache.reset()
    return cache


def generate(
    model: PreTrainedModel,
    ids_BS: torch.Tensor,
    backend: str | None,
    tokens: int = NEW_TOKENS,
    cache: StaticCache | None = None,
) -> Any:
    """transformers' `generate()`, greedy, with a static cache: eager, or compiled by `backend` (prefill and decoding).

    Left to itself, `generate()` compiles decoding alone, and only on accelerators: a prefill in one chunk of the whole
    prompt is compiled as well, and the configuration's own switch makes it compile on a CPU. A `cache` given is used
    from its beginning.
    """
    cache = cache or static_cache(model, ids_BS, tokens)
    cache.reset()
    options: dict[str, Any] = {"disable_compile": True, "past_key_values": cache}
    if backend is not None:
        config = CompileConfig(backend=backend, mode="reduce-overhead")
        config._compile_all_devices = True
        options |= {"compile_config": config, "disable_compile": False, "prefill_chunk_size": ids_BS.shape[1]}
    return model.generate(
        ids_BS,
        attention_mask=torch.ones_like(ids_BS),
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def equal_tokens(ours: Any, eager: Any) -> bool:
    """Whether two results of `generate` hold the same tokens throughout."""
    return torch.equal(ours.sequences, eager.sequences)


def logit_error(run: Any, reference: Any) -> float:
    """Relative error of the median token's logits beside the reference's, both results of `generate`.

    Counted at every step of a request up to and including the first where the tokens part: after it the two continue
    different texts. The median, because a token near a tie between two experts may go either way in half precision.
    """
    steps = len(reference.logits)
    same_BT = run.sequences[:, -steps:] == reference.sequences[:, -steps:]
    before_BT = torch.cat([torch.ones_like(same_BT[:, :1]), same_BT[:, :-1]], dim=1)
    counted_BT = before_BT.cumprod(dim=1).bool()
    ours_BTV, exact_BTV = (torch.stack(result.logits, 1).double() for result in (run, reference))
    errors_BT = (ours_BTV - exact_BTV).norm(dim=-1) / exact_BTV.norm(dim=-1)
    return float(errors_BT[counted_BT].median())


def step_microseconds(model: PreTrainedModel, ids_BS: torch.Tensor, backend: str, repeats: int = 5) -> float:
    """Median time of one decoding step inside `generate()`: a long run minus a one-token run, shared over the steps."""

    # One cache for all runs: another length would be another shape, and other addresses another CUDA graph.
    cache = static_cache(model, ids_BS, NEW_TOKENS + 1)

    def seconds(tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        generate(model, ids_BS, backend, tokens, cache)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):  # compiles, records the CUDA graphs, replays them once
        seconds(NEW_TOKENS + 1)
    return statistics.median((seconds(NEW_TOKENS + 1) - seconds(1)) / NEW_TOKENS * 1e6 for _ in range(repeats))


def main(backend: str = BACKEND_NAME) -> int:
    """Run the demo and print what happened; 0 when the results are eager's."""
    setting = CUDA if torch.cuda.is_available() else CPU
    model = build("deepseek_v3", setting.config, setting.device, setting.dtype)
    ids_BS = _prompt(model, setting.requests, setting.prompt)
    print(
        f"{type(model).__name__}, {model.config.num_hidden_layers} layers, {setting.dtype} on {setting.device}; "
        f"{setting.requests} prompts of {setting.prompt} tokens, {NEW_TOKENS} new ones each; backend {backend!r}"
    )
    eager = generate(model, ids_BS, None)
    exact = eager if setting.dtype == torch.float32 else generate(copy.deepcopy(model).float(), ids_BS, None)
    report.clear()
    start = time.perf_counter()
    ours = generate(model, ids_BS, backend)
    print(f"first compiled call, compilation included: {time.perf_counter() - start:.1f} s\n")
    if backend == BACKEND_NAME:
        print(f"{report.table(report.reports())}\n")
    good = _judge_tokens(ours, eager) if exact is eager else _judge_logits(ours, eager, exact)
    if setting.device == "cuda":
        _print_speed(model, ids_BS, backend)
    return 0 if good else 1


def _judge_tokens(ours: Any, eager: Any) -> bool:
    if equal_tokens(ours, eager):
        print(f"tokens: all {len(eager.logits) * len(eager.sequences)} equal eager's")
        return True
    request, position = (ours.sequences != eager.sequences).nonzero()[0].tolist()
    print(f"tokens DIFFER from eager's, first in request {request} at position {position}")
    return False


def _judge_logits(ours: Any, eager: Any, exact: Any) -> bool:
    """In bfloat16 rounding alone decides near ties, of tokens and of experts: logits are compared with float32's."""
    own, usual = logit_error(ours, exact), logit_error(eager, exact)
    good = own <= 2 * usual
    verdict = "as near to float32's as eager's" if good else "FARTHER from float32's than eager's"
    alike = "all" if equal_tokens(ours, eager) else "not all"
    print(
        f"logits {verdict}: relative error of the median token {own:.2e}, eager {usual:.2e}; "
        f"tokens {alike} equal eager's"
    )
    return good


def _print_speed(model: PreTrainedModel, ids_BS: torch.Tensor, backend: str) -> None:
    times = {}
    for name in dict.fromkeys((backend, "inductor")):
        torch._dynamo.reset()
        times[name] = step_microseconds(model, ids_BS, name)
        print(f"one decoding step with {name}: {times[name]:,.0f} us")
    print(f"{torch.cuda.get_device_name()}: {times['inductor'] / times[backend]:.2f} times Inductor's speed")
