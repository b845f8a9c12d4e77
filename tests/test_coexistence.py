"""Beside everything else in a process: threads, other backends, resets, copies, transforms and unusual inputs."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dscompile import report
from dscompile.passes import fp8_prepared
from tests.passes.toy import C, D, H, N, R, S, Toy, randn, sdpa, stack, toy

EAGER = {"inner": "eager"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    report.clear()
    yield
    torch._dynamo.reset()


def compiled(module: Any, inner: str = "eager", **settings: Any) -> Callable:
    return torch.compile(module, backend="dsinfra", options={"inner": inner}, **settings)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def lowered() -> int:
    return sum(r.op_counts.get("mla", 0) + r.op_counts.get("mla_decode", 0) for r in report.reports())


# ------------------------------------------------------------------ threads

THREADS, ROUNDS = 4, 2


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """`work(i)` of each thread, all begun at once; raises what one of them raised."""
    barrier = threading.Barrier(THREADS)

    def run(i: int) -> Any:
        barrier.wait()
        with torch.no_grad():  # the mode is the thread's own
            return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def test_threads_compile_different_models() -> None:
    """Stacks of 1, 2, 3 and 4 layers: a report that took a site from another thread's has the wrong number."""
    for trial in range(ROUNDS):
        torch._dynamo.reset()
        report.clear()
        models = [stack(*(lambda i=i, k=k: Toy(10 * i + k) for k in range(i + 1)))() for i in range(THREADS)]
        x = randn(2, S, D, seed=trial)
        for found, model in zip(in_threads(lambda i, models=models, x=x: compiled(models[i])(x)), models, strict=True):
            same(found, model(x))
        reports = report.reports()
        assert sorted(r.op_counts["mla"] for r in reports) == [1, 2, 3, 4]
        for one in reports:
            assert len(one.sites) == one.op_counts["mla"] and not one.error
            assert len({site.module_path for site in one.sites}) == len(one.sites)


def test_threads_share_one_compiled_model() -> None:
    model = stack(Toy, lambda: Toy(1))()
    call, inputs = compiled(model), [randn(2, S + i, D, seed=i) for i in range(THREADS)]
    for _ in range(ROUNDS):
        for found, x in zip(in_threads(lambda i: call(inputs[i])), inputs, strict=True):
            same(found, model(x))
    assert lowered() == 2 * len(report.reports())


def test_threads_train() -> None:
    models = [Toy(i) for i in range(THREADS)]  # here: their weights come from the generator that threads share

    def work(i: int) -> list[torch.Tensor]:
        with torch.enable_grad():
            compiled(models[i], "aot_eager")(randn(2, S, D)).square().sum().backward()
        return [p.grad for p in models[i].parameters()]

    for i, gradients in enumerate(in_threads(work)):
        model = Toy(i)
        model(randn(2, S, D)).square().sum().backward()
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()], rtol=1e-9, atol=1e-11)


