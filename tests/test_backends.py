# SPDX-License-Identifier: Apache-2.0
"""Which code runs: strict by name, the best that can run for None, and the reasons told."""

from __future__ import annotations

import importlib.machinery
import inspect
from dataclasses import FrozenInstanceError
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

import fused_ppl
from fused_ppl import Options, backends, perplexity, records, spec
from fused_ppl.backends import presence
from fused_ppl.cli import machine
from fused_ppl.engines import head
from fused_ppl.records import HeadExecution, HeadInputs
from fused_ppl.spec import LossSpec

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
FP32, FP64 = torch.float32, torch.float64


@pytest.fixture
def kernels_there(monkeypatch):
    """As if the Triton kernels and Triton were installed, outside of the interpreter."""
    monkeypatch.setattr(presence, "TRITON_PROBLEM", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_cpu_takes_torch_and_never_the_interpreter(kernels_there, monkeypatch):
    assert backends.choose(None, CPU, FP32) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose(None, CPU, FP32) == "torch"
    assert backends.choose("triton", CPU, FP32) == "triton"


def test_a_gpu_takes_triton_where_it_can(kernels_there):
    assert backends.choose(None, CUDA, FP32) == "triton"
    assert backends.choose(None, CUDA, torch.bfloat16) == "triton"
    assert backends.choose(None, CUDA, FP64) == "torch"
    assert backends.choose(None, MPS, FP32) == "torch"


@pytest.fixture
def nothing_told(monkeypatch):
    """As at the start of a process: no fallback has been warned of."""
    backends._warn_once.cache_clear()
    yield
    backends._warn_once.cache_clear()


def test_without_triton_a_gpu_takes_torch_and_says_so_once(monkeypatch, nothing_told):
    monkeypatch.setattr(presence, "TRITON_PROBLEM", presence.triton_problem(None))
    with pytest.warns(UserWarning, match="the package triton is not installed") as told:
        assert [backends.choose(None, CUDA, FP32) for _ in range(3)] == ["torch"] * 3
    assert len(told) == 1 and 'Options(backend="torch")' in str(told[0].message)


@pytest.mark.parametrize("kind", ["privateuseone", "hpu", "mps", "meta", "cpu"])  # an NPU is a privateuseone
def test_devices_that_triton_has_no_code_for_take_torch_without_a_word(kind, kernels_there, recwarn):
    assert backends.choose(None, torch.device(kind), FP32) == "torch" and not recwarn.list


def installed_triton(folder: Path, version: str | None) -> ModuleSpec:
    """A package triton of this version, or the folder that a broken removal leaves behind."""
    package = folder / "triton"
    package.mkdir()
    if version is not None:
        (package / "__init__.py").write_text(f'"""doc"""\n__version__ = \'{version}\'\n')
    found = importlib.machinery.PathFinder.find_spec("triton", [str(folder)])
    assert found is not None
    return found


@pytest.mark.parametrize("version", ["3.3.1", "3.6.0", "3.10.0+git12ab", "4.0.0"])
def test_a_new_enough_triton_has_no_problem(version, tmp_path):
    assert presence.triton_problem(installed_triton(tmp_path, version)) is None


@pytest.mark.parametrize("version", ["3.2.0", "3.3.0+gitffff", "2.3.1"])
def test_an_old_triton_is_refused_in_a_sentence(version, tmp_path, monkeypatch, nothing_told):
    problem = presence.triton_problem(installed_triton(tmp_path, version))
    assert "need Triton 3.3.1 or newer" in problem and f"{version} is installed" in problem
    monkeypatch.setattr(presence, "TRITON_PROBLEM", problem)
    with pytest.warns(UserWarning, match="need Triton 3"):
        assert backends.choose(None, CUDA, FP32) == "torch"
    with pytest.raises(NotImplementedError, match="need Triton 3"):
        backends.choose("triton", CUDA, FP32)
    assert problem in machine.choice(None, CUDA, FP32).sentence()


def test_a_folder_without_a_package_is_a_broken_installation(tmp_path):
    assert "broken" in presence.triton_problem(installed_triton(tmp_path, None))


def test_a_triton_that_does_not_compile_is_refused_and_told_of_once(kernels_there, monkeypatch, nothing_told):
    """A container without a C compiler, or with a half-installed Triton."""
    probe = pytest.importorskip("fused_ppl.kernels.probe", reason="it imports triton")
    tries = []

    def fails(out):
        tries.append(out)
        raise RuntimeError("Failed to find C compiler. Please specify via CC.\nmore")

    monkeypatch.setattr(probe, "launch_probe", fails)
    monkeypatch.setattr(presence, "_compiler_problems", {})
    monkeypatch.setattr(presence, "_can_launch", lambda kind: True)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: torch.zeros(*size, dtype=dtype))
    with pytest.warns(UserWarning, match="RuntimeError: Failed to find C compiler"):
        assert [backends.choose(None, CUDA, FP32) for _ in range(2)] == ["torch"] * 2
    with pytest.raises(NotImplementedError, match="compiles no kernel here"):
        backends.choose("triton", CUDA, FP32)
    assert len(tries) == 1


