# SPDX-License-Identifier: Apache-2.0
"""The published kernel gives the values and gradients of PyTorch in float64, computed from full logits.

To test a folder that is not published: LOCAL_KERNELS="@REPO_ID@=path/to/it" pytest tests
"""

import pytest
import torch
import torch.nn.functional as F

import kernels

fused_ppl = kernels.get_kernel("@REPO_ID@", version=0, trust_remote_code=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, V, D = 50, 301, 40


def head():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator) / 4
    target = torch.randint(V, (N,), generator=generator)
    target[::5] = -100
    return hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_(), target.to(DEVICE)


def assert_same(loss, leaves, of_logits):
    gradients = torch.autograd.grad(loss, leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = of_logits(wide[0] @ wide[1].T)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for found, true in zip(gradients, torch.autograd.grad(expected, wide), strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-5 * true.abs().max().item())


@pytest.mark.kernels_ci
def test_linear_cross_entropy():
    hidden, weight, target = head()
    loss = fused_ppl.linear_cross_entropy(hidden, weight, target)
    assert_same(loss, (hidden, weight), lambda z: F.cross_entropy(z, target))


@pytest.mark.kernels_ci
def test_linear_perplexity():
    hidden, weight, target = head()
    perplexity = fused_ppl.linear_perplexity(hidden, weight, target)
    assert_same(perplexity, (hidden, weight), lambda z: F.cross_entropy(z, target).exp())


@pytest.mark.kernels_ci
def test_causal_loss_layer():
    hidden, weight, target = head()
    loss = fused_ppl.layers.LigerForCausalLMLoss()(
        None,
        None,
        V,
        num_items_in_batch=100,
        shift_labels=target,
        hidden_states=hidden,
        lm_head_weight=weight,
        hidden_size=D,
        final_logit_softcapping=3.0,
    )
    assert_same(loss, (hidden, weight), lambda z: F.cross_entropy(3 * torch.tanh(z / 3), target, reduction="sum") / 100)
