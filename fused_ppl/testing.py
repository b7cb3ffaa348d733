# SPDX-License-Identifier: Apache-2.0
"""Inputs and the tolerance policy, for the tests, the benchmarks and `fused-ppl doctor`.

The policy is the same on every machine. A result is compared with the float64 truth, and may be wrong by at most
twice what eager PyTorch is wrong by on the same input, plus 4 ulp of the largest entry of its row:

    |actual - truth| <= 2 * max |eager - truth| + 4 * eps * max_row |truth| + condition * eps_32 * max |truth|

What eager is wrong by is taken over the whole tensor, and the last term, one rounding of fp32 arithmetic, is there
because a row in which eager's roundings happen to cancel would be held to nothing: p = 0.996 is rounded before the 1
is subtracted, and eager misses 2 * its own error in 1 % to 9 % of the rows when the roundings are drawn again. One ulp
of L is L ulp of exp(L): `condition` is L for a perplexity. Where eager is not finite it excuses nothing.

Values (loss, nll, lse, perplexity, entropy) are fp32 whatever the input dtype, and eager computes them in fp32 from
the upcast input. Gradients have the dtype of the input, and eager rounds them to it once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EAGER_FACTOR = 2.0
ULPS = 4.0

KINDS = ("random", "flat", "peaked", "wild")


def make_logits(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    kind: str = "random",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Logits of shape (..., V).

    "random" (deviation 3), "flat" (all nearly equal), "peaked" (one class holds nearly all the mass, as in a trained
    model), or "wild" (-inf, and rows at +1e4 and -1e4).
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    if kind == "flat":
        x = x * 1e-3
    elif kind == "peaked":
        top = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator, dtype=torch.int64, device="cpu")
        x = x.scatter_add(-1, top, x.new_full(top.shape, 12.0))
    elif kind == "wild":
        x = x * 3
        rows = x.view(-1, shape[-1])
        rows[0::3] += 1e4
        rows[1::3] -= 1e4
        if shape[-1] > 2:
            rows[:, 1::5] = -float("inf")
    else:
        x = x * 3
    return x.to(device=device, dtype=dtype)


def make_target(
    shape: tuple[int, ...],
    num_classes: int,
    *,
    ignored: float = 0.0,
    ignore_index: int = -100,
    seed: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Targets with the first class and the last class among them, and a share of ignored tokens."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(num_classes, shape, generator=generator, dtype=torch.int64, device="cpu")
    flat = target.view(-1)
    if flat.numel() > 1:
        flat[0], flat[-1] = 0, num_classes - 1
    if ignored:
        flat[torch.rand(flat.shape, generator=generator, dtype=torch.float32, device="cpu") < ignored] = ignore_index
    return target.to(device)


def assert_as_good_as_eager(
    actual: Tensor, eager: Tensor, truth: Tensor, name: str = "result", *, condition: float = 1.0
) -> None:
    """Hold a result to the policy above; on failure name the worst element and the three values.

    Args:
        actual: the result to judge; its dtype sets the ulp.
        eager: what eager PyTorch gives on the same input.
        truth: float64. NaN and infinities must stand at the same places in `actual`.
        condition: how many ulp of the result one ulp inside costs; the mean nll for a perplexity.
    """
    error, allowed = error_and_bound(actual, eager, truth, condition)
    bad = ~(error <= allowed)
    if bool(bad.any()):
        excess = torch.where(bad, (error - allowed).nan_to_num(nan=float("inf")), -1.0)
        i = int(excess.flatten().argmax())
        values = [t.double().flatten()[i].item() for t in (actual, eager, truth, error, allowed)]
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements miss the tolerance; worst at flat index {i}: "
            f"got {values[0]!r}, eager {values[1]!r}, truth {values[2]!r}; "
            f"error {values[3]:.3e}, allowed {values[4]:.3e}"
        )


def error_and_bound(actual: Tensor, eager: Tensor, truth: Tensor, condition: float = 1.0) -> tuple[Tensor, Tensor]:
    """|actual - truth| and what the policy allows, elementwise. Equal infinities and NaN count as no error."""
    if not actual.shape == eager.shape == truth.shape:
        shapes = f"{tuple(actual.shape)}, eager {tuple(eager.shape)}, truth {tuple(truth.shape)}"
        raise AssertionError(f"shapes differ: {shapes}")
    if truth.dtype != torch.float64:
        raise AssertionError(f"truth must be float64; got {truth.dtype}")
    eps = torch.finfo(actual.dtype).eps
    inside = min(eps, torch.finfo(torch.float32).eps)
    truth = truth.detach()
    error, lost = (_distance(t.detach().double(), truth) for t in (actual, eager))
    size = torch.where(truth.isfinite(), truth.abs(), 0.0)
    if truth.numel() == 0:
        return error, lost
    of_row = size.amax(-1, keepdim=True).expand_as(size) if size.ndim else size
    lost = torch.where(lost.isfinite(), lost, 0.0).max()
    return error, EAGER_FACTOR * lost + ULPS * eps * of_row + condition * inside * size.max()


def _distance(a: Tensor, truth: Tensor) -> Tensor:
    same = (a == truth) | (a.isnan() & truth.isnan())
    return torch.where(same, 0.0, (a - truth).abs().nan_to_num(nan=float("inf"), posinf=float("inf")))


def value_and_gradient(
    loss: Callable[[Tensor], Tensor], input: Tensor, upstream: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """The value of a loss and the gradient of its input under an upstream gradient."""
    x = input.detach().requires_grad_()
    value = loss(x)
    grad = torch.as_tensor(upstream, dtype=value.dtype, device=value.device).expand(value.shape)
    (gradient,) = torch.autograd.grad(value, x, grad)
    return value.detach(), gradient