def test_products_of_bf16_are_fp32_where_they_cannot_be_summed_in_fp32(monkeypatch):
    """mm(out_dtype=) came with torch 2.8, for CUDA alone."""
    assert head.product_dtype(torch.bfloat16, torch.device("xpu")) == FP32
    assert head.product_dtype(torch.bfloat16, MPS) == FP32
    presence.widens_half_products.cache_clear()
    monkeypatch.setattr(type(torch.ops.aten.mm), "overloads", lambda self: ["default", "out"])
    assert head.product_dtype(torch.bfloat16, CUDA) == FP32
    presence.widens_half_products.cache_clear()


def _mm(a, b, *, out_dtype, out):
    return out.copy_(a.to(out_dtype) @ b.to(out_dtype))


def _addmm(c, a, b, *, out_dtype, out):
    return out.copy_(c + a.to(out_dtype) @ b.to(out_dtype))


def _raises(*given, **keywords):
    raise NotImplementedError("Could not run 'aten::addmm.dtype_out'")


@pytest.mark.parametrize(
    ("addmm", "right"),
    [
        (_addmm, True),
        (lambda c, a, b, out_dtype, out: out.copy_((c.bfloat16() + a @ b).float()), False),  # a rounded sum
        (lambda c, a, b, out_dtype, out: out.copy_(a.float() @ b.float()), False),  # nothing added
        (_raises, False),
    ],
    ids=["right", "rounded", "overwritten", "missing"],
)
def test_products_are_added_in_place_where_that_was_tried_and_right(addmm, right, monkeypatch):
    monkeypatch.setattr(torch, "mm", _mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    assert presence._adds_in_place("cpu") is right


def test_a_gradient_that_is_added_in_place(monkeypatch):
    """As on a GPU with torch 2.8: the first chunk writes the gradient of the weight, and others add to it."""
    inputs = HeadInputs(torch.randn(6, 8).bfloat16(), torch.randn(5, 8).bfloat16(), None, *[None] * 4)
    inputs = inputs._replace(target=torch.zeros(6, dtype=torch.long))
    execution = HeadExecution("torch", None, torch.bfloat16, (True, True, False))
    of_head = head.Head(inputs, LossSpec(), execution)
    of_head.on_cpu, of_head.dtype = False, torch.bfloat16
    g, out = torch.randn(6, 5).bfloat16(), torch.full((5, 8), torch.nan)
    monkeypatch.setattr(presence, "adds_half_products", lambda kind: True)
    monkeypatch.setattr(torch, "mm", _mm)
    monkeypatch.setattr(torch, "addmm", _addmm)
    of_head.add_weight_gradient(g[:4], inputs.hidden[:4], out, fresh=True)
    of_head.add_weight_gradient(g[4:], inputs.hidden[4:], out, fresh=False)
    monkeypatch.undo()
    torch.testing.assert_close(out, g.float().t() @ inputs.hidden.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_name_is_that_backend_on_any_device(name, kernels_there):
    for device in (CPU, CUDA, MPS):
        assert backends.choose(name, device, FP32) == name


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [(CPU, FP32, "TRITON_INTERPRET=1"), (CUDA, FP64, "float64"), (MPS, FP32, "no code for mps")],
)
def test_a_name_that_cannot_run_says_why_and_what_can(device, dtype, reason, kernels_there):
    with pytest.raises(NotImplementedError) as caught:
        backends.choose("triton", device, dtype)
    for part in ("backend='triton'", device.type, str(dtype), reason, "'torch', 'reference'", "backend=None"):
        assert part in str(caught.value)


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(presence, "TRITON_PROBLEM", presence.triton_problem(None))
    with pytest.raises(NotImplementedError, match="package triton is not installed"):
        backends.choose("triton", CUDA, FP32)


def test_a_call_with_a_backend_that_cannot_run_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="cannot run on cpu"):
        perplexity(torch.zeros(2, 3), torch.zeros(2).long(), options=Options(backend="triton"))


