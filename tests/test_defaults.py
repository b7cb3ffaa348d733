# SPDX-License-Identifier: Apache-2.0
"""The default dtype and device of the process do not matter: frameworks set them around a step."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path

import options as option_table
import pytest
import torch
from torch.testing import assert_close

import fused_ppl
from fused_ppl import Options, Perplexity, PerplexityAccumulator, next_token_targets
from fused_ppl.testing import make_logits, make_target

PACKAGE = Path(fused_ppl.__file__).parent
FACTORIES = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand"),
    *("randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"),
}


def allocations(source: str) -> Iterator[tuple[int, str, set[str | None]]]:
    """(line, what is called, names of its keywords) of each call that takes dtype and device from the process."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)) if name in FACTORIES:
                yield node.lineno, name, {k.arg for k in node.keywords}


def test_every_allocation_names_its_dtype_and_device():
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").resolve().glob("*.py")]
    assert len(files) > 50
    found = 0
    for file in files:
        for line, name, keywords in allocations(file.read_text()):
            found += 1
            assert {"dtype", "device"} <= keywords, f"{file}:{line}: torch.{name} without dtype and device"
    assert found > 20
    (bad,) = allocations("torch.empty(3, device='cpu')")
    assert bad == (1, "empty", {"device"})


@contextlib.contextmanager
def default(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or before)
        with torch.device(device) if device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS = {
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "fp64": {"dtype": torch.float64},
    "meta": {"device": "meta"},
}
SETTINGS = {
    "plain": {},
    "all": option_table.numbers(fused_ppl.cross_entropy_with_stats),
    "each token": {"reduction": "none"},
    "vocab": {"options": {"memory_budget": 1}},
    "columns": {"options": {"gradient_columns": 9}},
    "tolerance": {"options": {"gradient_tolerance": 0.01}},
    "int8": {"options": {"gradient_columns": 9, "screen": "int8"}},
    "bf16 screen": {"options": {"gradient_columns": 9, "screen": "bf16"}},
}


def losses(backend: str, dtype: torch.dtype, keywords: dict) -> list[torch.Tensor]:
    """Every result and gradient, from logits and from hidden states."""
    options = Options(backend=backend, **keywords.get("options", {}))
    keywords = {k: v for k, v in keywords.items() if k != "options"}
    v, results = 2100, []  # enough classes for rows that are split
    x, y = make_logits((2, v), dtype), make_target((2,), v)
    if "options" not in keywords and not options.gradient_columns and not options.gradient_tolerance:
        leaf = x.clone().requires_grad_()
        out = fused_ppl.cross_entropy_with_stats(leaf, y, num_items=None, options=options, **keywords)
        gradient = torch.autograd.grad(out.loss.sum() + out.perplexity.sum(), leaf)
        results += [*(t for t in out if t is not None), *gradient]
    # of multiples of 8, as products in int8 of a GPU want them
    h, w = make_logits((4, 8), dtype, seed=2), make_logits((32, 8), dtype, seed=3)
    y, items = make_target((4,), 32, ignored=0.3), 3 if "reduction" not in keywords else None
    leaves = [t.clone().requires_grad_() for t in (h, w)]
    out = fused_ppl.linear_cross_entropy_with_stats(*leaves, y, num_items=items, options=options, **keywords)
    results += [*(t for t in out if t is not None), *torch.autograd.grad(out.loss.sum(), leaves)]
    return [t.detach() for t in results]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_losses_do_not_see_the_defaults(context, setting, backend):
    for dtype in (torch.float32, torch.bfloat16):
        want = losses(backend, dtype, SETTINGS[setting])
        with default(**CONTEXTS[context]):
            got = losses(backend, dtype, SETTINGS[setting])
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and a.device == b.device
            assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("context", CONTEXTS)
def test_split_rows_do_not_see_the_defaults(context, backend, monkeypatch, fits):
    """As nearly every call on a GPU splits them."""
    if backend == "triton":
        from fused_ppl.backends import triton_rows
        from fused_ppl.kernels import launch

        config = launch.LaunchConfig(vectors=1, num_warps=1, threads=32, tiles_per_slice=2, slices=9)
        monkeypatch.setattr(triton_rows, "_config", lambda logits, heavy: config)
    with default(**CONTEXTS[context]):
        x = make_logits((3, 2100)).requires_grad_()
        loss = fused_ppl.perplexity(x, make_target((3,), 2100), options=Options(backend=backend))
        (gradient,) = torch.autograd.grad(loss, x)
    truth = x.detach().double().requires_grad_()
    want = fused_ppl.perplexity(truth, make_target((3,), 2100), options=Options(backend="reference"))
    assert_close(loss.double(), want, rtol=1e-5, atol=0)
    assert_close(gradient.double(), torch.autograd.grad(want, truth)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", CONTEXTS)
def test_metrics_targets_and_windows_do_not_see_the_defaults(context, options):
    x, tokens = make_logits((4, 9)), torch.tensor([3, 1, 4, 1])
    with default(**CONTEXTS[context]):
        target = next_token_targets(tokens, cu_seqlens=torch.tensor([0, 2, 4], device=tokens.device))
        metric = Perplexity(options=options)
        metric.update(x, target)
        leaf = x.clone().requires_grad_()
        window = PerplexityAccumulator([leaf])
        window.add(fused_ppl.cross_entropy_with_stats(leaf, target, reduction="sum", options=options)).backward()
        ppl = window.finish()
    assert target.tolist() == [1, -100, 1, -100]
    want = fused_ppl.perplexity(x.double(), target, options=Options(backend="reference"))
    assert_close(metric.compute(), want, rtol=1e-6, atol=0)
    assert_close(ppl, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_a_patched_model_is_probed_with_does_not_see_the_defaults(context):
    from fused_ppl.integrations.huggingface import logit_transform

    want = logit_transform.probe_values((3, 5), torch.device("cpu"))
    with default(**CONTEXTS[context]):
        got = logit_transform.probe_values((3, 5), torch.device("cpu"))
    assert torch.equal(got, want)
