# SPDX-License-Identifier: Apache-2.0
"""Random inputs, and the one tolerance that the tests, the benchmarks and `fused-ppl doctor` use.

A result is compared with the truth, which is computed in float64, and with the result of eager PyTorch. Its error may
be at most twice the largest error of eager on the same input, plus 4 ulp of the largest entry of its row:

    |actual - truth| <= 2 * max |eager - truth| + 4 * eps * max_row |truth| + condition * eps_32 * max |truth|

The maximum of the eager error is taken over the whole tensor. The last term is one rounding error of fp32 arithmetic.
It is needed because the rounding errors of eager cancel in some rows by chance, and the bound would be too small there.
For p = 0.996, p is rounded before 1 is subtracted. If its rounding errors are drawn again, eager itself exceeds 2 * its
own error in 1 % to 9 % of the rows. `condition` is 1 for a loss and L for a perplexity exp(L), because an error of one
ulp in L causes an error of L ulp in exp(L). Entries for which eager is not finite do not raise the bound.

Values (loss, nll, lse, perplexity, entropy) are fp32 for every input dtype, and eager computes them in fp32 from the
upcast input. Gradients have the dtype of the input, and eager rounds them to it once. The policy is the same on every
machine.
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
    """Random logits of shape (..., V).

    Kind "random" has a standard deviation of 3. In "flat", all logits are nearly equal. In "peaked", one class of each
    row has nearly all of the probability, as in a trained model. In "wild", some logits are -inf, and some rows are
    shifted by +1e4 or -1e4.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    if kind == "flat":
        logits = logits * 1e-3
    elif kind == "peaked":
        likely = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator, dtype=torch.int64, device="cpu")
        logits = logits.scatter_add(-1, likely, logits.new_full(likely.shape, 12.0))
    else:
        logits = logits * 3
    if kind == "wild":
        rows = logits.view(-1, shape[-1])
        rows[0::3] += 1e4
        rows[1::3] -= 1e4
        if shape[-1] > 2:
            rows[:, 1::5] = -float("inf")
    return logits.to(device=device, dtype=dtype)


def make_target(
    shape: tuple[int, ...],
    num_classes: int,
    *,
    ignored: float = 0.0,
    ignore_index: int = -100,
    seed: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random targets that contain the first and the last class. `ignored` is the share of ignored tokens."""
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
    """Raise AssertionError if `actual` does not meet the tolerance. The message shows the worst element.

    Args:
        actual: the result. Its dtype sets the ulp.
        eager: the result of eager PyTorch on the same input.
        truth: the result in float64. `actual` must have NaN and infinities at the same places.
        condition: 1, or the mean nll for a perplexity.
    """
    error, allowed = error_and_bound(actual, eager, truth, condition)
    wrong = ~(error <= allowed)
    if bool(wrong.any()):
        excess = torch.where(wrong, (error - allowed).nan_to_num(nan=float("inf")), -1.0)
        i = int(excess.flatten().argmax())
        values = [t.double().flatten()[i].item() for t in (actual, eager, truth, error, allowed)]
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements miss the tolerance; worst at flat index {i}: "
            f"got {values[0]!r}, eager {values[1]!r}, truth {values[2]!r}; "
            f"error {values[3]:.3e}, allowed {values[4]:.3e}"
        )


def error_and_bound(actual: Tensor, eager: Tensor, truth: Tensor, condition: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return |actual - truth| and the largest allowed error, elementwise. Equal infinities and NaN are no error."""
    if not actual.shape == eager.shape == truth.shape:
        shapes = f"{tuple(actual.shape)}, eager {tuple(eager.shape)}, truth {tuple(truth.shape)}"
        raise AssertionError(f"shapes differ: {shapes}")
    if truth.dtype != torch.float64:
        raise AssertionError(f"truth must be float64; got {truth.dtype}")
    eps = torch.finfo(actual.dtype).eps
    eps_fp32 = min(eps, torch.finfo(torch.float32).eps)
    truth = truth.detach()
    error, eager_error = (_absolute_error(t.detach().double(), truth) for t in (actual, eager))
    if truth.numel() == 0:
        return error, eager_error
    size = torch.where(truth.isfinite(), truth.abs(), 0.0)
    row_max = size.amax(-1, keepdim=True).expand_as(size) if size.ndim else size
    eager_max = torch.where(eager_error.isfinite(), eager_error, 0.0).max()
    return error, EAGER_FACTOR * eager_max + ULPS * eps * row_max + condition * eps_fp32 * size.max()


def _absolute_error(result: Tensor, truth: Tensor) -> Tensor:
    same = (result == truth) | (result.isnan() & truth.isnan())
    return torch.where(same, 0.0, (result - truth).abs().nan_to_num(nan=float("inf"), posinf=float("inf")))


def value_and_gradient(
    loss: Callable[[Tensor], Tensor], input: Tensor, upstream: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the value of a loss, and the gradient of its input for the given upstream gradient."""
    x = input.detach().requires_grad_()
    value = loss(x)
    grad = torch.as_tensor(upstream, dtype=value.dtype, device=value.device).expand(value.shape)
    (gradient,) = torch.autograd.grad(value, x, grad)
    return value.detach(), gradient
