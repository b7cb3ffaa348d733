# SPDX-License-Identifier: Apache-2.0
"""What every test runs under, and what several of them need.

Every buffer that fused_ppl leaves uninitialised is filled with NaN, so that an element that is never written shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import interpreter
import on_device
import options as option_table
import pytest
import torch
from pool import Pool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import fused_ppl
from fused_ppl import Options
from fused_ppl.engines import memory
from fused_ppl.testing import assert_as_good_as_eager, value_and_gradient

# the same examples every time, and no limit on the time of one: a machine may be busy
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

LIMITS = {"interpreter": 20_000, "emulator": 1_000_000}  # logits; more would take minutes
WORKERS: list[str] = []  # what each process of pytest-xdist has emulated


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests put their tensors; see tests/on_device.py")
    parser.addoption("--emulate", metavar="sm_90[,setting=value...]", help="run the kernels on tests/emulator")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("emulate"):
        on_device.emulate(config.getoption("emulate"))
    on_device.place(config.getoption("device"), config.option.collectonly)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if on_device.elsewhere():
        on_device.leave_out(items)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", on_device.backends(), indirect=True, scope="session")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if on_device.emulated is not None and hasattr(session.config, "workeroutput"):
        session.config.workeroutput["emulated"] = on_device.emulated.report()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keep what a process of pytest-xdist has emulated."""
    if report := node.workeroutput.get("emulated"):
        WORKERS.append(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if on_device.emulated is not None:
        for report in WORKERS or [on_device.emulated.report()]:
            terminalreporter.write_line(report)


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """The backend under test."""
    return str(request.param)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Nothing is compiled before a test, and nothing of it is left after it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def options(backend: str) -> Options:
    return Options(backend=backend)


@pytest.fixture(scope="session")
def fits(backend: str) -> Callable[..., None]:
    """Skip a case that is too big, or of a dtype that is not there, for the interpreter."""

    def check(*shape: int, dtype: torch.dtype = torch.float32) -> None:
        if backend == "triton" and dtype == torch.float64:
            pytest.skip("the kernels compute in float32 and refuse float64")
        runs = "interpreter" if on_device.interpreted() else "emulator" if on_device.emulated is not None else None
        if backend == "triton" and runs is not None and math.prod(shape) > LIMITS[runs]:
            pytest.skip(f"{math.prod(shape)} logits take the {runs} minutes; the limit is {LIMITS[runs]}")

    return check


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers for each test, and no setting of the caller's shell."""
    for name in ("FUSED_PPL_BACKEND", "FUSED_PPL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads_that_do_not_get_in_each_other_s_way() -> None:
    """pytest-xdist starts a process for each core, and each would take every core for itself."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(autouse=True, scope="session")
def _fma_that_rounds_once() -> None:
    """Before 3.9 the interpreter's tl.fma rounds its product as well, which no GPU does."""
    if not on_device.interpreted():
        return
    pytest.importorskip("triton.runtime.interpreter")
    interpreter.round_once()


@pytest.fixture(autouse=True, scope="session")
def _powers_of_2_as_a_gpu_has_them() -> None:
    """GPUs take 2**x as 0 where it is no normal number. The interpreter would hide what that costs."""
    if not on_device.interpreted():
        return
    pytest.importorskip("triton.runtime.interpreter")
    interpreter.flush_powers()


@pytest.fixture(autouse=True, scope="session")
def _interpreter_that_does_only_what_it_must() -> None:
    """Integer overflow is looked for by tests/test_kernels*.py only."""
    if not on_device.interpreted():
        return
    pytest.importorskip("triton.runtime.interpreter")
    interpreter.skip_its_checks()


@pytest.fixture
def integer_overflow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter; no GPU looks for it."""
    if not on_device.interpreted():
        return
    builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin give NaN to fused_ppl."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: object, **keywords: object) -> Tensor:
            buffer = allocate(*args, **keywords)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("fused_ppl") and type(buffer) is Tensor and buffer.device.type != "meta":
                if buffer.dtype.is_floating_point:
                    buffer.fill_(float("nan"))
                else:
                    buffer.fill_(True if buffer.dtype == torch.bool else torch.iinfo(buffer.dtype).min // 2)
            return buffer

        return poisoned

    monkeypatch.setattr(memory, "LARGE", sys.maxsize)  # these buffers are neither poisoned nor seen by the profiler
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, poison(getattr(Tensor, name)))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes over gloo, started once."""
    on_device.only_on_the_cpu("its processes talk over gloo")
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def judge(options: Options) -> Callable[..., None]:
    """Hold value and gradient of one loss to the tolerance policy. Truth and eager are the reference, which has its
    own tests against numbers computed by hand."""

    def check(
        loss: Callable[..., Tensor], logits: Tensor, target: Tensor, upstream: Tensor | float = 1.0, **keywords: object
    ) -> None:
        mine = keywords.pop("options", options)

        def of(x: Tensor, how: object) -> tuple[Tensor, Tensor]:
            return value_and_gradient(lambda x: loss(x, target, options=how, **keywords), x, upstream)

        value, gradient = of(logits, mine)
        eager, eager_gradient = of(logits, Options(backend="reference"))
        truth, true_gradient = of(logits.double(), Options(backend="reference"))
        assert value.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
        assert gradient.dtype == logits.dtype
        finite = truth[truth.isfinite()]
        nats = finite.log().clamp(min=1).amax().item() if loss is fused_ppl.perplexity and finite.numel() else 1.0
        name = f"{loss.__name__} {keywords}"
        assert_as_good_as_eager(value, eager, truth, name, condition=nats)
        dim = keywords.get("class_dim", 1 if logits.ndim > 1 else 0)
        grads = [g.movedim(dim, -1) for g in (gradient, eager_gradient, true_gradient)]
        assert_as_good_as_eager(*grads, f"gradient of {name}", condition=nats)
        # the policy measures by the largest entry, the target's: in half precision all others could be zero. They are
        # rounded once, each by itself, from what fp32 arithmetic gives
        kind = torch.finfo(logits.dtype)
        wide = torch.promote_types(logits.dtype, torch.float32)
        lost = of(logits.to(wide), Options(backend="reference"))[1] - true_gradient
        largest = true_gradient.nan_to_num(posinf=0, neginf=0).abs().amax().item() if gradient.numel() else 0.0
        atol = 4 * nats * torch.finfo(wide).eps * largest + kind.smallest_normal * kind.eps
        atol += 2 * lost.nan_to_num(0, 0, 0).abs().amax().item() if gradient.numel() else 0.0
        assert_close(gradient.double(), true_gradient, rtol=kind.eps, atol=atol, equal_nan=True)

    return check


@pytest.fixture(scope="session")
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """The most bytes of CPU tensors alive at once during a call, beyond those alive before it."""
    on_device.only_on_the_cpu("the profiler of the CPU measures it")

    def measure(call: Callable[[], object]) -> int:
        # the profiler sees every allocation of torch's allocator, those inside of aten's kernels as well
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = call()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        assert events, "the profiler recorded no allocation"
        alive = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            alive += event.nbytes()
            peak = max(peak, alive)
        del result
        return peak

    return measure


class _FakeGpuMethods(TorchFunctionMode):
    """A CPU build of torch refuses some methods of fake CUDA tensors, indexing among them, because it looks for a
    device guard first; a CUDA build before 2.9 looks for a driver. The ops behind them are not refused."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        aten = torch.ops.aten
        if func is Tensor.__getitem__:
            return self._index(*args)
        if func is Tensor.__setitem__:
            part, value = self._index(*args[:2]), args[2]
            return aten.copy_(part, value) if isinstance(value, Tensor) else aten.fill_(part, value)
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if not any(words in str(error) for words in ("not linked with support", "driver version is insufficient")):
                raise
            name, keywords = {"__invert__": "bitwise_not"}.get(func.__name__, func.__name__), dict(kwargs or {})
            out = keywords.pop("out", None)
            result = getattr(aten, name)(*args, **keywords)
            return result if out is None else aten.copy_(out, result)

    @staticmethod
    def _index(x: Tensor, index: object) -> Tensor:
        if isinstance(index, Tensor):
            return torch.ops.aten.index(x, [index])
        dim = 0
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, int):
                x = torch.ops.aten.select(x, dim, part)
            else:
                x, dim = torch.ops.aten.slice(x, dim, part.start, part.stop), dim + 1
        return x


@pytest.fixture(scope="session")
def fake_gpu() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Tensors made within are on a CUDA device that is not there; whatever would wait for it raises."""
    on_device.only_on_the_cpu("its GPU is one that is not there")
    try:
        with FakeTensorMode(), _FakeGpuMethods():
            torch.ones(2, device="cuda")[0].sum()
    except RuntimeError as error:
        pytest.skip(f"this torch makes no fake CUDA tensor without a driver: {str(error).splitlines()[0]}")

    @contextlib.contextmanager
    def mode() -> Iterator[None]:
        with FakeTensorMode(), _FakeGpuMethods():
            yield

    return mode


@pytest.fixture(scope="session")
def every_option() -> Callable[..., dict[str, object]]:
    """All options of what one loss computes, at once; see tests/options.py."""

    def make(loss: Callable[..., object], num_classes: int, target: Tensor) -> dict[str, object]:
        return option_table.keywords(option_table.together(loss), num_classes, target)

    return make
