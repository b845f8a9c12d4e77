"""Kernels that a user declares to be block-scaled FP8: one quantises rows 1 x 128, the other multiplies 128 x 128.

Nothing is read off a kernel's name, and the arithmetic of a Triton, TileLang or CUDA kernel can't be read off a graph.
So the user says what the two compute, and the statement is checked on numbers before it is believed:

    register_fp8_pair(act_quant, fp8_gemm)

- ``act_quant(x[, 128]) -> (values e4m3 [.., K], scales float32 [.., K / 128])``: each scale has to be max|x| / 448 of
  its block, and each value the e4m3 number that is nearest to x / scale.
- ``fp8_gemm(a, a_s, b, b_s) -> [.., N]``: every element has to be the sum over blocks of (a . b) a_s b_s, with every
  block's scale different from all others, odd numbers of rows and a partial last block of N.

A pair that computes something else on these numbers is refused with what differed. What is then replaced by the
operators differs from the kernels by the order of a float32 sum, by ties of one rounding to e4m3, and where a kernel
divides zero by zero: the operators give 0. The numbers can't prove that a kernel does the same at every size; that is
the user's word, and the reason why no kernel is taken without it.

A pair is a pair of custom operators, which stand in a graph under their own name, or of Python functions that launch
kernels. Dynamo would look into a function and find the launch, or fail there: in compiled code its calls with blocks of
128 become calls of an operator that runs it, under every backend; only this one replaces it. Refused: operators that
write their arguments, other signatures, other blocks.
"""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dscompile.lowering.block_scales import BLOCK, FP8, FP8_MAX
from dscompile.lowering.errors import OperatorError

_NAMESPACE = "dsinfra_declared"


class Fp8PairError(OperatorError):
    """Two kernels that were declared to be a block-scaled FP8 pair aren't one, or can't be told apart from others."""


@dataclass(frozen=True)
class Fp8Pair:
    """Two operators, what they were checked on, and how to forget them."""

    quantize: torch._ops.OpOverload | None
    multiply: torch._ops.OpOverload
    device: str

    def remove(self) -> None:
        """Forget the pair: graphs compiled from now on leave its calls as they are."""
        _QUANTIZERS.pop(self.quantize, None)
        _PRODUCTS.pop(self.multiply, None)

    def __enter__(self) -> Fp8Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_QUANTIZERS: dict[torch._ops.OpOverload | None, Fp8Pair] = {}
_PRODUCTS: dict[torch._ops.OpOverload, Fp8Pair] = {}
_STANDING_IN: dict[Callable, torch._ops.OpOverload] = {}  # functions, and the operators that run them in compiled code


def register_fp8_pair(quantize: Any, multiply: Any, *, device: str | None = None) -> Fp8Pair:
    """Declare two kernels as a block-scaled FP8 pair, for every graph that is compiled afterwards.

    Args:
        quantize: `(x [.., K][, 128]) -> (values, scales)`, a custom operator or a Python function; None: there is none
            like it, and only the products are replaced.
        multiply: `(a [.., K], a_s [.., K/128], b [N, K], b_s [ceil(N/128), K/128]) -> [.., N]`, likewise.
        device: where both are checked now; "cuda" if there is one, else "cpu". Calls on other devices are left alone.

    Raises:
        Fp8PairError: one of them computes something else on the numbers of the check, raised there, or is written in a
            form that has no place in a graph.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.no_grad():
        if quantize is not None:
            _checked("quantize", quantize, _check_quantize, where)
        follows = _checked("multiply", multiply, _check_multiply, where)
    first = None if quantize is None else _operator(quantize, "(Tensor x) -> (Tensor, Tensor)", _fake_quantize, 1)
    product = _operator(multiply, "(Tensor a, Tensor a_s, Tensor b, Tensor b_s) -> Tensor", _FakeProduct(follows), 4)
    pair = Fp8Pair(first, product, where.type)
    if first is not None:
        _QUANTIZERS[first] = pair
    _PRODUCTS[product] = pair
    return pair


# ------------------------------------------------------------------ what stands in a graph


def product_of(node: fx.Node) -> Fp8Pair | None:
    """The pair whose product a node calls, or None."""
    overload = _overload(node.target) if node.op == "call_function" else None
    return _PRODUCTS.get(overload) if overload is not None else None


def quantized(node: object, pair: Fp8Pair) -> fx.Node | None:
    """x, where the node is a call of the pair's quantiser as it was checked; else None."""
    found = _operands(node, pair.quantize, (BLOCK,))
    return found[0] if found else None


