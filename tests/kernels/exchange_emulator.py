"""Builds the exchange kernels for a CPU (exchange_emulator.h) and runs them on simulated ranks, all in this process."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

from dscompile.kernels.exchange import Spec, slot_layout
from dscompile.kernels.exchange_launch import Arrived, Plan, _Job, program

KERNELS = (
    "plan",
    "dispatch_start",
    "dispatch_start_planning",
    "dispatch_wait",
    "release",
    "combine_start",
    "combine_wait",
)
_HERE = Path(__file__).parent


def why_not() -> str | None:
    """None where a C++ compiler is there."""
    return None if shutil.which("g++") else "compile_only: no g++ to build the emulator with"


def build(spec: Spec, folder: Path, edits: dict[str, str] | None = None) -> ctypes.CDLL:
    """Library of the kernels of a spec. edits: text of the kernels -> what takes its place, to plant mistakes."""
    folder.mkdir(parents=True)
    sources, options = program(spec)
    for name in ("exchange.cu", "exchange.cuh"):
        text = sources[name]
        for old, new in (edits or {}).items():
            text = text.replace(old, new)
        (folder / name).write_text(text)
    for old in edits or {}:
        assert any(old in sources[name] for name in ("exchange.cu", "exchange.cuh")), f"not in the kernels: {old}"
    for name in ("sm90.cuh", "peers.cuh"):
        (folder / name).write_text('#include "exchange_emulator.h"\n')
    flags = [option.replace("--define-macro=", "-D") for option in options]
    command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", *flags, f"-I{folder}", f"-I{_HERE}"]
    command += ["-o", str(folder / "exchange.so"), str(_HERE / "exchange_emulator.cpp")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(folder / "exchange.so"))


class _Entry(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("kernel", "ctas", "threads", "overlapped")),
        ("shared", ctypes.c_uint64),
        ("job", ctypes.POINTER(_Job)),
    ]


class World:
    """W ranks with a slot each, and a list of launches each that `run` starts together."""

    def __init__(self, spec: Spec, library: ctypes.CDLL) -> None:
        self.spec, self.library = spec, library
        layout = slot_layout(spec)
        self.memory = [torch.full((layout.total + 128,), 0xFF, dtype=torch.uint8) for _ in range(spec.world)]
        self.bases = [-(-memory.data_ptr() // 128) * 128 for memory in self.memory]
        for base in self.bases:
            ctypes.memset(base, 0, layout.rows)  # channels
        self.records = [torch.zeros(8, dtype=torch.int32) for _ in range(spec.world)]
        self.failed = [torch.zeros(1, dtype=torch.int32) for _ in range(spec.world)]
        self.lists: list[list[_Entry]] = [[] for _ in range(spec.world)]
        self.kept: list[object] = []

    def launch(
        self,
        rank: int,
        name: str,
        *,
        ctas: int = 2,
        warps: int = 2,
        overlapped: bool = False,
        timeout_ns: int = 10**9,
        **fields: object,
    ) -> None:
        """Put a kernel into a rank's list. fields: of the job, tensors by their address."""
        self.kept.append(fields)
        values = {key: value.data_ptr() if isinstance(value, torch.Tensor) else value for key, value in fields.items()}
        job = _Job(
            base=(ctypes.c_void_p * 8)(*self.bases),
            record=self.records[rank].data_ptr(),
            failed=self.failed[rank].data_ptr(),
            timeout_ns=timeout_ns,
            rank=rank,
            slot=3,
            **values,
        )
        room = 1280 + 256 * self.spec.world * 4 + warps * max(self.spec.sender_bytes, self.spec.return_bytes)
        self.lists[rank].append(_Entry(KERNELS.index(name), ctas, 32 * warps, overlapped, room, ctypes.pointer(job)))

    def run(self, seed: int, limit: int = 50_000_000, mistake: int = 0) -> int:
        """Runs all lists and empties them. 0: all ended; 1: not after `limit` switches of threads; 2: trapped."""
        arrays = [(_Entry * len(entries))(*entries) for entries in self.lists]
        pointers = (ctypes.POINTER(_Entry) * len(arrays))(*(ctypes.cast(a, ctypes.POINTER(_Entry)) for a in arrays))
        lengths = (ctypes.c_int * len(arrays))(*map(len, self.lists))
        result = self.library.run_streams(pointers, lengths, len(arrays), seed, ctypes.c_uint64(limit), mistake)
        self.lists, self.kept = [[] for _ in self.lists], []
        return result

    def stage(self, rank: int) -> torch.Tensor:
        """Copy of the rows [M, D] of a rank's stage."""
        spec, layout = self.spec, slot_layout(self.spec)
        dtype = torch.float8_e4m3fn if spec.quantized else getattr(torch, spec.dtype)
        begin = self.bases[rank] - self.memory[rank].data_ptr() + layout.rows
        return self.memory[rank][begin : begin + spec.rows * spec.row_bytes].clone().view(dtype).view(spec.rows, -1)


def empty_plan(spec: Spec, tokens: int) -> Plan:
    """Poisoned."""
    return Plan(torch.full((tokens, spec.world), -77, dtype=torch.int32), torch.full((spec.world,), -77).int())


def empty_arrived(spec: Spec) -> Arrived:
    """Poisoned, its rows to be copied into."""
    m, dtype = spec.rows, torch.float8_e4m3fn if spec.quantized else getattr(torch, spec.dtype)
    return Arrived(
        torch.full((m, spec.width), float("nan")).to(dtype),
        torch.full((spec.blocks, spec.scale_rows), float("nan")) if spec.quantized else None,
        torch.full((m, spec.top_k), -77, dtype=torch.int32),
        torch.full((m, spec.top_k), float("nan")),
        torch.full((m,), -77, dtype=torch.int32),
        torch.full((spec.world,), -77, dtype=torch.int32),
    )
