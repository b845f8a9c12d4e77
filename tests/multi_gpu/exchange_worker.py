"""What one process of a group does with the exchange kernels on its GPU: rounds against the oracle, replays, a death.

Started once a GPU by torchrun or by tests/multi_gpu/test_exchange.py, with the name of a part:

    torchrun --nproc-per-node 2 -m tests.multi_gpu.exchange_worker rounds

Every rank makes the inputs of all ranks from seeds, so it knows what must come; the oracle of large rounds is computed
on the GPU. A mistake is told with rank, row and content. The exit status is 0 where all is right.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time

import torch
import torch.distributed as dist

from dscompile.kernels.exchange import Spec
from dscompile.runtime.exchange import Exchange
from dscompile.runtime.groups import RankLost, RanksDisagree
from dscompile.runtime.symmetric import Arena
from tests.kernels.exchange_cases import (
    ROUTINGS,
    Inputs,
    combine_reference,
    dispatch_reference,
    explain_rows,
    make_inputs,
    plan_reference,
)
from tests.kernels.moe_cases import quantize_reference

SMALL = dict(capacity=320, width=384, top_k=4)


def begin() -> tuple[int, int]:
    """(rank, world) of this process, with its GPU and its group."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    return rank, world


def say(rank: int, text: str) -> None:
    print(f"[rank {rank}] {text}", flush=True)