def operands(node: fx.Node, pair: Fp8Pair) -> list[fx.Node] | None:
    """a, a_s, b, b_s, where the node is a call of the pair's product as it was checked; else None."""
    return _operands(node, pair.multiply, ())


def _operands(node: object, operator: torch._ops.OpOverload | None, checked: tuple[object, ...]) -> list[Any] | None:
    """A call's tensors, where the rest of its arguments is as it was checked: ``checked``, then the defaults."""
    if not isinstance(node, fx.Node) or operator is None or _overload(node.target) is not operator:
        return None
    names = [argument.name for argument in operator._schema.arguments]
    given = {a.name: a.default_value for a in operator._schema.arguments if a.has_default_value()}
    tensors = 1 if checked else 4
    wanted = given | dict(zip(names[tensors:], checked, strict=False))
    given = given | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    same = all(given.get(name) == wanted.get(name) for name in names[tensors:])
    return [given[name] for name in names[:tensors]] if same else None


def _overload(target: object) -> torch._ops.OpOverload | None:
    """A custom operator in any of its spellings; None for anything else."""
    target = getattr(target, "_opoverload", target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = target.default
    return target if isinstance(target, torch._ops.OpOverload) else None


def _operator(kernel: Any, schema: str, fake: Callable, tensors: int) -> torch._ops.OpOverload:
    """The custom operator that stands in graphs for a kernel, which may be one itself."""
    found = _overload(kernel)
    if found is not None:
        if found._schema.is_mutable:
            raise Fp8PairError(f"{found} writes its arguments", "A call can't be replaced then", "Return new tensors")
        return found
    if kernel in _STANDING_IN:
        return _STANDING_IN[kernel]
    if not isinstance(kernel, types.FunctionType):
        raise Fp8PairError(
            f"{kernel!r} is a {type(kernel).__name__}",
            "Only functions and custom operators can be found in a graph",
            "Pass the Python function that launches the kernel",
        )
    text = f"{kernel.__module__}.{kernel.__qualname__}\n{inspect.getsource(kernel)}"
    name = f"{_NAMESPACE}::{kernel.__name__}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    checked = (BLOCK,) if tensors == 1 else ()
    made = torch.library.custom_op(name, lambda *args: kernel(*args, *checked), mutates_args=(), schema=schema)
    made.register_fake(fake)
    _STANDING_IN[kernel] = made._opoverload
    _stand_in(kernel, made._opoverload, tensors, checked)
    return made._opoverload


def _stand_in(
    kernel: types.FunctionType, operator: torch._ops.OpOverload, tensors: int, checked: tuple[int, ...]
) -> None:
    """Makes Dynamo call the operator where a model calls the function as it was checked; other calls stay."""
    plain = types.FunctionType(
        kernel.__code__, kernel.__globals__, kernel.__name__, kernel.__defaults__, kernel.__closure__
    )
    plain.__kwdefaults__ = kernel.__kwdefaults__
    usual = tuple(p.default for p in inspect.signature(kernel).parameters.values())[tensors:]
    wanted = (*checked, *usual[len(checked) :])

    def traced(*args, **kwargs):  # type: ignore[no-untyped-def]
        if len(args) >= tensors and not kwargs and (*args[tensors:], *usual[len(args) - tensors :]) == wanted:
            return operator(*args[:tensors])
        return plain(*args, **kwargs)

    torch.compiler.substitute_in_graph(kernel, skip_signature_check=True)(traced)


def _fake_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=FP8), x.new_empty(*x.shape[:-1], x.shape[-1] // BLOCK, dtype=torch.float32)


@dataclass(frozen=True)
class _FakeProduct:
    """Shape of a product; ``dtype`` None: that of new tensors, which Dynamo guards."""

    dtype: torch.dtype | None

    def __call__(self, a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor) -> Tensor:
        return a.new_empty(*a.shape[:-1], b.shape[0], dtype=self.dtype or torch.get_default_dtype())


# ------------------------------------------------------------------ the check


def _checked(role: str, kernel: Any, check: Callable[[Any, torch.device], Any], device: torch.device) -> Any:
    try:
        return check(kernel, device)
    except Fp8PairError:
        raise
    except Exception as error:
        raise Fp8PairError(
            f"`{role}` raised {type(error).__name__}: {error}",
            f"It can't be checked on {device}",
            "Pass a function of that form, and the device that it runs on",
        ) from error


def _fails(role: str, what: str) -> Fp8PairError:
    change = "Pass None as `quantize`: products alone are replaced then" if role == "quantize" else "Don't register it"
    return Fp8PairError(f"`{role}`: {what}", "Replacing it would change what the model computes", change)


def _check_quantize(quantize: Any, device: torch.device) -> None:
    """Scales of max|x| / 448, values rounded to the nearest, over magnitudes from 1e-6 to 1e6, any rank."""
    numbers = torch.Generator().manual_seed(0)
    for shape in ((5, 3 * BLOCK), (2, 3, 2 * BLOCK), (1, BLOCK)):
        x = torch.randn(shape, generator=numbers).unflatten(-1, (-1, BLOCK))
        x *= 10 ** (12 * torch.rand(x.shape[:-1], generator=numbers).unsqueeze(-1) - 6)
        x = x.flatten(-2).to(torch.bfloat16).to(device)
        values, scales = quantize(x, BLOCK)
        expected = (*shape[:-1], shape[-1] // BLOCK)
        if (values.dtype, values.shape, scales.dtype, scales.shape) != (FP8, x.shape, torch.float32, expected):
            raise _fails("quantize", f"{values.dtype} {list(values.shape)} and {scales.dtype} {list(scales.shape)}")
        x, scales = x.double().unflatten(-1, (-1, BLOCK)), scales.double().unsqueeze(-1)
        if not bool(((scales * FP8_MAX / x.abs().amax(-1, keepdim=True) - 1).abs() < 2**-20).all()):
            raise _fails("quantize", "its scales are not max|x| / 448 of 128 columns")
        exact, values = (x / scales).abs(), values.double().unflatten(-1, (-1, BLOCK))
        step = torch.exp2(exact.clamp_min(2**-6).log2().floor() - 3)
        if not bool(((values * scales - x).abs() <= (0.5 + 2**-10) * step * scales).all()):
            raise _fails("quantize", "its values are not the nearest e4m3 numbers to x / scale")


def _check_multiply(multiply: Any, device: torch.device) -> torch.dtype | None:
    """Every element within the rounding of its dtype; -> the result's dtype, None if it follows the default dtype."""
    numbers, dtype = torch.Generator().manual_seed(1), torch.get_default_dtype()
    for shape, N in (((7, 3 * BLOCK), 200), ((2, 3, 2 * BLOCK), 2 * BLOCK), ((1, 8 * BLOCK), 3 * BLOCK)):
        K = shape[-1]
        a, b = (torch.randn(s, generator=numbers).to(FP8) for s in (shape, (N, K)))
        a_s, b_s = (
            0.5 + torch.rand(s, generator=numbers) for s in ((*shape[:-1], K // BLOCK), (-(-N // BLOCK), K // BLOCK))
        )
        x, w = a.double() * a_s.double().repeat_interleave(BLOCK, -1), _wide(b, b_s)
        exact, size = x @ w.t(), x.abs() @ w.abs().t()
        y = multiply(*(t.to(device) for t in (a, a_s, b, b_s)))
        if y.shape != exact.shape or y.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise _fails("multiply", f"{y.dtype} {list(y.shape)} of {list(shape)} by {[N, K]}")
        bound = torch.finfo(y.dtype).eps * exact.abs() + 2**-11 * size  # Hopper adds FP8 products in 14 bits
        if not bool(((y.double().cpu() - exact).abs() <= bound).all()):
            raise _fails("multiply", "a result is not the sum over blocks of (a . b) a_s b_s")
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    torch.set_default_dtype(other)
    try:
        again = multiply(*(t.to(device) for t in (a, a_s, b, b_s))).dtype
    finally:
        torch.set_default_dtype(dtype)
    return None if (y.dtype, again) == (dtype, other) else y.dtype


def _wide(b: Tensor, b_s: Tensor) -> Tensor:
    spread = b_s.double().repeat_interleave(BLOCK, 0)[: b.shape[0]].repeat_interleave(BLOCK, 1)
    return b.double() * spread