def test_threads_share_prepared_weights() -> None:
    """FP8 copies are kept per weight: several threads make them, use them, and find the weight changed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)).bfloat16().eval()
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    calls = [torch.compile(model, backend="dsinfra", options={"inner": "eager", "fp8": "block"}) for _ in range(2)]
    for trial in range(8):
        results = in_threads(lambda i: calls[i % 2](x))
        assert all(torch.equal(results[0], other) for other in results), f"round {trial}"
        expected = model(x).float()
        assert (results[0].float() - expected).norm() <= 0.1 * expected.norm(), f"round {trial}"
        with torch.no_grad():
            model[0].weight.mul_(-1.5)
    assert len(fp8_prepared._COPIES[model[0].weight]) == 1


def test_threads_forget_and_prepare() -> None:
    """Marking copies as out of date goes through all of them while other threads add some."""
    stop, weights = threading.Event(), [nn.Parameter(torch.ones(8, 8)) for _ in range(400)]
    failures: list[BaseException] = []

    def forget() -> None:
        while not stop.is_set():
            try:
                fp8_prepared.refresh()
            except RuntimeError as error:  # a dictionary that changed while it was read
                failures.append(error)

    thread = threading.Thread(target=forget)
    thread.start()
    for weight in weights:
        fp8_prepared.copy_of("test", lambda w: (w * 2,), [weight])
    stop.set()
    thread.join()
    assert not failures, failures[0]


# ------------------------------------------------------------------ other backends


def test_one_module_behind_several_backends() -> None:
    model, x = Toy(), randn(2, S, D)
    with torch.no_grad():
        calls = [torch.compile(model, backend=b) for b in ("aot_eager", "eager")] + [compiled(model)]
        for call in [*calls, *reversed(calls)]:
            same(call(x), model(x))
    assert lowered() == 1


def test_a_function_of_another_backend_inside() -> None:
    """Dynamo inlines it, so it is compiled by the outer backend; behind a graph break it stays with its own."""
    inner = torch.compile(Toy(), backend="aot_eager")
    held = torch.compiler.disable(torch.compile(Toy(2), backend="aot_eager"))

    def outer(x: torch.Tensor) -> torch.Tensor:
        return held(inner(x) + 1) * 2

    x = randn(2, S, D)
    with torch.no_grad():
        same(compiled(outer)(x), Toy(2)(Toy()(x) + 1) * 2)
    assert lowered() == 1 and len(report.reports()) == 2


def test_a_layer_behind_a_disabled_region() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Toy(), Toy(1)
            self.second.forward = torch.compiler.disable(self.second.forward)  # type: ignore[method-assign]
            self.third = Toy(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(self.second(self.first(x)))

    model, x = Model(), randn(2, S, D)
    with torch.no_grad():
        same(compiled(model)(x), model(x))
    assert lowered() == 2


def test_our_layers_in_another_backends_model() -> None:
    """One layer is ours, the rest of the model is compiled by another backend around it."""
    model, x = stack(Toy, lambda: Toy(1))(), randn(2, S, D)
    with torch.no_grad():
        expected = model(x)
        model.layers[0].compile(backend="dsinfra", options=EAGER)
        same(torch.compile(model, backend="aot_eager")(x), expected)
        same(model(x), expected)
    assert lowered() == 1


@pytest.mark.parametrize("compiled_step", [False, True], ids=["optimizer", "compiled optimizer"])
def test_a_training_loop(compiled_step: bool) -> None:
    """Ours forward and backward, the optimizer's step in eager mode or another backend's; the weights agree."""
    results = []
    for ours in (False, True):
        model = Toy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        call = compiled(model, "aot_eager") if ours else model
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled_step else optimizer.step
        for i in range(3):
            optimizer.zero_grad()
            call(randn(2, S, D, seed=i)).square().sum().backward()
            step()
        results.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-9)
    assert sum(r.op_counts.get("mla", 0) for r in report.reports()) == 1


def test_compiled_autograd() -> None:
    model, x = Toy(), randn(2, S, D)
    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled(model, "aot_eager")(x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()], rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------ reset, copies, export


@pytest.mark.parametrize("options", [EAGER, {"inner": "aot_eager"}, {"inner": "eager", "fp8": "block"}], ids=str)
def test_reset_gives_the_model_back(options: dict[str, Any]) -> None:
    wide = options.get("fp8") is not None
    model: nn.Module = nn.Linear(128, 128, dtype=torch.bfloat16) if wide else Toy()
    x = torch.randn(4, 128, dtype=torch.bfloat16) if wide else randn(2, S, D)
    call = torch.compile(model, backend="dsinfra", options=options)
    with torch.no_grad():
        first = call(x)
        torch._dynamo.reset()
        assert torch.equal(call(x), first) and len(report.reports()) == 2  # compiled again
    gone = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    torch._dynamo.reset()
    del model, call
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_copies_of_a_compiled_model() -> None:
    """A deep copy has weights of its own; a state_dict has no trace of us but torch's own prefix."""
    model, x = Toy(), randn(2, S, D)
    call = compiled(model)
    with torch.no_grad():
        expected = call(x)
        twin = copy.deepcopy(call)
        model.q.weight.zero_()
        same(twin(x), expected)
        same(call(x), model(x))
    buffer = io.BytesIO()
    torch.save(call.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert {name.removeprefix("_orig_mod.") for name in loaded} == set(model.state_dict())
    fresh_model = Toy(3)
    torch.compile(fresh_model, backend="dsinfra", options=EAGER).load_state_dict(loaded)
    assert torch.equal(fresh_model.q.weight, model.q.weight)


def test_a_model_compiled_in_place_is_pickled() -> None:
    model, x = Toy(), randn(2, S, D)
    model.compile(backend="dsinfra", options=EAGER)
    with torch.no_grad():
        expected = model(x)
        restored = pickle.loads(pickle.dumps(model))
        same(restored(x), expected)


def test_export_knows_nothing_of_us() -> None:
    model, x = Toy().eval(), randn(2, S, D)
    with torch.no_grad():
        compiled(model)(x)
        program = torch.export.export(model, (x,))
        same(program.module()(x), model(x))
        assert not any("dsinfra" in str(node.target) for node in program.graph.nodes)
        same(compiled(program.module())(x), model(x))  # and what was exported can be compiled
    assert lowered() == 2


# ------------------------------------------------------------------ unusual inputs


def traced_by_torch(model: nn.Module, x: torch.Tensor) -> None:
    """Skips where the oldest torch can't trace the call for any backend: nothing of ours runs then."""
    try:
        with torch.no_grad():
            torch.compile(model, backend="eager")(x)
    except Exception as error:
        if not torch.__version__.startswith("2.11."):
            raise
        pytest.skip(f"versions: Dynamo of torch {torch.__version__} can't trace it: {type(error).__name__}")
    finally:
        torch._dynamo.reset()


class Wrapped(torch.Tensor):
    """A subclass that does nothing of its own."""


def test_a_tensor_subclass() -> None:
    model, x = Toy(), randn(2, S, D)
    traced_by_torch(model, x.as_subclass(Wrapped))
    with torch.no_grad():
        found = compiled(model)(x.as_subclass(Wrapped))
    same(found.as_subclass(torch.Tensor), model(x))
    assert not any(r.error for r in report.reports())


class TwoTensor(torch.Tensor):
    """Pairs of tensors, by the protocol of traceable wrapper subclasses."""

    @staticmethod
    def __new__(cls, a: torch.Tensor, b: torch.Tensor) -> TwoTensor:
        return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype, strides=a.stride())

    def __init__(self, a: torch.Tensor, b: torch.Tensor):
        self.a, self.b = a, b

    def __repr__(self) -> str:  # torch's own traces print inputs, also where no operator may run
        return "TwoTensor"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["a", "b"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, context: None, size: Any, stride: Any) -> TwoTensor:
        return TwoTensor(inner["a"], inner["b"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def pick(name: str) -> Any:
            return torch.utils._pytree.tree_map_only(TwoTensor, lambda t: getattr(t, name), (args, kwargs or {}))

        (args_a, kwargs_a), (args_b, kwargs_b) = pick("a"), pick("b")
        a, b = function(*args_a, **kwargs_a), function(*args_b, **kwargs_b)
        return torch.utils._pytree.tree_map(lambda x, y: TwoTensor(x, y) if isinstance(x, torch.Tensor) else x, a, b)


def test_a_wrapper_subclass_is_left_alone() -> None:
    model, a, b = Toy(), randn(2, S, D), randn(2, S, D, seed=5)
    with torch.no_grad():
        found = compiled(model, "aot_eager")(TwoTensor(a, b))
        same(found.a, model(a))
        same(found.b, model(b))
    (one,) = report.reports()
    assert one.op_counts.get("mla", 0) == 0 and "TwoTensor" in str(one)


@pytest.fixture
def one_rank() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def plain_parts(self: Toy, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Toy's, without rotation: its table is no distributed tensor, and is made on the CPU."""
    q_nope, q_rope = self.q(x).view(*x.shape[:2], H, N + R).transpose(1, 2).split([N, R], -1)
    latent, k_rope = self.a(x).split([C, R], -1)
    return q_nope, q_rope, latent, k_rope.unsqueeze(1)


# Products of torch 2.11 flatten heads into requests, which its sharded tensors refuse.
PLACEMENT = Replicate() if torch.__version__.startswith("2.11.") else Shard(0)


def test_distributed_tensors_are_left_alone(one_rank: DeviceMesh) -> None:
    changed = toy(parts=plain_parts, attend=lambda self, q, k, v: torch.softmax(q @ k.mT, -1) @ v)
    model, spread, x = changed(), changed(), randn(2, S, D)
    for layer in (spread.q, spread.a, spread.b, spread.o):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), one_rank, [PLACEMENT]))
    with torch.no_grad():
        found = compiled(spread, "aot_eager")(distribute_tensor(x, one_rank, [Replicate()]))
        same(found.full_tensor(), model(x))
        assert "DTensor" in str(report.reports()[0]) and lowered() == 0
        same(compiled(model)(x), model(x))
    assert lowered() == 1