def tokens_of(spec: Spec, rank: int, number: int) -> int:
    """Full, one, none, a few, half: differently for each rank and round."""
    choices = (spec.capacity, 1, 0, 7, spec.capacity // 2, min(spec.capacity, 257), min(spec.capacity, 128))
    return choices[(number + 3 * rank) % len(choices)] if number % 4 else spec.capacity


def to_gpu(inputs: Inputs) -> Inputs:
    return Inputs(inputs.x.cuda(), inputs.topk_idx.cuda(), inputs.topk_weight.cuda())


def sent_rows(spec: Spec, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What dispatch is given for tokens x, on the GPU: themselves, or e4m3 and their scale."""
    if not spec.prequantized:
        return x.cuda(), None
    q, scale = quantize_reference(x.float())
    return q.cuda(), scale.cuda()


def results_of(spec: Spec, rank: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up results of the experts of a rank: rows [M, D] to send back, extra [M, K]."""
    g = torch.Generator().manual_seed(number * 64 + rank + 32)
    back = torch.randn(spec.rows, spec.width, generator=g).to(getattr(torch, spec.dtype))
    return back, torch.randn(spec.rows, spec.top_k, generator=g)


def check_round(exchange: Exchange, number: int, routing: str, *, copies: bool, overlapped: bool) -> str | None:
    """One exchange; what is wrong with it, or None."""
    spec, rank = exchange.slot.spec, exchange.arena.rank
    everyone = [make_inputs(spec, r, tokens_of(spec, r, number), routing, number) for r in range(spec.world)]
    sent_back = [results_of(spec, r, number) for r in range(spec.world)]
    mine, (back, extra) = to_gpu(everyone[rank]), (t.cuda() for t in sent_back[rank])
    tokens = len(mine.x)
    x, scale = sent_rows(spec, everyone[rank].x)
    if overlapped:
        plan, arrived = exchange.dispatch(x, mine.topk_idx, mine.topk_weight, copies=copies, scale=scale)
    else:
        plan = exchange.dispatch_start(x, mine.topk_idx, mine.topk_weight, scale=scale)
        arrived = exchange.dispatch_wait(tokens, copies=copies)
    rows = arrived.rows.clone()  # before the stage is freed
    if overlapped:
        y, extra_sum = exchange.combine(back, arrived, plan, extra=extra)
    else:
        exchange.combine_start(back, arrived, tokens, extra=extra)
        y, extra_sum = exchange.combine_wait(plan, extra=True)
    torch.cuda.synchronize()
    exchange.arena.check()

    want_plan, want = plan_reference(spec, everyone[rank].topk_idx), dispatch_reference(spec, everyone, rank)
    for name in ("place", "counts"):
        if not torch.equal(getattr(plan, name).cpu(), getattr(want_plan, name)):
            return f"plan.{name}: {getattr(plan, name).cpu().tolist()[:8]}, not {getattr(want_plan, name).tolist()[:8]}"
    for name in ("counts", "source_token", "ids", "weights"):
        got, wanted = getattr(arrived, name).cpu(), getattr(want, name)
        if not torch.equal(got, wanted):
            at = int((got != wanted).flatten().nonzero()[0])
            return f"{name}[{at}] is {got.flatten()[at].item()}, not {wanted.flatten()[at].item()}"
    found = explain_rows(spec, rows.cpu(), want.rows, want.source_token >= 0, rank)
    if found is None and want.scale is not None and not torch.equal(arrived.scale.cpu(), want.scale):
        at = (arrived.scale.cpu() != want.scale).nonzero()[0].tolist()
        found = f"scale{at} is {arrived.scale[tuple(at)].item()}, not {want.scale[tuple(at)].item()}"
    if found:
        return found
    want_y, want_extra = combine_reference(spec, *map(list, zip(*sent_back)), want_plan, rank)
    found = explain_rows(spec, y.cpu(), want_y, torch.ones(tokens, dtype=torch.bool), rank) if tokens else None
    if found:
        return f"combine: {found}"
    return None if torch.equal(extra_sum.cpu(), want_extra) else "extra_sum"


def small_specs(world: int) -> list[Spec]:
    bf16 = Spec(world=world, experts=8 * world, **SMALL)
    fp16 = dataclasses.replace(bf16, dtype="float16", index="int32", top_k=17, experts=20 * world, width=136)
    fp8 = dataclasses.replace(bf16, quantized=True)
    return [bf16, fp8, fp16, dataclasses.replace(fp8, prequantized=True)]


def rounds(count: int = 60) -> None:
    """Small rounds of all routings on several slots against the full oracle."""
    rank, world = begin()
    specs = small_specs(world)
    arena = Arena(dist.group.WORLD, specs, timeout_s=8.0, trap=False)
    wrong = 0
    names = list(ROUTINGS)
    for number in range(count):
        slot = number % len(specs)
        exchange = Exchange(arena, slot, sms=(None, 1, 3, 16)[number // 3 % 4])
        routing = names[number // len(specs) % len(names)]
        copies, overlapped = bool(number // 2 % 2), bool(number // 5 % 2)
        found = check_round(exchange, number, routing, copies=copies, overlapped=overlapped)
        if found:
            wrong += 1
            say(rank, f"round {number}, slot {slot}, {routing}, copies {copies}, overlapped {overlapped}: {found}")
        if wrong > 3:
            break
    say(rank, f"rounds: {wrong} of {number + 1} wrong")
    end(wrong == 0)


def _large(world: int) -> Spec:
    return Spec(world, 512, 2048, 8, 32 * world)


class Fingerprint:
    """Routing and payload of a round made on the GPU alone, and its check there, so that rounds follow fast."""

    def __init__(self, spec: Spec, rank: int) -> None:
        self.spec, self.rank = spec, rank
        self.bad = torch.zeros(4, dtype=torch.int64, device="cuda")  # rows, ids, sums, rounds
        self.first = torch.full((6,), -1, dtype=torch.int64, device="cuda")  # of the first wrong row
        self.step = torch.zeros((), dtype=torch.int64, device="cuda")
        self.expert = torch.arange(spec.experts, device="cuda")

    def ids(self, rank: int) -> torch.Tensor:
        """topk_idx [T, K] of a rank in this step: distinct experts by a hash of step, rank, token; some tokens none."""
        spec = self.spec
        token = torch.arange(spec.capacity, device="cuda")
        mixed = (token * 7919 + self.step * 104729 + rank * 1299709) * 2654435761 % 2**31
        start = mixed // 7 % spec.experts
        jump = mixed // 1009 % 5 + 1  # five ways to spread a token's experts over the ranks
        ids = (start[:, None] + torch.arange(spec.top_k, device="cuda")[None] * jump[:, None]) % spec.experts
        return torch.where((mixed % 11 == 0)[:, None], -1, ids)

    def x(self, rank: int) -> torch.Tensor:
        """[T, D] bf16: every column a small integer of step, rank, token and column."""
        spec = self.spec
        token = torch.arange(spec.capacity, device="cuda")[:, None]
        column = torch.arange(spec.width, device="cuda")[None]
        return ((token * 31 + column * 17 + rank * 101 + self.step * 13) % 251).to(torch.bfloat16)

    def round(self, exchange: Exchange) -> None:
        spec, rank = self.spec, self.rank
        self.step += 1
        ids = self.ids(rank)
        weight = (ids + 1).float()
        x = self.x(rank)
        plan, arrived = exchange.dispatch(x, ids, weight, copies=False)
        owner = torch.arange(spec.world, device="cuda").repeat_interleave(spec.capacity)
        token = arrived.source_token.long()
        used = token >= 0
        everyone = torch.stack([self.x(r) for r in range(spec.world)])
        want = everyone[owner, token.clamp(min=0)]
        wrong = used & (arrived.rows != want).any(1)
        self.bad[0] += wrong.sum()
        at = wrong.to(torch.int8).argmax(0, keepdim=True)  # a number would be read by the host
        values = arrived.rows[at][:, 0].long(), want[at][:, 0].long()
        told = torch.cat([self.step[None], owner[at], at % spec.capacity, token[at], *values])
        self.first.copy_(torch.where((self.first[0] < 0) & wrong.any(), told, self.first))
        all_ids = torch.stack([self.ids(r) for r in range(spec.world)])[owner, token.clamp(min=0)]
        here = used[:, None] & (all_ids >= 0) & (all_ids // spec.local_experts == rank)
        want_ids = torch.where(here, all_ids - rank * spec.local_experts, -1)
        want_weights = torch.where(here, (all_ids + 1).float(), 0.0)
        self.bad[1] += ((arrived.ids != want_ids) | (arrived.weights != want_weights)).any(1).sum()
        y, _ = exchange.combine(arrived.rows * 1.0, arrived, plan)
        reached = torch.where(ids >= 0, ids // spec.local_experts, -1)
        count = torch.stack([(reached == r).any(1) for r in range(spec.world)]).sum(0)
        want_y = (x.float() * count[:, None]).to(torch.bfloat16)
        self.bad[2] += (y != want_y).any(1).sum()
        self.bad[3] += 1

    def tell(self, what: str) -> bool:
        rows, ids, sums, done = self.bad.tolist()
        step, source, place, token, got, want = self.first.tolist()
        say(self.rank, f"{what}: {done} rounds; wrong rows {rows}, ids {ids}, sums {sums}")
        if step >= 0:
            say(self.rank, f"  first: step {step}, from rank {source}, place {place}, token {token}: {got}, not {want}")
        return rows == ids == sums == 0


def load(count: int = 1000) -> None:
    """Many rounds in a row without a host synchronisation, eager, then as replays of a captured graph."""
    rank, world = begin()
    spec = _large(world)
    few = dataclasses.replace(spec, capacity=128)
    arena = Arena(dist.group.WORLD, [spec, few], timeout_s=10.0, trap=False)
    fine = True
    for slot, name in ((0, "many"), (1, "few")):
        exchange = Exchange(arena, slot)
        check = Fingerprint(exchange.slot.spec, rank)
        begin_s = time.time()
        for number in range(count):
            check.round(exchange)
            if number % 100 == 99:
                torch.cuda.synchronize()
                arena.check()
        fine &= check.tell(f"eager, {name} tokens, {time.time() - begin_s:.1f} s")
        replayed = Fingerprint(exchange.slot.spec, rank)
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            replayed.round(exchange)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # NCCL's threads go on
                replayed.round(exchange)
        dist.barrier()
        begin_s = time.time()
        for number in range(count):
            graph.replay()
            if number % 100 == 99:
                torch.cuda.synchronize()
                arena.check()
        torch.cuda.synchronize()
        arena.check()
        fine &= replayed.tell(f"graph, {name} tokens, {time.time() - begin_s:.1f} s")
        del graph
    end(fine)


def death() -> None:
    """The last rank leaves after three rounds: the others must name it, in time, both with and without trap."""
    rank, world = begin()
    spec = small_specs(world)[0]
    try:
        Arena(dist.group.WORLD, [dataclasses.replace(spec, capacity=8 + rank)])
        say(rank, "WRONG: no error about different capacities")
        os._exit(1)
    except RanksDisagree as error:
        say(rank, f"mismatch: {error}")
    gentle = Exchange(Arena(dist.group.WORLD, [spec], timeout_s=3.0, trap=False), 0)
    hard = Exchange(Arena(dist.group.WORLD, [spec], timeout_s=3.0, trap=True), 0)
    for exchange in (gentle, hard):
        for number in range(3):
            found = check_round(exchange, number, "uniform", copies=True, overlapped=True)
            if found:
                say(rank, f"WRONG before the death: {found}")
                os._exit(1)
    dist.barrier()
    torch.cuda.synchronize()
    if rank == world - 1:
        say(rank, "dies")
        sys.stdout.flush()
        os._exit(0)
    fine = all([name_of_dead(gentle, rank, world, traps=False), name_of_dead(hard, rank, world, traps=True)])
    sys.stdout.flush()
    os._exit(0 if fine else 1)


def name_of_dead(exchange: Exchange, rank: int, world: int, *, traps: bool) -> bool:
    """Whether an exchange with a dead rank ends in time with an error that names it."""
    mine = to_gpu(make_inputs(exchange.slot.spec, rank, 64, "uniform", 9))
    begin_s, raised = time.time(), ""
    try:
        exchange.dispatch(mine.x, mine.topk_idx, mine.topk_weight, copies=True)
        torch.cuda.synchronize()
    except RuntimeError as error:
        raised = str(error).splitlines()[0]
    seconds = time.time() - begin_s
    try:
        exchange.arena.check()
    except RankLost as error:
        say(rank, f"trap {traps}: after {seconds:.1f} s, CUDA said {raised!r}; we say: {error}")
        return error.rank == world - 1 and seconds < 10 and bool(raised) == traps
    say(rank, f"WRONG: no timeout, trap {traps}, after {seconds:.1f} s, CUDA said {raised!r}")
    return False


def end(fine: bool) -> None:
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()
    if not fine:
        sys.exit(1)


if __name__ == "__main__":
    {"rounds": rounds, "load": load, "death": death}[sys.argv[1]](*map(int, sys.argv[2:]))
