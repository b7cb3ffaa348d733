# SPDX-License-Identifier: Apache-2.0
"""The fused LM head for about half of the FLOPs: each group of rows keeps the columns of its gradient that matter.

    logits = h W^T -> sums over rows and columns -> kept columns J -> dh = G_J W_J + d (c^T W)/s,  dW[J] += G_J^T h
    and once, over all groups, dW += c (d^T h)/s

The rest of the gradient becomes the product of its row sums d and its column sums c (`engines.compact`). Loss and lse
are those of `linear_rows`, bit for bit. With a screen the first product is a cheap one, and only the kept columns are
computed in full. A shard of the vocabulary has been told lse and nll, and computes its logits again.

The largest buffers are a chunk of logits, and the float32 gradient of the weight, V x D.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl import backends, plan, reduction
from fused_ppl.engines import compact, memory
from fused_ppl.engines.head import SLICE, Chunk, HeadLoop, empty_unscaled, slices
from fused_ppl.engines.linear_rows import stats_of_all
from fused_ppl.engines.ops import op
from fused_ppl.engines.screen import Screen
from fused_ppl.records import (
    ColumnSums,
    Compact,
    CompactGradient,
    CompactSums,
    HeadExecution,
    HeadInputs,
    Normalizers,
    RowFactors,
    RowStats,
    RowUpstream,
    Shard,
    TokenInputs,
)
from fused_ppl.spec import LossSpec

REUSED_FROM = 4 * 2**20  # bytes of a buffer that waits for the next step


def _fake(inputs: HeadInputs, spec: LossSpec, execution: HeadExecution, asked: Compact) -> CompactSums:
    dtype = reduction.wide_dtype(execution.dtype)
    tokens = reduction.empty_token_sums(inputs.hidden, inputs.target, spec, dtype)
    errors = (inputs.hidden.new_empty((), dtype=torch.float32) for _ in range(2))
    return CompactSums(tokens, empty_unscaled(inputs, execution), *errors)


@op(_fake)
def linear_compact(inputs: HeadInputs, spec: LossSpec, execution: HeadExecution, asked: Compact) -> CompactSums:
    groups = _GroupLoop(inputs, spec, execution, asked=asked)
    groups.run()
    rows = stats_of_all(groups.head, groups.parts, spec, inputs.target.numel())
    tokens = reduction.token_sums(rows, spec, inputs.target.shape)
    return CompactSums(tokens, groups.loop.finished(), groups.residual(), groups.mean_loss_error(rows.weight))


def _shard_fake(
    inputs: HeadInputs, spec: LossSpec, execution: HeadExecution, asked: Compact, **_: object
) -> CompactGradient:
    return CompactGradient(empty_unscaled(inputs, execution), inputs.hidden.new_empty((), dtype=torch.float32))


@op(_shard_fake)
def linear_compact_shard(
    inputs: HeadInputs,
    spec: LossSpec,
    execution: HeadExecution,
    asked: Compact,
    *,
    normalizers: Normalizers,
    shard: Shard,
) -> CompactGradient:
    """The gradients of a shard of the vocabulary, whose lse and nll over all classes are known."""
    groups = _GroupLoop(inputs, spec, execution, asked=asked, normalizers=normalizers, shard=shard)
    groups.run()
    return CompactGradient(groups.loop.finished(), groups.residual())


class Group(NamedTuple):
    """Rows that share their kept columns."""

    rows: slice  # of those that take part
    hidden: Tensor  # (R, D)
    logits: Tensor  # (R, V): of the screen, where there is one
    target_logit: Tensor  # (R,)
    tokens: TokenInputs
    label: Tensor  # (R,): the target's column, inside the range everywhere; V where it is in another shard


class Restricted(NamedTuple):
    """What the kept columns of a group say of its rows."""

    stats: RowStats
    weight: Tensor  # (K, D): the kept rows of the weight
    gradient: Tensor  # (R, K): of the logits
    rest: Tensor  # (R,): the row sums of what is not kept
    loss_error: Tensor  # (): the screen's error of the loss, summed


class Product(NamedTuple):
    """The rank-one part of the gradient of a group: a factor of each row times a factor of each column."""

    rows: slice
    of_rows: Tensor  # (R,)
    of_columns: Tensor  # (V,)


class _GroupLoop:
    """Goes over groups of rows, and holds what they add to."""

    def __init__(
        self,
        inputs: HeadInputs,
        spec: LossSpec,
        execution: HeadExecution,
        *,
        asked: Compact,
        normalizers: Normalizers | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.loop = HeadLoop(inputs, spec, execution, kind="compact", compact=asked, shard=shard)
        self.head, self.spec, self.shard, self.budget = self.loop.head, spec, shard, execution.memory_budget
        self.rows, self.columns = backends.load(execution.backend), backends.load_compact(execution.backend)
        for gradient in self.loop.unscaled:
            gradient.zero_()
        self.grad_hidden, (_, self.grad_weight, self.grad_bias) = self.loop.grad_hidden, self.loop.unscaled
        self.needed = tuple(t.numel() > 0 for t in (self.grad_hidden, self.grad_weight, self.grad_bias))
        (v, d), n, device = inputs.linear_weight.shape, self.head.num_rows, inputs.hidden.device
        self.weight = None if inputs.weight is None else inputs.weight.to(self.head.wide)  # of all classes
        self.own_weight = self.weight  # of this shard's
        if shard is not None and self.weight is not None:
            self.own_weight = self.weight[shard.first :][:v]
        self.normalizers: Normalizers | None = None
        if normalizers is not None:
            self.normalizers = Normalizers(*(self.head.of_rows(t.reshape(-1)) for t in normalizers))
        self.screen = None if asked.screen is None else Screen(asked.screen, inputs.linear_weight, inputs.linear_bias)
        self.choice = compact.Choice(inputs.linear_weight, asked.gradient_tolerance, plan.kept_columns(asked, v))
        row_bytes = max(4, self.head.dtype.itemsize) * (1 + (spec.stats or spec.softcap is not None))
        size = plan.whole_chunks(self.loop.plan.group, row_bytes, self.loop.case, torch.get_num_threads())
        self.group_rows = size
        self.parts: list[RowStats] = []
        self.products: list[Product] = []
        wide = reduction.sum_dtype(device)
        self.error, self.norm, self.loss_error = (self.head.zeros(1).to(wide) for _ in range(3))
        # fresh pages cost more than what is computed in them
        most = max(self.choice.most, min(size, max(n, 1), v))  # the targets of a group are kept
        empty = functools.partial(memory.empty, device=device, least=REUSED_FROM)
        self.kept_weight = empty((most, d), self.head.dtype)
        self.kept_gradient = empty((min(size, max(n, 1)) * most,), self.head.dtype)
        self.product = empty((min(most, SLICE), d), self.head.dtype if self.head.on_cpu else self.head.wide)
        self.wide_product = self.product
        if self.product.dtype != self.grad_weight.dtype:
            self.wide_product = empty(self.product.shape, self.grad_weight.dtype)

    def run(self) -> None:
        """All groups, then the rank-one products of all at once."""
        for chunk in self.loop.chunks(None if self.screen is None else self.screen.dtype):
            (self.screen or self.head).logits(chunk.hidden, chunk.logits)
            for start in range(0, chunk.hidden.shape[0], self.group_rows):
                self.add_group(self.group(chunk, start))
        self.add_products()

    def group(self, chunk: Chunk, start: int) -> Group:
        here = slice(start, min(start + self.group_rows, chunk.hidden.shape[0]))
        rows = slice(chunk.rows.start + here.start, chunk.rows.start + here.stop)
        tokens = chunk.tokens.of_rows(here)._replace(weight=self.weight)
        label = self.label(tokens.target, chunk.logits.shape[1])
        return Group(rows, chunk.hidden[here], chunk.logits[here], chunk.target_logit[here], tokens, label)

    def label(self, target: Tensor, num_classes: int) -> Tensor:
        ignore = self.spec.ignore_index
        label = (target if ignore is None else torch.where(target == ignore, 0, target)).long()
        if self.shard is None:
            return label.clamp(0, num_classes - 1)
        label = label - self.shard.first
        return torch.where((label >= 0) & (label < num_classes), label, num_classes)

    def known_stats(self, rows: slice) -> RowStats:
        """As the backends take it, who look at lse and nll alone: the loss of these rows has been made elsewhere."""
        assert self.normalizers is not None
        nll = self.normalizers.nll[rows]
        return RowStats(nll, nll, nll, self.normalizers.lse[rows], None, None)

    def sums(self, group: Group) -> tuple[RowStats, ColumnSums, RowFactors]:
        """What is known of the rows, and the sums over their columns."""
        tokens = group.tokens
        weighted = tokens.token_weight is not None or tokens.weight is not None or self.spec.z_loss > 0
        signed = self.needed[2] and weighted
        if self.normalizers is None or self.shard is None:
            return self.columns.nll_columns(
                group.logits,
                tokens,
                self.spec,
                target_logit=group.target_logit,
                signed=signed,
                memory_budget=self.budget,
            )
        columns, factors = self.columns.nll_columns_shard(
            group.logits,
            tokens,
            self.spec,
            target_logit=group.target_logit,
            normalizers=Normalizers(*(t[group.rows] for t in self.normalizers)),
            signed=signed,
            memory_budget=self.budget,
            shard=self.shard,
        )
        return self.known_stats(group.rows), columns, factors

    def add_group(self, group: Group) -> None:
        stats, columns, factors = self.sums(group)
        norm = compact.norm_square(columns, factors)
        self.norm += norm
        count = self.choice.of_group(columns, factors, group.label)
        while count is not None:
            kept = compact.keep(columns, group.label, count)
            found = self.restrict(group, stats, factors, kept)
            error = compact.error_square(kept, found.rest)
            enough = self.choice.after(count, error, norm)
            if enough == count:
                self.error += error
                self.add(group, found, kept)
                self.add_bias(group, columns, factors, kept=kept, gradient=found.gradient)
                self.parts.append(found.stats)
                self.loss_error += found.loss_error
                break
            count = enough
        else:
            self.parts.append(self.add_exact(group))
        if factors.smoothing.numel() and count is not None:
            w = factors.smoothing.new_ones(columns.size.shape) if self.own_weight is None else self.own_weight
            self.products.append(Product(group.rows, -factors.smoothing, w))
            if self.needed[2]:
                self.grad_bias.sub_(w * factors.smoothing.sum())

    def add_exact(self, group: Group) -> RowStats:
        """All columns of a group, as the plans "rows" and "vocab" do it."""
        head, z = self.head, group.logits
        if self.screen is not None:
            z = torch.empty_like(z, dtype=head.dtype)
            head.logits(group.hidden, z)
        if self.normalizers is None:
            stats = self.rows.nll_forward_backward(
                z,
                group.tokens,
                self.spec,
                target_logit=group.target_logit,
                upstream=1.0,
                memory_budget=self.budget,
            )
        else:
            stats = self.known_stats(group.rows)
            ones = torch.ones_like(stats.nll)
            self.rows.nll_backward(
                z,
                group.tokens,
                self.spec,
                normalizers=Normalizers(*(t[group.rows] for t in self.normalizers)),
                upstream=RowUpstream(ones, ones if self.spec.z_loss else None),
                out=z,
                memory_budget=self.budget,
                shard=self.shard,
            )
        if self.needed[0]:
            head.add_hidden_gradient(z, self.grad_hidden[group.rows])
        if self.needed[1]:
            head.add_weight_gradient(z, group.hidden, self.grad_weight, fresh=False)
        if self.needed[2]:
            self.grad_bias += z.sum(0, dtype=self.grad_bias.dtype)
        return stats

    def restrict(self, group: Group, stats: RowStats, factors: RowFactors, kept: compact.Kept) -> Restricted:
        """The rows of the weight and the columns of the gradient that are kept."""
        head, index = self.head, kept.kept.columns
        count, n = index.shape[0], group.hidden.shape[0]
        g = self.kept_gradient[: n * count].view(n, count)
        w = self.kept_weight[:count]
        if head.weight.dtype == w.dtype:
            torch.index_select(head.weight, 0, index, out=w)
        else:
            w.copy_(head.weight.index_select(0, index))
        if self.screen is None:
            rest = self.columns.nll_kept(
                group.logits, kept.kept, self.spec, stats=stats, factors=factors, out=g, memory_budget=self.budget
            )
            return Restricted(stats, w, g, rest, rest.new_zeros(()))
        if head.bias is None:
            torch.mm(group.hidden, w.t(), out=g)
        else:
            torch.addmm(head.bias[index].to(g.dtype), group.hidden, w.t(), out=g)
        stats, rest, wrong = self.columns.nll_rescreen(
            g,
            kept.kept,
            self.spec,
            screened=group.logits,
            stats=stats,
            factors=factors,
            weight_sum=head.weight.shape[0] if self.weight is None else self.weight.sum(),
            memory_budget=self.budget,
        )
        return Restricted(stats, w, g, rest, (wrong * (factors.a - factors.rest).abs()).sum())

    def add(self, group: Group, found: Restricted, kept: compact.Kept) -> None:
        """The products of the kept columns, and the factors of the rank-one product."""
        share = kept.tail / kept.tail.sum().clamp_min(torch.finfo(kept.tail.dtype).tiny)
        self.products.append(Product(group.rows, found.rest, share.to(found.rest.dtype)))
        g = found.gradient
        if self.needed[0]:
            self.head.add_product(self.grad_hidden[group.rows], g, found.weight)
        if not self.needed[1]:
            return
        # by slices that stay in cache
        index = kept.kept.columns
        for s in slices(index.shape[0], SLICE):
            product = self.product[: s.stop - s.start]
            if self.head.on_cpu or product.dtype == g.dtype:
                torch.mm(g[:, s].t(), group.hidden, out=product)
            else:
                torch.mm(g[:, s].t(), group.hidden, out_dtype=product.dtype, out=product)
            wide = self.wide_product[: s.stop - s.start]
            self.grad_weight.index_add_(0, index[s], wide if wide.dtype == product.dtype else wide.copy_(product))

    def add_bias(
        self, group: Group, columns: ColumnSums, factors: RowFactors, *, kept: compact.Kept, gradient: Tensor
    ) -> None:
        """The column sums, all of them exact; in the kept columns those of a screen would be too coarse."""
        if not self.needed[2]:
            return
        out = self.grad_bias
        sums = (columns.total if columns.total.numel() else columns.size).to(out.dtype)
        if self.screen is None:
            out += sums
            compact.add_repeated(out, group.label.clamp(max=out.shape[0] - 1), factors.at_target)  # 0 from elsewhere
        else:
            out += sums.index_fill(0, kept.kept.columns, 0)
            out.index_add_(0, kept.kept.columns, gradient.sum(0, dtype=out.dtype))

    def add_products(self) -> None:
        """The rank-one products of all groups at once."""
        if not self.products:
            return
        head, c = self.head, torch.stack([p.of_columns for p in self.products])
        if self.needed[0]:
            towards = torch.zeros(
                (c.shape[0], self.grad_hidden.shape[1]), dtype=self.grad_hidden.dtype, device=c.device
            )
            head.add_hidden_gradient(c.to(head.dtype), towards)
            for product, row in zip(self.products, towards, strict=True):
                self.grad_hidden[product.rows].addcmul_(product.of_rows.unsqueeze(1), row)
        if self.needed[1]:
            rows = [p.of_rows @ head.hidden[p.rows].to(p.of_rows.dtype) for p in self.products]
            torch.addmm(self.grad_weight, c.t(), torch.stack(rows), out=self.grad_weight)

    def residual(self) -> Tensor:
        """(): |G - G'| / |G|, at the end of the step."""
        self.choice.report()
        relative = torch.where(self.norm == 0, 0, (self.error / self.norm).sqrt())
        return relative.squeeze(0).to(torch.float32)

    def mean_loss_error(self, weight: Tensor) -> Tensor:
        """(): the estimate of the mean error of nll, each by the size of its weight."""
        total = weight.abs().sum(dtype=self.loss_error.dtype)
        mean = torch.where(total == 0, 0, self.loss_error / total)
        return mean.squeeze(0).to(torch.float32)