def test_the_environment_sets_the_default_and_a_name_overrides_it(monkeypatch):
    monkeypatch.setenv("FUSED_PPL_BACKEND", "reference")
    assert backends.choose(None, CPU, FP32) == "reference"
    assert backends.choose("torch", CPU, FP32) == "torch"
    monkeypatch.setenv("FUSED_PPL_BACKEND", "")
    assert backends.choose(None, CPU, FP32) == "torch"
    monkeypatch.setenv("FUSED_PPL_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"FUSED_PPL_BACKEND must be one of .* got 'cuda'"):
        backends.choose(None, CPU, FP32)


def test_the_environment_reaches_a_call(monkeypatch):
    x, target = torch.randn(2, 3, requires_grad=True), torch.zeros(2).long()
    assert type(perplexity(x, target).grad_fn).__name__ == "LogitsLossBackward"
    monkeypatch.setenv("FUSED_PPL_BACKEND", "reference")
    assert type(perplexity(x, target).grad_fn).__name__ != "LogitsLossBackward"


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize(
    ("load", "protocol"), [(backends.load, backends.RowBackend), (backends.load_compact, backends.CompactBackend)]
)
def test_a_backend_has_the_functions_that_the_engines_call(name, load, protocol):
    """mypy compares the types; this compares the parameters, also where mypy does not run."""
    if name == "triton":
        pytest.importorskip("triton", reason="the backend imports it")
    functions = [n for n in vars(protocol) if n.startswith("nll_")]
    assert functions
    for function in functions:
        own = list(inspect.signature(getattr(load(name), function)).parameters)
        assert own == list(inspect.signature(getattr(protocol, function)).parameters)[1:]  # without self


def test_every_name_is_documented_and_has_a_module():
    assert {"torch", "triton", "reference"} == set(spec.BACKENDS)
    for name in spec.BACKENDS:
        assert f'"{name}"' in fused_ppl.Options.__doc__


def test_options_are_frozen_and_compare_by_value():
    options = Options(backend="torch", memory_budget=5)
    assert options == Options("torch", 5)
    assert hash(options) == hash(Options("torch", 5))
    with pytest.raises(FrozenInstanceError):
        options.backend = "reference"
    with pytest.raises(AttributeError):
        spec.LossSpec().reduction = "sum"


def test_the_schema_of_an_op_spells_the_fields_of_its_records():
    from fused_ppl.engines.linear_rows import linear_sums

    names = [argument.name for argument in linear_sums.overload._schema.arguments]
    assert names == [*records.HeadInputs._fields, *spec.LossSpec._fields, *records.HeadExecution._fields]


@pytest.mark.parametrize(("problem", "expected"), [(None, "triton"), ("none here", "torch")])
def test_the_choice_is_traced_in_one_graph(problem, expected, monkeypatch, recwarn):
    """torch 2.8 to 2.12 cannot trace importlib.util.find_spec, nor a warning."""
    monkeypatch.setattr(presence, "TRITON_PROBLEM", problem)
    monkeypatch.setattr(presence, "_compiler_problems", {})
    chosen = []

    def f(x):
        chosen.append(backends.choose(None, CUDA, torch.bfloat16))
        return x + 1

    torch.compile(f, backend="eager", fullgraph=True)(torch.zeros(2))
    assert chosen == [expected] and not [w for w in recwarn if "fused_ppl" in str(w.message)]
