# SPDX-License-Identifier: Apache-2.0
"""Checks of what only log-probabilities and losses made of them take; `checks` has those of every loss."""

from __future__ import annotations

from typing import Any

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
