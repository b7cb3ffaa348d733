# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of the adapter are those of the reference in float64. verl's own kernels need a GPU.

Where verl is installed, the arguments are compared with its own. They were read in its repository, commit 04fb04cd.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.testing import assert_close

from fused_ppl import reference
from fused_ppl.integrations import verl as adapter
from fused_ppl.spec import LossSpec

B, T, V, D = 2, 5, 131, 16
ARGUMENTS = [("temperature", 1.0), ("reduction", "none"), ("dist_process_group", None)]


def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, T, D, generator=generator), torch.randn(V, D, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (B, T), generator=generator)


def expected(hidden, weight, labels, temperature):
    """Return the log-probabilities and entropies in float64, as functions of the same tensors."""
    logits = hidden.double().flatten(0, -2) @ weight.double().T
    spec = LossSpec.of(reduction="none", ignore_index=None, logit_scale=1 / temperature, softcap=None, stats=True)
    return reference.log_probs(logits, labels.flatten(), spec)


def test_the_arguments_are_those_of_verl():
    mine = [(p.name, p.default) for p in inspect.signature(adapter.linear_cross_entropy).parameters.values()]
    assert [name for name, _ in mine[:3]] == ["hidden", "weight", "labels"] and mine[3:] == ARGUMENTS
    theirs = pytest.importorskip("verl.utils.kernel.linear_cross_entropy", reason="needs verl, which has no CPU kernel")
    other = inspect.signature(theirs.linear_cross_entropy).parameters.values()
    assert [name for name, _ in mine] == [p.name for p in other]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
def test_same_values_and_gradients(temperature, reduction, backend, monkeypatch):
    monkeypatch.setenv("FUSED_PPL_BACKEND", backend)
    inputs = make()
    log_prob, entropy = adapter.linear_cross_entropy(*inputs, temperature, reduction)
    want = expected(*inputs, temperature)
    reduced = want.log_prob if reduction == "none" else getattr(want.log_prob, reduction)()
    assert log_prob.dtype == entropy.dtype == torch.float32 and entropy.shape == (B * T,)
    assert_close(log_prob.double(), reduced, rtol=1e-5, atol=1e-5)
    assert_close(entropy.double(), want.entropy, rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(-2, 3, log_prob.numel()).view(log_prob.shape)
    loss = (log_prob * upstream).sum() - 0.3 * entropy.sum()
    truth = (reduced * upstream.double()).sum() - 0.3 * want.entropy.sum()
    for mine, other in zip(torch.autograd.grad(loss, inputs[:2]), torch.autograd.grad(truth, inputs[:2]), strict=True):
        assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_none_stands_for_the_default_and_capitals_are_allowed():
    inputs = make()
    plain = adapter.linear_cross_entropy(*inputs)
    assert_close(adapter.linear_cross_entropy(*inputs, None, None), plain)
    assert_close(adapter.linear_cross_entropy(*inputs, 1.0, "Mean")[0], plain[0].mean())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dist_process_group": object()}, "dist_process_group must be None"),
        ({"reduction": "batchmean"}, "reduction must be 'none', 'sum' or 'mean'; got 'batchmean'"),
        ({"temperature": 0.0}, r"temperature must be > 0; got 0\.0"),
    ],
)
def test_what_verl_has_and_we_have_not_raises(keywords, message):
    with pytest.raises((NotImplementedError, ValueError), match=message):
        adapter.linear_cross_entropy(*make(), **keywords)
