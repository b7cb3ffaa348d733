# SPDX-License-Identifier: Apache-2.0
"""Holds a loss and its gradients, on a device and at real sizes, to float64: chunk by chunk, every element.

The truth is `Options(backend="reference")` in float64 over chunks of rows; what plain PyTorch would lose is the same in
fp32. The policy that judges is fused_ppl.testing's, the one of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_ppl
from fused_ppl import Options, backends
from fused_ppl.testing import assert_as_good_as_eager, value_and_gradient

REFERENCE, TRITON = Options(backend="reference"), Options(backend="triton")
IGNORED = -100


class Totals(NamedTuple):
    """S (with z_loss) and M of all rows, and what the loss makes of them."""

    value: Tensor
    factor: float  # d value / d S
    mean: float


def head_options() -> Options:
    """The kernels, where the fused head has one; else the best that there is."""
    return TRITON if hasattr(backends.load("triton"), "nll_forward_backward") else Options()


def make_target(n: int, v: int, device: torch.device, seed: int, ignored: float = 0.05) -> Tensor:
    """The first class and the last class among them, and a share of ignored tokens."""
    generator = torch.Generator(device).manual_seed(seed)
    target = torch.randint(v, (n,), generator=generator, device=device)
    target[torch.rand(n, generator=generator, device=device) < ignored] = IGNORED
    target[:1], target[-1:] = 0, v - 1
    return target


def fill_logits(logits: Tensor, target: Tensor, seed: int) -> Tensor:
    """(N, V): deviation 3, and every second row as in a trained model, most of the mass at its target."""
    generator = torch.Generator(logits.device).manual_seed(seed)
    with torch.no_grad():
        logits.normal_(0, 3, generator=generator)
        logits[::2].scatter_(1, target[::2].clamp(min=0).unsqueeze(1), 16.0)
    return logits


def chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _part(options: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The options of some rows; a perplexity's max_nll belongs to the whole."""
    return {k: v[rows] if k == "token_weight" else v for k, v in options.items() if k != "max_nll"}


