# SPDX-License-Identifier: Apache-2.0
"""The words for what torch's transforms (jvp, vmap, second derivatives, bare ops) may not do with a loss of ours."""

from __future__ import annotations

from typing import NoReturn


def fail_second_derivative() -> NoReturn:
    raise RuntimeError(
        "fused_ppl computes first derivatives only, and this backward asks for a derivative of its gradient. "
        "Use Options(backend='reference'), which plain autograd differentiates any number of times."
    )


def fail_jvp(*_: object) -> NoReturn:
    raise NotImplementedError(
        "fused_ppl has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, forward_ad). Use "
        "Options(backend='reference'), or torch.func.grad and vjp, which go backwards."
    )


def fail_vmap(*_: object) -> NoReturn:
    raise NotImplementedError(
        "fused_ppl has no batching rule for torch.vmap. Give the loss all samples at once, with reduction='none' or "
        "'sequence' for a value of each, or use Options(backend='reference')."
    )


def fail_batched_inplace() -> NoReturn:
    raise NotImplementedError(
        "inplace_backward=True writes the gradient over input, which has room for one; got a batch of upstream "
        "gradients (is_grads_batched, jacrev). Use Options(inplace_backward=False)."
    )


def fail_op_gradient(name: str) -> NoReturn:
    raise NotImplementedError(
        f"fused_ppl.{name} has a gradient only as a part of its loss, and a transform of torch.func under "
        "torch.compile, or torch.export, has taken that apart. Compile a step that ends in loss.backward() or "
        "torch.autograd.grad instead, or leave group, vocab_group and the compact plan out."
    )
