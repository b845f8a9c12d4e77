"""Why an FP8 product was left as it is, or a 16-bit weight was not quantised: one class a reason."""

from __future__ import annotations

from dscompile.passes.refusals import Refusal


class WrongBlocks(Refusal):
    """FP8 values are scaled in other blocks than 1 x 128 of rows and 128 x 128 of weights."""

    hint = "quantise with weight_block_size [128, 128] and float32 scales"


class PerTensorScale(Refusal):
    """One scale serves a whole FP8 tensor, or was fixed beforehand."""

    hint = "only scales of blocks have kernels here: activation_scheme dynamic, weight_block_size [128, 128]"


class WrongFormat(Refusal):
    """Operands or result of an FP8 product have a format without a kernel."""

    hint = "multiply float8_e4m3fn tensors, and ask for a result of 16 or 32 bits"


class Dequantized(Refusal):
    """The model turns an FP8 weight into a wider dtype and multiplies there."""

    hint = "let the model multiply in FP8: quantising its activations here would change what it computes"


class OpaqueKernel(Refusal):
    """An FP8 tensor is read by a kernel or operator whose arithmetic is not known."""

    hint = (
        "nothing is read off a kernel's name: declare and check it with "
        "dscompile.register_fp8_pair(quantize, multiply), call torch.nn.functional.scaled_mm with "
        "block recipes, or for transformers dscompile.adapters.hf_fp8.install(replace=True)"
    )


class KeptPrecise(Refusal):
    """A layer that ``options={"fp8": ...}`` leaves in 16 bits by design: no fault, also under ``strict``."""

    hint = "nothing to change: FP8 would not pay or would not be safe here"


class GradientWeights(Refusal):
    """Weights are to be quantised in a graph that is differentiated."""

    hint = 'options={"fp8": "block"} is for inference: call the model under torch.no_grad() or torch.inference_mode()'