def _sums(x: Tensor, target: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    out = fused_ppl.cross_entropy_with_stats(x, target, reduction="sum", options=REFERENCE, **options)
    return out.loss, out.total_weight


def _totals(s: Tensor, m: Tensor, perplexity: bool) -> Totals:
    mean = s / m
    value = mean.exp() if perplexity else mean
    return Totals(value, float(value / m if perplexity else 1 / m), float(mean))


def _judge_value(name: str, value: Tensor, eager: Totals, truth: Totals, perplexity: bool) -> float:
    """Returns the condition: how many ulp of the result one ulp of the mean costs."""
    condition = max(1.0, truth.mean) if perplexity else 1.0
    assert_as_good_as_eager(value, eager.value.float(), truth.value, name, condition=condition)
    return condition


def judge_gradient(name: str, actual: Tensor, wide: Tensor, truth: Tensor, condition: float) -> None:
    """`wide` is eager's gradient before its one rounding to the dtype of `actual`.

    The policy measures by the largest entry, the target's: in half precision all others could be zero. So each is held
    to one rounding of its own, too.
    """
    assert_as_good_as_eager(actual, wide.to(actual.dtype), truth, name, condition=condition)
    kind, fp32 = torch.finfo(actual.dtype), torch.finfo(torch.float32)
    lost = (wide.double() - truth).abs().max()
    allowed = kind.eps * truth.abs() + 2 * lost + 4 * condition * fp32.eps * truth.abs().max()
    allowed += kind.smallest_normal * kind.eps
    over = ((actual.double() - truth).abs() - allowed).max()
    assert over <= 0, f"{name}: an element is {float(over):.3e} further from the truth than one rounding"


def judge_logits(
    loss: Callable[..., Tensor],  # fused_ppl.cross_entropy or perplexity, with reduction="mean"
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    options: dict[str, Any],
    *,
    chunk: int,
) -> str:
    """Value and every element of the gradient; returns what was found, in words."""
    perplexity = loss is fused_ppl.perplexity
    value, gradient = value_and_gradient(lambda x: loss(x, target, options=TRITON, **options), logits)
    sums = torch.zeros(2, 2, dtype=torch.float64, device=logits.device)  # (truth, eager) x (S, M)
    for rows in chunks(len(target), chunk):
        part = _part(options, rows)
        for i, dtype in enumerate((torch.float64, torch.float32)):
            sums[i] += torch.stack(_sums(logits[rows].to(dtype), target[rows], part)).double()
    truth, eager = (_totals(s, m, perplexity) for s, m in sums)
    condition = _judge_value(loss.__name__, value, eager, truth, perplexity)
    for rows in chunks(len(target), chunk):
        part, of = _part(options, rows), []
        for totals, dtype in ((truth, torch.float64), (eager, torch.float32)):
            x = logits[rows].to(dtype).requires_grad_()
            of.append(torch.autograd.grad(_sums(x, target[rows], part)[0] * totals.factor, x)[0])
        name = f"gradient of {loss.__name__}, rows {rows.start} to {rows.stop}"
        judge_gradient(name, gradient[rows], of[1], of[0], condition)
        assert not bool(gradient[rows][target[rows] == IGNORED].any()), f"{name}: an ignored row is not zero"
    return f"{float(value):.7g}, float64 {float(truth.value):.7g}"


def judge_head(
    loss: Callable[..., Tensor],  # fused_ppl.linear_cross_entropy or linear_perplexity
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    *,
    chunk: int,
) -> str:
    """Value, gradient of the hidden states and gradient of the weight."""
    perplexity, n = loss is fused_ppl.linear_perplexity, len(target)
    leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
    value = loss(*leaves, target, options=head_options())
    dhidden, dweight = torch.autograd.grad(value, leaves)
    value = value.detach()
    weight64 = weight.double()

    def sums(rows: slice, wide: bool, factor: float | None = None) -> tuple[Tensor, ...]:
        """S, M and nll of some rows; with a factor the gradient of S * factor by their logits."""
        h, w = (hidden[rows].double(), weight64) if wide else (hidden[rows], weight)
        z = (h @ w.t()).requires_grad_(factor is not None)
        out = fused_ppl.cross_entropy_with_stats(z, target[rows], reduction="sum", options=REFERENCE)
        if factor is None:
            return out.loss, out.total_weight, out.nll
        return torch.autograd.grad(out.loss * factor, z)

    parts = [[sums(rows, wide) for rows in chunks(n, chunk)] for wide in (True, False)]
    truth, eager = (
        _totals(*(torch.stack([part[i] for part in of]).sum().double() for i in (0, 1)), perplexity) for of in parts
    )
    # by chance the roundings of a whole mean may cancel in eager; by no chance do they go beyond what rows lose
    lost = torch.cat([b[2].double() - a[2] for a, b in zip(*parts, strict=True)]).square().mean().sqrt() / n**0.5
    error, size = (float(x) for x in ((value.double() - truth.value).abs(), truth.value if perplexity else 1))
    allowed = 2 * abs(float(eager.value - truth.value)) + 4 * size * float(lost)
    assert error <= allowed, f"{loss.__name__}: {float(value)!r} is {error:.3e} from the truth, {allowed:.3e} allowed"

    condition = max(1.0, truth.mean) if perplexity else 1.0
    dw64, dw32 = torch.zeros_like(weight64), torch.zeros_like(weight, dtype=torch.float32)
    for rows in chunks(n, chunk):
        (g64,), (g,) = sums(rows, True, truth.factor), sums(rows, False, eager.factor)
        name = f"gradient of the hidden states of {loss.__name__}, rows {rows.start} to {rows.stop}"
        assert_as_good_as_eager(dhidden[rows], g @ weight, g64 @ weight64, name, condition=condition)
        dw64 += g64.t() @ hidden[rows].double()
        dw32 += (g.t() @ hidden[rows]).float()
    name = f"gradient of the weight of {loss.__name__}"
    assert_as_good_as_eager(dweight, dw32.to(dweight.dtype), dw64, name, condition=condition)
    return f"{float(value):.7g}, float64 {float(truth.value):.7g}"
