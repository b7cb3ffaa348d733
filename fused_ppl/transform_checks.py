# SPDX-License-Identifier: Apache-2.0
"""Errors for transforms of torch that the losses do not support: jvp, vmap, second derivatives, single ops.

They raise an error where torch would otherwise return a wrong gradient or fail without naming the cause.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor


def fail_second_derivative() -> NoReturn:
    raise RuntimeError(
        "fused_ppl computes first derivatives only; got a request for a derivative of its gradient. "
        "Use Options(backend='reference'), which plain autograd can differentiate any number of times."
    )


def fail_jvp(*_: object) -> NoReturn:
    raise NotImplementedError(
        "fused_ppl has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, forward_ad). Use "
        "Options(backend='reference'), or the reverse-mode transforms torch.func.grad and vjp."
    )


def fail_vmap(*_: object) -> NoReturn:
    raise NotImplementedError(
        "fused_ppl has no batching rule for torch.vmap. Pass all samples in one call, with reduction='none' or "
        "'sequence' for a value per sample, or use Options(backend='reference')."
    )


def fail_batched_inplace() -> NoReturn:
    raise NotImplementedError(
        "inplace_backward=True writes the gradient over input, so it can compute only one gradient; got a batch of "
        "upstream gradients (is_grads_batched, jacrev). Use Options(inplace_backward=False)."
    )


def check_no_graph_of_ops(inputs: Iterable[Tensor | None], name: str) -> None:
    """For values that have a gradient only by an autograd.Function, where torch traces ops and no Function."""
    traced = torch.compiler.is_compiling() and torch.is_grad_enabled()
    # Dynamo says of an argument of torch.func.grad itself that it requires none; it does not say so of its views
    if traced and any(t is not None and (t.requires_grad or t.view_as(t).requires_grad) for t in inputs):
        raise NotImplementedError(
            f"fused_ppl.{name} has no gradient in torch.export and in a transform of torch.func under torch.compile; "
            "got an input that requires a gradient there. Compile a step that ends in backward(), export under "
            "torch.no_grad(), or use Options(backend='reference')."
        )


def fail_op_gradient(name: str) -> NoReturn:
    raise NotImplementedError(
        f"fused_ppl.{name} has a gradient only as a part of its loss; got the op alone, as from torch.export or a "
        "transform of torch.func under torch.compile. Compile a step that ends in loss.backward() or "
        "torch.autograd.grad, or leave group, vocab_group and the compact plan out."
    )


def check_no_capture() -> None:
    """Raises where a CUDA graph would keep a number that the CPU reads now."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph cannot read logit_scale, softcap, z_loss or max_nll again in each replay; got a tensor while "
            "one is captured. Pass a Python number, or compile without CUDA graphs (mode='default')."
        )
