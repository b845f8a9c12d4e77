"""The backend's contract: options, strictness, failures that stay inside, caches, nothing left changed behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

from dscompile import backend, report
from dscompile.backend import dsinfra
from dscompile.config import Config
from dscompile.errors import AnalysisFailed, OptionError, StrictRefusal
from dscompile.lowering import inductor
from dscompile.passes import absorb, lower, pipeline, recognize_mla
from tests.passes.toy import D, S, Toy, randn, stack, toy

ROOT = Path(__file__).parent.parent


def compiled(module: Any, given: str | None = None, **options: Any) -> Callable:
    """`module` behind the backend, as torch.compile(mode=given, options=options) hands both on."""
    torch._dynamo.reset()
    options = {"inner": "eager", **options}
    return torch.compile(module, backend=lambda gm, inputs: dsinfra(gm, inputs, mode=given, options=options))


def cause(run: Callable[[], Any]) -> BaseException:
    """What the backend raised, out of Dynamo's wrapping."""
    with pytest.raises(Exception) as caught:
        run()
    return getattr(caught.value, "inner_exception", None) or caught.value.__cause__ or caught.value


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"strickt": True},
            [
                "neither an option of dsinfra nor",
                "mean 'strict' of dsinfra?",
                "dump, enable, ep_capacity, ep_group, fp8, ",
            ],
        ),
        ({"max_autotun": True}, ["Did you mean 'max_autotune'", "of Inductor?", "torch._inductor.list_options()"]),
        ({"zzz": 1}, ["nor a setting of Inductor. Options of dsinfra are batch_invariant, dump, "]),
        ({"enable": False, "batch_invariant": True}, ["['enable'] is False", "options['batch_invariant'] is True"]),
        ({"batch_invariant": 1}, ["options['batch_invariant'] is 1", "True or False"]),
        ({"max_autotune": "yes"}, ["options['max_autotune'] is 'yes', a str", "must be a bool"]),
        ({"triton.enable_pdl": True}, ["options['triton.enable_pdl'] is True", "Leave it out"]),
        ({"implicit_fallbacks": False}, ["options['implicit_fallbacks'] is False", "enable=False"]),
        ({"inner": "eager", "max_autotune": True}, ["'max_autotune'] is a setting of Inductor", "'inner'] is 'eager'"]),
        ({"enable": False, "strict": True}, ["['enable'] is False", "options['strict'] is True", "Leave one"]),
        ({"enable": False, "fp8": "block"}, ["['enable'] is False", "options['fp8'] is 'block'"]),
        ({"fp8_free": True}, ["options['fp8_free'] is True and fp8 is None", "fp8='block'"]),
        ({"fp8_head": True}, ["options['fp8_head'] is True and fp8 is None"]),
        ({"inner": "triton"}, ["options['inner'] is 'triton'", "inductor, aot_eager, eager"]),
        ({"mode": "fast"}, ["options['mode'] is 'fast'", "reduce-overhead"]),
        ({"strict": 1}, ["options['strict'] is 1", "True or False"]),
        ({"enable": "yes"}, ["options['enable'] is 'yes'", "True or False"]),
        ({"dump": 3}, ["options['dump'] is 3", "path of a directory"]),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_options_name_the_right_ones(options: dict, words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        Config.of(None, options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name, value", [("triton.enable_pdl", True), ("implicit_fallbacks", False)])
def test_without_analysis_inductors_settings_are_its_own(name: str, value: bool) -> None:
    """What the errors advise: with enable=False, none of our operators is there to be hurt."""
    config = Config.of(None, {name: value, "enable": False})
    assert dict(config.inductor) == {name: value}


def test_wrong_option_through_torch_compile() -> None:
    error = cause(lambda: compiled(Toy(), strickt=True)(randn(2, S, D)))
    assert isinstance(error, OptionError) and "strickt" in str(error)


def test_wrong_mode_is_named() -> None:
    with pytest.raises(OptionError, match="mode is 'fast'; allowed are default, .*reduce-overhead"):
        Config.of("fast")


def test_two_modes_are_a_contradiction() -> None:
    assert Config.of("default", {"mode": "default"}).mode == "default"
    with pytest.raises(OptionError, match=r"mode is 'default' and options\['mode'\] is 'max-autotune': give one"):
        Config.of("default", {"mode": "max-autotune"})


def test_variables_may_switch_parts_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """To compare or debug a script that asks for more, without an edit of it."""
    monkeypatch.setenv("DSINFRA_ENABLE", "0")
    monkeypatch.setenv("DSINFRA_INNER", "eager")
    config = Config.of(None, {"strict": True, "fp8": "block", "max_autotune": True})
    assert (config.enable, config.inner, config.strict) == (False, "eager", True)


@pytest.mark.parametrize("mode", inductor.modes())
def test_every_mode_of_torch_is_taken(mode: str) -> None:
    assert Config.of(mode).mode == mode


def test_inductors_options_are_passed_on() -> None:
    config = Config.of(None, {"max_autotune": True, "triton.cudagraphs": False, "strict": True})
    assert config.strict and dict(config.inductor) == {"max_autotune": True, "triton.cudagraphs": False}


@pytest.mark.parametrize("where", ["mode", "options"])
def test_mode_from_either_place(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes a mode or options, never both, so the mode can be given as an option too."""
    seen: list[dict] = []
    from torch._inductor import compile_fx

    def record(gm: Any, inputs: Any, inner_compile: Callable, config_patches: dict) -> Callable:
        seen.append(config_patches)
        held = getattr(inductor_config, inductor.HOOK)
        assert any(isinstance(one, inductor.Stamp) for one in (held if inductor.TAKES_LISTS else [held]))
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", record)
    mode = "max-autotune-no-cudagraphs"
    options = {"inner": "inductor", **({"mode": mode} if where == "options" else {})}
    compiled(Toy(), mode if where == "mode" else None, **options)(randn(2, S, D))
    assert seen[0]["max_autotune"] is True


def test_explicit_settings_win_over_the_modes() -> None:
    assert inductor.settings("max-autotune", {"max_autotune": False})["max_autotune"] is False


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("0", False), ("False", False)])
def test_variables(text: str, value: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSINFRA_STRICT", text)
    monkeypatch.setenv("DSINFRA_INNER", "aot_eager")
    config = Config.of()
    assert (config.strict, config.inner) == (value, "aot_eager")
    assert Config.of(None, {"strict": not value, "inner": "eager"}) == Config(strict=not value, inner="eager")


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSINFRA_DUMP", "")
    assert Config.of().dump is None


@pytest.mark.parametrize(("name", "text"), [("STRICT", "maybe"), ("INNER", "tvm"), ("ENABLE", "2")])
def test_wrong_variables_are_named(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"DSINFRA_{name}", text)
    with pytest.raises(OptionError, match=f"DSINFRA_{name} is '{text}'"):
        Config.of()


def test_enable_false_leaves_the_graph_alone() -> None:
    report.clear()
    compiled(Toy(), enable=False)(randn(2, S, D))
    assert report.last().op_counts == {"scaled_dot_product_attention": 1} and not report.last().sites


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_inner_compilers_agree(inner: str) -> None:
    x = randn(2, S, D)
    torch.testing.assert_close(compiled(stack(Toy, lambda: Toy(1))(), inner=inner)(x), stack(Toy, lambda: Toy(1))()(x))


# ------------------------------------------------------------------ strict, and failures of our own


def refused() -> torch.nn.Module:
    changed = toy(attend=lambda self, q, k, v: torch.softmax((q @ k.mT).tanh(), -1) @ v)
    return stack(Toy, changed)()


def test_strict_raises_with_site_line_reason_and_hint() -> None:
    error = cause(lambda: compiled(refused(), strict=True)(randn(2, S, D)))
    assert isinstance(error, StrictRefusal)
    for words in ("1 of 2 sites", "layers.1", "tests/test_backend.py:", "NotBilinear", "tanh", "constant"):
        assert words in str(error), error


def test_strict_lets_a_lowered_model_pass() -> None:
    compiled(Toy(), strict=True)(randn(2, S, D))


def explode(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("boom")


FAILURES: list[tuple[Any, str]] = [
    (recognize_mla, "run"), (absorb, "run"), (pipeline, "trace"), (lower, "run"),
    (recognize_mla.anchors, "find"), (recognize_mla.Recognizer, "match"), (recognize_mla.Binder, "write"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "name"), FAILURES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_failing_pass_leaves_the_graph_to_inductor(place: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, name, explode)
    report.clear()
    x = randn(2, S, D)
    torch.testing.assert_close(compiled(Toy())(x), Toy()(x))
    found = report.last()
    assert "ZeroDivisionError: boom" in found.error or any("boom" in s.reason for s in found.sites)
    assert "boom" in str(found)
    error = cause(lambda: compiled(Toy(), strict=True)(x))
    if isinstance(error, AnalysisFailed):
        assert isinstance(error.__cause__, ZeroDivisionError) and "ZeroDivisionError: boom" in str(error)
    else:
        assert isinstance(error, StrictRefusal)


def test_a_failure_in_one_site_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What raises while one attention is analysed refuses that one, by its reason."""
    match, calls = recognize_mla.Recognizer.match, []

    def sometimes(self: Any, anchor: Any, attention: Any) -> Any:
        calls.append(anchor)
        return explode() if len(calls) == 1 else match(self, anchor, attention)

    monkeypatch.setattr(recognize_mla.Recognizer, "match", sometimes)
    report.clear()
    compiled(stack(Toy, lambda: Toy(1))())(randn(2, S, D))
    sites = report.last().sites
    assert [s.matched for s in sites] == [False, True]
    assert "boom" in sites[0].reason


def test_a_failure_halfway_keeps_what_was_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorption fails on the second site: the first stays absorbed, the graph stays sound."""
    write, calls = absorb._absorb, []

    def second_fails(*args: Any) -> None:
        calls.append(args)
        return explode() if len(calls) == 2 else write(*args)

    monkeypatch.setattr(absorb, "_absorb", second_fails)
    monkeypatch.setattr(absorb.heuristics, "prefer_absorbed", lambda **sizes: (True, "as the test wants it"))
    x = randn(2, S, D)
    torch.testing.assert_close(compiled(stack(Toy, lambda: Toy(1))())(x), stack(Toy, lambda: Toy(1))()(x))


# ------------------------------------------------------------------ Inductor's settings and caches


class Counting(CustomGraphPass):
    """A user's own pass."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.runs += 1

    def uuid(self) -> str:
        return "counting"


def small(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).sin()


def compile_small(**options: Any) -> None:
    x = torch.ones(8)
    torch.testing.assert_close(compiled(small, inner="inductor", **options)(x), small(x))


def test_inductors_configuration_is_unchanged() -> None:
    before, hash_before = inductor_config.get_config_copy(), inductor_config.get_hash()
    compile_small(max_autotune=False, mode="max-autotune-no-cudagraphs")
    assert inductor_config.get_hash() == hash_before
    assert inductor_config.get_config_copy() == before


@pytest.mark.parametrize("place", ["config", "options"])
def test_a_users_own_pass_runs_and_caching_stays_on(place: str) -> None:
    own = Counting()
    options = {inductor.HOOK: own} if place == "options" else {}
    with fresh_cache(), inductor_config.patch({inductor.HOOK: own} if place == "config" else {}):
        counters.clear()
        compile_small(**options)
        assert own.runs == 1 and counters["inductor"]["fxgraph_cache_miss"] == 1
        compile_small(**options)
        assert counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"] >= 1
        assert counters["inductor"]["fxgraph_cache_bypass"] == 0 and own.runs == 1
        assert inductor_config.post_grad_custom_post_pass is (own if place == "config" else None)


def test_a_users_pass_without_a_uuid_is_not_cached() -> None:
    """As without us: torch can't tell whether such a pass has changed."""
    runs = []
    with fresh_cache():
        counters.clear()
        for _ in range(2):
            compile_small(**{inductor.HOOK: lambda graph: runs.append(graph)})
        assert len(runs) == 2 and counters["inductor"]["fxgraph_cache_hit"] == 0


class Stop(Exception):
    pass


def keys(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """What our compilation adds to the keys of torch's caches."""
    from torch._inductor import compile_fx

    found: list[Any] = []

    def record(*args: Any, **settings: Any) -> Callable:
        held = getattr(inductor_config, inductor.HOOK)
        found.extend(one.uuid() for one in (held if isinstance(held, list) else [held]))
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(compile_fx, "compile_fx", record)
        with pytest.raises(Exception, match="Stop"):
            compiled(small, inner="inductor", **options)(torch.ones(8))
    return found


def test_sources_and_settings_enter_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    (first,), (again,) = keys(monkeypatch), keys(monkeypatch)
    assert first == again and keys(monkeypatch, enable=False) != [first] and keys(monkeypatch, fuel=1) != [first]
    monkeypatch.setattr(inductor, "sources_digest", lambda: "edited")
    assert keys(monkeypatch) != [first]


def test_the_users_pass_and_ours_are_both_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    (ours,) = keys(monkeypatch)
    with inductor_config.patch(inductor.HOOK, Counting()):
        assert set(keys(monkeypatch)) in ({"counting", ours}, {("counting", ours)})


def test_the_digest_reads_every_source_file(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    bytes_of = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self.resolve()) or bytes_of(self))
    inductor.sources_digest.__wrapped__()
    for name in ("dscompile/backend.py", "passes/absorb.py", "lowering/ops/mla.py", "kernels/launch.py"):
        assert (ROOT / name).resolve() in read, name


# ------------------------------------------------------------------ several compilations


def test_two_threads_compile_at_once() -> None:
    report.clear()
    torch._dynamo.reset()
    modules, x = [stack(Toy, lambda i=i: Toy(i))() for i in (1, 2)], randn(2, S, D)
    results: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(2)

    def work(i: int) -> None:
        call = torch.compile(modules[i], backend=lambda gm, inputs: dsinfra(gm, inputs, options={"inner": "eager"}))
        barrier.wait()
        with torch.no_grad():
            results[i] = call(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, module in enumerate(modules):
        torch.testing.assert_close(results[i], module(x))
    assert [r.op_counts for r in report.reports()] == [{"mla": 2}, {"mla": 2}]


def test_beside_another_backend() -> None:
    torch._dynamo.reset()
    module, x = Toy(), randn(2, S, D)
    calls = [
        torch.compile(module, backend=b)(x)
        for b in ("aot_eager", lambda gm, i: dsinfra(gm, i, options={"inner": "aot_eager"}), "eager")
    ]
    for y in calls:
        torch.testing.assert_close(y, module(x))


def test_reset_compiles_again() -> None:
    report.clear()
    module, x = Toy(), randn(2, S, D)
    for count in (1, 2):
        call = compiled(module)  # resets Dynamo
        call(x), call(x)
        assert len(report.reports()) == count


def test_by_its_name_with_mode_and_options() -> None:
    from dscompile._entry import ensure_registered

    ensure_registered()
    x = randn(2, S, D)
    for settings in ({"options": {"inner": "eager"}}, {"options": {"inner": "eager", "mode": "default"}}):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(Toy(), backend="dsinfra", **settings)(x), Toy()(x))


def test_fullgraph_dynamic_and_inference_mode() -> None:
    report.clear()
    torch._dynamo.reset()
    run = torch.compile(Toy(), backend=lambda gm, i: dsinfra(gm, i, options={"inner": "aot_eager"}), fullgraph=True)
    with torch.inference_mode():
        for n in (10, 13, 17):
            torch.testing.assert_close(run(randn(2, n, D)), Toy()(randn(2, n, D)))
    assert all(r.op_counts == {"mla": 1} for r in report.reports())


def test_a_graph_without_attention_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "trace", explode)
    report.clear()
    compiled(small)(torch.ones(3))
    assert report.last().error == "" and report.last().records == []


def test_the_device_line_says_what_runs() -> None:
    assert backend._device([torch.ones(1)]) == "CPU (reference implementations)"