def test_meta_tensors() -> None:
    model = Toy().to("meta")
    with torch.no_grad(), torch.device("meta"):
        assert compiled(model)(torch.empty(2, S, D, device="meta", dtype=torch.float64)).shape == (2, S, D)


def test_in_a_fake_mode() -> None:
    with FakeTensorMode() as mode, torch.no_grad():
        model = Toy()
        assert compiled(model)(mode.from_tensor(randn(2, S, D))).shape == (2, S, D)


def test_several_devices() -> None:
    """A tensor of another device passes through; nothing of it is read."""
    model, x = Toy(), randn(2, S, D)

    def run(x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model(x), other + 1

    with torch.no_grad():
        found, other = compiled(run)(x, torch.empty(3, device="meta"))
    same(found, model(x))
    assert other.device.type == "meta" and lowered() == 1


@pytest.mark.parametrize("shape", [(0, S, D), (2, 0, D), (0, 0, D)], ids=str)
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_no_tokens(shape: tuple[int, ...], dynamic: bool | None) -> None:
    model = Toy()
    with torch.no_grad():
        assert compiled(model, "aot_eager", dynamic=dynamic)(randn(*shape)).shape == shape


def test_a_graph_without_tensors() -> None:
    def run(n: int, x: torch.Tensor | None) -> Any:
        return n * 2 if x is None else x + n

    call = compiled(run, dynamic=True)
    assert call(3, None) == 6 and call(4, None) == 8
    assert torch.equal(call(3, torch.ones(2)), torch.full((2,), 4.0))


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_lengths(dynamic: bool | None) -> None:
    model = stack(Toy, lambda: Toy(1))()
    call = compiled(model, dynamic=dynamic)
    with torch.no_grad():
        for length in (S, S + 3, S + 7):
            same(call(randn(2, length, D)), model(randn(2, length, D)))
    assert len(report.reports()) == {None: 2, True: 1, False: 3}[dynamic]
    assert all(r.op_counts == {"mla": 2} for r in report.reports())


def test_fullgraph_with_a_refusal_and_no_recompilation() -> None:
    """A refused site breaks no graph, and neither do guards of ours make a second call compile again."""
    softcapped = toy(attend=lambda self, q, k, v: torch.softmax((q @ k.mT).tanh(), -1) @ v)
    model = stack(Toy, softcapped)()
    call = compiled(model, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            same(call(randn(2, S, D, seed=seed)), model(randn(2, S, D, seed=seed)))
    (one,) = report.reports()
    assert (len(one.matched), len(one.refused)) == (1, 1)


def test_under_torch_func() -> None:
    model, x = Toy(), randn(3, 2, S, D)
    with torch.no_grad():
        same(compiled(torch.vmap(model), "aot_eager")(x), torch.stack([model(one) for one in x]))


def test_functional_tensors() -> None:
    model, x = Toy(), randn(2, S, D)
    with torch.no_grad():
        call = torch.func.functionalize(lambda x: compiled(model)(x))
        same(call(x), model(x))


def test_a_plain_attention_stays() -> None:
    """Nothing of ours in a model that has nothing of ours."""
    call = compiled(lambda q: sdpa(q, q, q))
    same(call(randn(2, 4, S, D)), sdpa(*3 * [randn(2, 4, S, D)]))
    (one,) = report.reports()
    assert one.op_counts == {"scaled_dot_product_attention": 1} and len(one.refused) == 1
