# SPDX-License-Identifier: Apache-2.0
"""Checks of log-probabilities, of losses made of them, and of the values of a teacher that names few classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ppl.checks import check_device, check_no_grad, check_tensor


def check_token_loss(loss: object, log_prob: Tensor) -> None:
    """What the function of `linear_token_loss` returns."""
    if not isinstance(loss, Tensor) or loss.shape != log_prob.shape:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            "fn must return one loss for each token that it is given, without a sum or a mean; "
            f"got {got} for tokens of shape {tuple(log_prob.shape)}."
        )


def check_depends_on_nothing_else(loss: Tensor, *known: Tensor) -> None:
    """The function of `linear_token_loss` has a gradient for these leaves only: any other would silently get none."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is tensor for tensor in known):
            raise ValueError(
                f"fn has a gradient for log_prob and entropy only, but it uses a tensor of shape {tuple(leaf.shape)} "
                "that requires grad. Detach it, or use linear_log_probs, which any function may follow."
            )
        nodes += [following for following, _ in node.next_functions]


def check_exact(options: Any, what: str) -> None:
    """Check that the options ask for nothing that only cross-entropy and perplexity have. `what` is called."""
    if options.inplace_backward:
        raise ValueError(
            f"inplace_backward=True is for cross_entropy and perplexity from logits; got it for {what}. "
            "Use Options(inplace_backward=False)."
        )
    asked = (options.gradient_tolerance, options.gradient_columns, options.screen)
    if any(value is not None for value in asked):
        raise ValueError(
            "gradient_tolerance, gradient_columns and screen belong to the compact plan, which only "
            f"linear_cross_entropy and linear_perplexity have; got {asked} for {what}. Leave them None."
        )


def check_per_token(name: str, value: object, target: Tensor) -> None:
    """Check a tensor of any dtype with one constant for each token."""
    constant = check_tensor(name, value)
    if constant.shape != target.shape:
        shape = tuple(target.shape)
        raise ValueError(f"{name} must have shape {shape}, the shape of target; got {tuple(constant.shape)}.")
    check_device(name, constant, target)
    check_no_grad(name, constant)


MOST_PROBABILITY = 1.05  # of all named classes of a token: log-probabilities in bfloat16 are rounded


def check_named_classes(ids: Tensor, given: Tensor, total: Tensor, num_classes: int) -> None:
    """Check the values of a top-k teacher: ids (N, K), and the sums of its probabilities (N,).

    Callers do this on a CPU. On a GPU they do it with FUSED_PPL_DEBUG=1 only, because it waits for the GPU.
    """
    if ids.is_meta or not ids.numel():
        return
    wrong = (ids < 0) | (ids >= num_classes)
    if bool(wrong.any()):
        row, k = (int(i) for i in wrong.nonzero()[0])
        raise IndexError(
            f"teacher_input.ids must be in [0, {num_classes}); got {int(ids[row, k])} for token {row}. "
            "An entry that names no class has the log-probability -inf."
        )
    none = torch.arange(-1, -1 - ids.shape[1], -1, dtype=ids.dtype, device=ids.device)
    in_order = torch.where(given, ids, none).sort(1).values
    twice = (in_order[:, 1:] == in_order[:, :-1]).any(1)
    if bool(twice.any()):
        row = int(twice.nonzero()[0])
        raise ValueError(f"teacher_input.ids must differ within a token; got {ids[row].tolist()} for token {row}.")
    if bool((total > MOST_PROBABILITY).any()):
        row = int(total.argmax())
        raise ValueError(
            f"exp(teacher_input.log_probs) must add up to at most 1 for each token; got {float(total[row]):.4g} for "
            f"token {row}. Pass log-probabilities, logits.log_softmax(-1) at the ids, and not logits."
        )
