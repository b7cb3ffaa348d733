# SPDX-License-Identifier: Apache-2.0
"""The adapters take the arguments of the packages whose names they bear; Liger's values are judged in test_liger.py."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fused_ppl.integrations import cut_cross_entropy as cce
from fused_ppl.integrations import liger
from fused_ppl.testing import make_target

B, T, V, D = 2, 6, 50, 8


def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(B, T, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        make_target((B, T), V, ignored=0.3),
    )


def theirs():
    return pytest.importorskip("cut_cross_entropy", reason="needs cut-cross-entropy (pip install cut-cross-entropy)")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cut_cross_entropy_gives_what_it_gives_itself(reduction, shift, softcap):
    e, c, targets = make()
    keywords = {"softcap": softcap, "reduction": reduction, "shift": shift, "impl": "torch_compile"}
    with torch.compiler.set_stance("force_eager"):
        want = theirs().linear_cross_entropy(e, c, targets, **keywords)
    got = cce.linear_cross_entropy(e, c, targets, **keywords)
    assert_close(got, want)
    upstream = torch.linspace(-1, 2, want.numel()).view(want.shape)
    for mine, other in zip(
        torch.autograd.grad(got, (e, c), upstream), torch.autograd.grad(want, (e, c), upstream), strict=True
    ):
        assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_the_examples_of_cut_cross_entropy_s_readme():
    e, c, labels = make()
    with torch.compiler.set_stance("force_eager"):
        want = theirs().linear_cross_entropy(e, c, labels, impl="torch_compile", shift=True)
        module = theirs().LinearCrossEntropy(impl="torch_compile")(e, c, labels)
    assert_close(cce.linear_cross_entropy(e, c, labels, shift=1), want)
    assert_close(cce.LinearCrossEntropy()(e, c, labels), module)
    # nll = linear_cross_entropy(..., reduction="none", shift=1); ppl = torch.exp(nll.mean(-1))
    nll = cce.linear_cross_entropy(e, c, labels.clamp(min=0), reduction="none", shift=1)
    logits = (e @ c.T)[:, :-1]
    assert_close(nll, F.cross_entropy(logits.movedim(-1, 1), labels.clamp(min=0)[:, 1:], reduction="none"))


def test_what_later_versions_of_cut_cross_entropy_take_by_name():
    e, c, targets = make()
    bias = torch.randn(V)
    want = F.cross_entropy(F.linear(e, c, bias)[:, :-2].flatten(0, 1), targets[:, 2:].flatten())
    got = cce.linear_cross_entropy(
        e, c, targets, shift=2, bias=bias, impl="cce_exact", accum_c_fp32=True, filter_e_grad=False, filter_eps=None
    )
    assert_close(got, want)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "LinearCrossEntropy"])
def test_the_positions_of_cut_cross_entropy(name):
    original = list(inspect.signature(getattr(theirs(), name)).parameters)
    assert list(inspect.signature(getattr(cce, name)).parameters)[: len(original)] == original


@pytest.mark.parametrize("name", ["LigerCrossEntropyLoss", "LigerFusedLinearCrossEntropyLoss"])
def test_the_positions_of_liger(name):
    package = pytest.importorskip("liger_kernel.transformers", reason="needs liger-kernel (pip install liger-kernel)")
    for method in ("__init__", "forward"):
        mine, other = (inspect.signature(getattr(getattr(p, name), method)).parameters for p in (liger, package))
        assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in other.values()]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"return_lse": True}, "linear_cross_entropy_with_stats has lse"),
        ({"vocab_parallel_options": object()}, "sharded weight"),
        ({"impl": "magic"}, "impl must be one of"),
        ({"reduction": "sequence"}, "reduction must be"),
        ({"ignore_index": torch.zeros(V)}, "Pass the bias by its name"),
    ],
)
def test_what_cut_cross_entropy_has_and_we_have_not_raises(keywords, message):
    with pytest.raises((NotImplementedError, ValueError, TypeError), match=message):
        cce.linear_cross_entropy(*make(), **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"accum_dtype": torch.bfloat16}, r"must be None or torch\.float32"),
        ({"use_token_scaling": True}, "by their probability"),
        ({"ce_weight": torch.ones(V), "lse_square_scale": 0.1}, "does not apply them to its z-loss"),
        ({"reduction": "sequence"}, "reduction must be"),
    ],
)
def test_what_liger_has_and_we_have_not_raises(keywords, message):
    with pytest.raises((NotImplementedError, ValueError), match=message):
        liger.LigerFusedLinearCrossEntropyLoss(**keywords)


OPTIONAL = (
    "transformers accelerate triton rich matplotlib liger_kernel cut_cross_entropy torchtitan trl verl peft lightning"
)

# imports everything with the optional packages out of reach, and prints what else was loaded
WITHOUT = f"""
import importlib, pkgutil, sys, numpy, torch
for name in {OPTIONAL.split()!r}:
    sys.modules[name] = None
before = set(sys.modules)
import fused_ppl, fused_ppl.integrations
for module in pkgutil.walk_packages(fused_ppl.integrations.__path__, "fused_ppl.integrations."):
    importlib.import_module(module.name)
print(round(fused_ppl.perplexity(torch.zeros(2, 7), torch.tensor([0, 6])).item(), 3))
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)))
"""


def test_the_integrations_load_nothing_and_work_without_what_they_serve():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    value, loaded = done.stdout.splitlines()
    assert float(value) == 7
    assert set(loaded.split()) <= {"fused_ppl", "torch", "numpy"}


def test_a_missing_torchtitan_is_said_where_it_is_needed(monkeypatch):
    from fused_ppl.integrations import torchtitan

    monkeypatch.setitem(sys.modules, "torchtitan.components.loss", None)
    torchtitan._loss_class.cache_clear()
    with pytest.raises(ImportError, match=r"torchtitan\.components\.loss"):
        _ = torchtitan.FusedLinearCrossEntropyLoss
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = torchtitan.other
