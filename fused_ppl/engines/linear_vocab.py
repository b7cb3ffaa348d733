# SPDX-License-Identifier: Apache-2.0
"""The fused LM head by slices of the vocabulary: backward recomputes the logits of a slice and writes its dW once.

For per-token upstream gradients, which forward cannot know, and for memory too tight for an fp32 gradient of the
weight. Forward is that of `linear_rows` without gradients.
"""

from __future__ import annotations

import torch

from fused_ppl import backends, plan, reduction
from fused_ppl.engines import LIBRARY, memory, without_autocast
from fused_ppl.engines.head import Head, empty_gradients
from fused_ppl.spec import SPEC_SCHEMA, LossSpec

LIBRARY.define(
    "linear_vocab_backward(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    "Tensor? token_weight, Tensor lse, Tensor nll, Tensor loss_factor, Tensor perplexity_factor, Tensor? grad_loss, "
    f"Tensor? grad_perplexity, {SPEC_SCHEMA}, str backend, ScalarType dtype, bool[3] grads, int? memory_budget, "
    "int first, int num_classes) "
    "-> (Tensor, Tensor, Tensor)"
)


@without_autocast
def _backward(hidden, linear_weight, linear_bias, target, weight, token_weight, lse, nll, *rest):  # type: ignore[no-untyped-def]
    loss_factor, perplexity_factor, grad_loss, grad_perplexity, *spec_args, backend_name, dtype, grads, budget = rest[
        :-2
    ]
    v0, num_classes = rest[-2:]  # the weight may be that of a shard of the vocabulary
    spec, backend = LossSpec.of(*spec_args), backends.load(backend_name)
    v, d = linear_weight.shape
    flat, labels = hidden.reshape(-1, d), target.reshape(-1)
    head = Head(flat, linear_weight, linear_bias, labels, spec, dtype, budget)
    of_s, of_z = reduction.row_upstream(
        grad_loss, grad_perplexity, loss_factor, perplexity_factor, spec, target.shape, nll.dtype
    )
    u = None if token_weight is None else token_weight.reshape(-1)
    of_s, of_z, lse, nll, u = (head.rows(t) for t in (of_s, of_z, lse.reshape(-1), nll.reshape(-1), u))  # type: ignore[assignment]
    n = head.target.shape[0]
    case = plan.LinearCase(
        n, v, d, head.dtype.itemsize, hidden.device.type, tuple(grads), budget, converts=head.converts
    )
    columns = plan.linear_plan(case, "vocab").columns

    dhidden, dweight, dbias = empty_gradients(hidden, linear_weight, linear_bias, grads)
    h = head.hidden.to(head.dtype)
    dh = torch.zeros((n, d) if grads[0] else (0,), dtype=head.wide, device=hidden.device)
    buffer = memory.empty((n * columns,), head.dtype, hidden.device, brief=True)  # that of forward, if it is as large
    for first in range(0, v, columns):
        last = min(first + columns, v)
        g = buffer[: n * (last - first)].view(n, last - first)
        head.logits(h, g, first)
        here = (v0 + first, num_classes)
        backend.nll_backward(g, head.target, lse, nll, of_s, of_z, spec, weight, u, g, budget, here)
        if grads[0]:
            head.add_hidden_gradient(g, dh, first)
        if grads[1] and dweight.dtype == g.dtype:
            torch.mm(g.t(), h, out=dweight[first:last])
        elif grads[1]:
            dweight[first:last] = torch.mm(g.t(), h)
        if grads[2]:
            dbias[first:last] = g.sum(0, dtype=head.wide)
    if grads[0]:
        dhidden.copy_(head.spread(dh, labels.shape[0]).view(hidden.shape))
    return dhidden, dweight, dbias


LIBRARY.impl("linear_vocab_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fused_ppl::linear_vocab_backward",
    lambda hidden, linear_weight, linear_bias, *rest: empty_gradients(
        hidden, linear_weight, linear_bias, rest[-4], fake=True
    ),
    lib=LIBRARY,
)
