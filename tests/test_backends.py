# SPDX-License-Identifier: Apache-2.0
"""Which code runs: strict by name, the best that can run for None, and the reasons told."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import FrozenInstanceError

import pytest
import torch

import fused_ppl
from fused_ppl import Options, backends, perplexity, spec

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
FP32, FP64 = torch.float32, torch.float64


@pytest.fixture
def kernels_there(monkeypatch):
    """As if the Triton kernels and Triton were installed, outside of the interpreter."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
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


def test_without_triton_everything_takes_torch(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    assert backends.choose(None, CUDA, FP32) == "torch"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_name_is_that_backend_on_any_device(name, kernels_there):
    for device in (CPU, CUDA, MPS):
        assert backends.choose(name, device, FP32) == name


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [(CPU, FP32, "TRITON_INTERPRET=1"), (CUDA, FP64, "float64"), (MPS, FP32, "Apple")],
)
def test_a_name_that_cannot_run_says_why_and_what_can(device, dtype, reason, kernels_there):
    with pytest.raises(NotImplementedError) as caught:
        backends.choose("triton", device, dtype)
    for part in ("backend='triton'", device.type, str(dtype), reason, "'torch', 'reference'", "backend=None"):
        assert part in str(caught.value)


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else object())
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


@pytest.mark.parametrize("name", backends.MODULES)
def test_a_backend_has_the_functions_that_the_engines_call(name):
    if name == "triton":
        pytest.importorskip("triton", reason="the backend imports it")
    module, base = backends.load(name), backends.load("torch")
    for function in ("nll_forward", "nll_backward", "nll_forward_backward"):
        assert list(inspect.signature(getattr(module, function)).parameters) == list(
            inspect.signature(getattr(base, function)).parameters
        )


def test_every_name_is_documented_and_has_a_module():
    assert set(backends.MODULES) | {"reference"} == set(spec.BACKENDS)
    for name in spec.BACKENDS:
        assert f'"{name}"' in fused_ppl.Options.__doc__


def test_options_are_frozen_and_compare_by_value():
    options = Options(backend="torch", memory_budget=5)
    assert options == Options("torch", 5)
    assert hash(options) == hash(Options("torch", 5))
    with pytest.raises(FrozenInstanceError):
        options.backend = "reference"
    with pytest.raises(FrozenInstanceError):
        spec.LossSpec().reduction = "sum"


def test_the_schema_of_the_ops_spells_the_spec():
    names = [part.split()[-1] for part in spec.SPEC_SCHEMA.split(",")]
    assert names == list(spec.LossSpec.__dataclass_fields__)
    assert len(spec.LossSpec().op_args()) == len(names)
    given = spec.LossSpec("none", 7, 0.1, 0.2, 0.3, 0.4, 0.5, True)
    assert spec.LossSpec(*given.op_args()) == given
