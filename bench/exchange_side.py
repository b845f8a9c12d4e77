"""Exchanges of expert parallelism on the GPUs of a host, one process each: what their three benchmarks share.

    torchrun --nproc-per-node 4 -m bench.exchange_side PART [quick]

Each case is checked at its full size, then captured many times over in one CUDA graph on every rank; a time is the
median over replays, of the slowest rank. NCCL's all_to_all_single of the same rows stands beside it, without the plan,
the counts and the meta, which it would need too. Wire bytes are those of rows that leave a rank.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.results import ROOT, check

WIDTH, TOP_K, EXPERTS = 7168, 8, 256
WIRE_GB_S = 350  # that stores between two H100s reach, for the floor that is printed
_SMS = (8, 16, 24, 32, 48, 64)


def run_part(part: str, quick: bool) -> list[dict[str, Any]]:
    """Start a process a GPU for a part; rank 0's rows, after its checks have become this process's."""
    world = 1 << (min(8, torch.cuda.device_count()).bit_length() - 1)  # experts are shared by 2, 4 or 8 ranks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        about = dict(os.environ, WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        about |= {"DSINFRA_BENCH_ROWS": str(path), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, "-m", "bench.exchange_side", part, *(["quick"] if quick else [])]
        ranks = [subprocess.Popen(command, env=about | {"RANK": str(rank)}, cwd=ROOT) for rank in range(world)]
        codes = [process.wait() for process in ranks]
        check(codes == [0] * world, f"{part}: exit statuses {codes}")
        return json.loads(path.read_text())


# In a process of the group


class Side:
    """This rank: its group, inputs of all ranks, and how to time what all ranks do together."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.dist = dist
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.cuda.set_device(self.rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", self.rank))
        self.group = dist.group.WORLD

    def inputs(self, rank: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, D] bf16, topk_idx [T, K], topk_weight of a rank: every rank makes the same."""
        g = torch.Generator("cuda").manual_seed(rank)
        x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16, generator=g)
        ids = torch.rand(tokens, EXPERTS, device="cuda", generator=g).topk(TOP_K, 1).indices
        return x, ids, torch.rand(tokens, TOP_K, device="cuda", generator=g)

    def slowest(self, value: float) -> float:
        held = torch.tensor([value], device="cuda", dtype=torch.float64)
        self.dist.all_reduce(held, op=self.dist.ReduceOp.MAX)
        return held.item()

    def graph_us(self, call: Callable[[], object], calls: int, replays: int = 7) -> float:
        """Microseconds of one of `calls` calls in a graph: median over replays, slowest rank."""
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's threads go on
            for _ in range(calls):
                call()
        return self._median_us(graph.replay, calls, replays)

    def eager_us(self, call: Callable[[], object], calls: int, replays: int = 5) -> float:
        def several() -> None:
            for _ in range(calls):
                call()

        return self._median_us(several, calls, replays)

    def _median_us(self, work: Callable[[], object], calls: int, replays: int) -> float:
        work()
        times = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            self.dist.barrier()
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / calls)
        return self.slowest(statistics.median(times))

    def nccl_us(self, counts: torch.Tensor, row_bytes: int, *, back: bool = False) -> float:
        """all_to_all_single of `counts` rows to each rank, or of as many as came from each back."""
        arriving = torch.empty_like(counts)
        self.dist.all_to_all_single(arriving, counts)
        out, into = (arriving, counts) if back else (counts, arriving)
        sizes = {"input_split_sizes": out.tolist(), "output_split_sizes": into.tolist()}
        source, target = (
            torch.empty(sum(sizes[name]), row_bytes, dtype=torch.uint8, device="cuda")
            for name in ("input_split_sizes", "output_split_sizes")
        )
        return self.eager_us(lambda: self.dist.all_to_all_single(target, source, **sizes), 20)


def exchange_of(side: Side, tokens: int, *, quantized: bool) -> Any:
    """An exchange of its own arena."""
    from dscompile.kernels.exchange import Spec
    from dscompile.runtime.exchange import Exchange
    from dscompile.runtime.symmetric import Arena

    spec = Spec(side.world, tokens, WIDTH, TOP_K, EXPERTS, quantized=quantized)
    return Exchange(Arena(side.group, [spec], timeout_s=10.0, trap=False), 0)


def check_exchange(side: Side, exchange: Any, tokens: int) -> tuple[Any, Any, torch.Tensor]:
    """One exchange at full size against what the ranks' inputs say, bit for bit; (plan, arrived, rows to send back)."""
    from dscompile.kernels.quantize import quantize_1x128

    spec = exchange.slot.spec
    everyone = [side.inputs(rank, tokens) for rank in range(side.world)]
    x, ids, weight = everyone[side.rank]
    plan, arrived = exchange.dispatch(x, ids, weight, copies=False)
    token = arrived.source_token.long()
    used = token >= 0
    owner = torch.arange(side.world, device="cuda").repeat_interleave(spec.capacity)
    want = torch.stack([given[0] for given in everyone])[owner, token.clamp(min=0)]
    all_ids = torch.stack([given[1] for given in everyone])[owner, token.clamp(min=0)]
    here = used[:, None] & (all_ids // spec.local_experts == side.rank)
    local = torch.where(here, all_ids % spec.local_experts, -1)
    check(bool((arrived.ids == local).all()), f"rank {side.rank}: ids")
    went = torch.stack([(ids // spec.local_experts == rank).any(1) for rank in range(side.world)], 1)
    check(bool((plan.counts == went.sum(0)).all()), f"rank {side.rank}: counts {plan.counts.tolist()}")
    rows, expected = arrived.rows, want
    if spec.quantized:
        expected, scale = quantize_1x128(want)
        equal = (arrived.scale == scale) | ~torch.nn.functional.pad(used, (0, scale.shape[1] - len(used)))
        check(bool(equal.all()), f"rank {side.rank}: scales")
    differ = (rows.view(torch.uint8) != expected.view(torch.uint8)).any(1) & used
    first = int(differ.to(torch.int8).argmax())
    what = f"row {first % spec.capacity} of rank {first // spec.capacity} is the first"
    check(not bool(differ.any()), f"rank {side.rank}: {int(differ.sum())} rows differ, {what}")
    y, _ = exchange.combine(want, arrived, plan)
    total = (x.float() * went.sum(1, keepdim=True)).to(torch.bfloat16)
    wrong = (y != total).any(1)
    check(not bool(wrong.any()), f"rank {side.rank}: {int(wrong.sum())} sums differ, {wrong.nonzero()[:3].tolist()}")
    exchange.arena.check()
    return plan, arrived, want


def anchors(part: str, **wanted: Any) -> list[tuple[str, float]]:
    """DeepEP's time of a case, where there is one."""
    table = json.loads((ROOT / "bench" / "anchors" / "exchange.json").read_text())
    rows = [row for row in table[part] if all(row[name] == value for name, value in wanted.items())]
    layout = table["layout_us"] if part == "dispatch" else 0
    what = "layout and dispatch" if part == "dispatch" else "low-latency pair" if part == "pair" else part
    return [(f"DeepEP V1 {what}, anchor table", row["us"] + layout) for row in rows]


def rows_of(case: str, us: float, beside: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"case": case, "us": round(us, 1), "anchor": name, "anchor_us": round(at, 1)} for name, at in beside]


def floor_us(side: Side, exchange: Any, plan: Any, *, back: bool = False) -> float:
    """Time of the bytes that leave the busiest rank, at WIRE_GB_S; back: of as many as arrive."""
    counts = plan.counts.clone()
    if back:
        arriving = torch.empty_like(counts)
        side.dist.all_to_all_single(arriving, counts)
        counts = arriving
    remote = int(counts.sum() - counts[side.rank])
    return side.slowest(exchange.slot.spec.wire_bytes(remote, back=back) / WIRE_GB_S / 1e3)


def dispatch(side: Side, quick: bool) -> list[dict[str, Any]]:
    tokens, rows = 4096, []
    given = side.inputs(side.rank, tokens)
    for quantized in (True, False):
        on_arena, nccl = exchange_of(side, tokens, quantized=quantized), 0.0
        for sms in _SMS:
            exchange = dataclasses.replace(on_arena, sms=sms)
            plan, _, _ = check_exchange(side, exchange, tokens)

            def call(exchange: Any = exchange, given: tuple = given) -> None:
                exchange.dispatch(*given, copies=False)
                exchange.release()

            us = side.graph_us(call, 10 if quick else 30)
            exchange.arena.check()
            nccl = nccl or side.nccl_us(plan.counts, exchange.slot.spec.row_bytes + exchange.slot.spec.scale_bytes)
            name = "fp8" if quantized else "bf16"
            case = f"{name}, {tokens} tokens, {side.world} ranks, {sms} SMs"
            report(side, case, us, floor_us(side, exchange, plan), nccl)
            beside = [("NCCL all_to_all_single of the same rows, same run", nccl)]
            if side.world == 4:
                beside += anchors("dispatch", tokens=tokens, quantized=quantized, sms=sms)
            rows += rows_of(case, us, beside)
    return rows


def combine(side: Side, quick: bool) -> list[dict[str, Any]]:
    tokens, rows, nccl = 4096, [], 0.0
    on_arena = exchange_of(side, tokens, quantized=False)
    for sms in _SMS:
        exchange = dataclasses.replace(on_arena, sms=sms)
        plan, arrived, back = check_exchange(side, exchange, tokens)

        def call(exchange: Any = exchange, given: tuple = (back, arrived, plan)) -> None:
            exchange.combine(*given)

        us = side.graph_us(call, 10 if quick else 30)
        exchange.arena.check()
        nccl = nccl or side.nccl_us(plan.counts, exchange.slot.spec.input_bytes, back=True)
        case = f"bf16, {tokens} tokens, {side.world} ranks, {sms} SMs"
        report(side, f"combine {case}", us, floor_us(side, exchange, plan, back=True), nccl)
        beside = [("NCCL all_to_all_single of the same rows, without the sum, same run", nccl)]
        if side.world == 4:
            beside += anchors("combine", tokens=tokens, sms=sms)
        rows += rows_of(case, us, beside)
    return rows


def low_latency(side: Side, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for tokens in (128,) if quick else (1, 16, 128, 256):
        exchange = exchange_of(side, tokens, quantized=True)
        plan, _, back = check_exchange(side, exchange, tokens)
        given = side.inputs(side.rank, tokens)

        def pair(exchange: Any = exchange, given: tuple = given, back: torch.Tensor = back) -> None:
            plan, arrived = exchange.dispatch(*given, copies=False)
            exchange.combine(back, arrived, plan)

        def alone(exchange: Any = exchange, given: tuple = given) -> None:
            exchange.dispatch(*given, copies=False)
            exchange.release()

        us, dispatch_us = (side.graph_us(call, 20 if quick else 100) for call in (pair, alone))
        exchange.arena.check()
        spec = exchange.slot.spec
        nccl = side.nccl_us(plan.counts, spec.row_bytes + spec.scale_bytes)
        nccl += side.nccl_us(plan.counts, spec.input_bytes, back=True)
        case = f"fp8 dispatch and bf16 combine, {tokens} tokens, {side.world} ranks"
        wire = floor_us(side, exchange, plan) + floor_us(side, exchange, plan, back=True)
        report(side, f"{case} (dispatch and release alone {dispatch_us:.1f} us)", us, wire, nccl)
        beside = [("NCCL all_to_all_single there and back, same rows, same run", nccl)]
        if side.world == 4:
            beside += anchors("pair", tokens=tokens)
        rows += rows_of(case, us, beside)
    return rows


def report(side: Side, case: str, us: float, floor: float, nccl: float) -> None:
    if side.rank == 0:
        speed = floor / us * WIRE_GB_S
        print(f"{case:75} {us:8.1f} us, wire floor {floor:7.1f}, {speed:4.0f} GB/s, NCCL {nccl:7.1f}", flush=True)


def profile(side: Side, quick: bool) -> list[dict[str, Any]]:
    """Times of the single kernels, as the profiler sees them one after the other; no rows."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    for tokens, quantized in ((4096, True), (4096, False), (128, True)):
        exchange = exchange_of(side, tokens, quantized=quantized)
        plan, arrived, back = check_exchange(side, exchange, tokens)
        given = side.inputs(side.rank, tokens)
        side.dist.barrier()
        torch.cuda.synchronize()
        with profiler(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(8):
                exchange.dispatch_start(*given)
                came = exchange.dispatch_wait(tokens, copies=False)
                exchange.combine_start(back, came, tokens)
                exchange.combine_wait(plan)
            torch.cuda.synchronize()
        if side.rank == 0:
            for event in sorted(seen.key_averages(), key=lambda event: event.key):
                mean = event.device_time_total / max(event.count, 1)
                print(f"kernel {event.key[:40]:40} {tokens} tokens, quantized {quantized}: {mean:8.1f} us", flush=True)
    return []


def main(part: str, quick: bool) -> None:
    side = Side()
    rows = {"dispatch": dispatch, "combine": combine, "low_latency": low_latency, "profile": profile}[part](side, quick)
    path = os.environ.get("DSINFRA_BENCH_ROWS")
    if path and side.rank == 0:
        Path(path).write_text(json.dumps(rows))
    side.dist.barrier()
    side.dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], "quick" in sys.argv[2:])
