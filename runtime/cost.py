"""What a piece of work costs in microseconds: a measured table first, a roofline for what nobody measured.

    us = launch + max(FLOPs / arithmetic, bytes / bandwidth)          of a kernel
    us = latency + wire bytes / link                                   of an exchange between ranks

Amounts may be sympy expressions in the symbolic sizes of a graph: so is the cost then, and `at` evaluates it. Rates are
what an H100 reaches in practice, not its datasheet. The table is JSON, `{"card": name, "us": {key: microseconds}}`,
where a key is what :func:`key` makes of an operator and its operands; rows of one key are medians of the same kernel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import sympy

Amount: TypeAlias = int | float | sympy.Expr

COMM_SMS = 24  # multiprocessors, of 132, that an exchange of many rows runs on: DeepSeek's in prefill (20 in training)


@dataclass(frozen=True)
class Rates:
    """FLOP/s, bytes/s and microseconds of one card."""

    name: str
    gemm: float  # 16-bit products
    attention: float  # fused attention
    bandwidth: float  # of device memory, read and written together
    link: float  # to other ranks, one direction, at COMM_SMS
    launch: float = 3.0  # us between the starts of two small kernels of one stream
    latency: float = 10.0  # us of an exchange without rows: flags there and back, two launches


# Measured on H100 80GB HBM3 (SXM), torch 2.11.0+cu130: bf16 GEMM 8192^3, causal cuDNN attention at 128 heads x 4096, a
# device copy; stores of a Triton kernel of 24 programs to a peer's memory over NVLink.
H100 = Rates("H100", gemm=798e12, attention=600e12, bandwidth=3.0e12, link=320e9)


class TableError(ValueError):
    """A file that holds no table of costs."""


@dataclass(frozen=True)
class Work:
    """An amount of work; each may be symbolic. `wire`: bytes that leave this rank."""

    flops: Amount = 0
    bytes: Amount = 0
    wire: Amount = 0
    attention: bool = False

    def us(self, rates: Rates = H100) -> Amount:
        """The roofline."""
        if self.wire != 0:
            return rates.latency + self.wire * 1e6 / rates.link
        arithmetic = self.flops * 1e6 / (rates.attention if self.attention else rates.gemm)
        traffic = self.bytes * 1e6 / rates.bandwidth
        if isinstance(arithmetic, sympy.Expr) or isinstance(traffic, sympy.Expr):
            return rates.launch + sympy.Max(arithmetic, traffic)
        return rates.launch + max(arithmetic, traffic)


def at(amount: Amount, sizes: Mapping[sympy.Symbol, int]) -> float:
    """An amount as a number, for these sizes.

    Raises:
        ValueError: a symbol of the amount has no size.
    """
    if not isinstance(amount, sympy.Expr):
        return float(amount)
    missing = amount.free_symbols - set(sizes)
    if missing:
        names = ", ".join(sorted(map(str, missing)))
        raise ValueError(f"the cost {amount} depends on {names}, which has no size here: give a number for each")
    return float(amount.subs(dict(sizes)))


def key(operator: str, operands: Sequence[tuple[Sequence[Any], str]]) -> str:
    """The table's name of a call: operator, then shape and dtype of each tensor: ``mm [4096,7168]bfloat16 ..``."""
    return " ".join([operator, *(f"[{','.join(map(str, shape))}]{dtype}" for shape, dtype in operands)])


@dataclass
class Table:
    """Measured microseconds by :func:`key`, on one card."""

    rates: Rates = H100
    measured: dict[str, float] = field(default_factory=dict)

    def us(self, operator: str, operands: Sequence[tuple[Sequence[Any], str]], **work: Any) -> Amount:
        """What was measured for a call, else the roofline of its `work` (the fields of :class:`Work`)."""
        found = self.measured.get(key(operator, operands))
        return Work(**work).us(self.rates) if found is None else found

    def save(self, file: Path) -> None:
        file.write_text(json.dumps({"card": self.rates.name, "us": self.measured}, indent=1, sort_keys=True))

    @classmethod
    def load(cls, file: Path, rates: Rates = H100) -> Table:
        """Raises TableError for a file that `save` can't have written, or for another card than `rates`."""
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise TableError(f"{str(file)!r} is no readable table of costs ({error}); write it with save().") from None
        measured = found.get("us") if isinstance(found, dict) else None
        if not isinstance(measured, dict) or not all(_is_time(value) for value in measured.values()):
            raise TableError(f'{str(file)!r} is no {{"card": .., "us": {{key: microseconds}}}}; write it with save().')
        if found.get("card") != rates.name:
            raise TableError(
                f"{str(file)!r} was measured on {found.get('card')!r} and costs of {rates.name!r} are wanted: times of "
                "another card would give another schedule. Measure on this card, or pass its rates."
            )
        return cls(rates, {name: float(value) for name, value in measured.items()})


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
