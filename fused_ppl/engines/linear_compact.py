# SPDX-License-Identifier: Apache-2.0
"""The fused LM head under the bound of three dense products: in each group of rows the columns that matter are kept,
and the rest of the gradient becomes the product of its row sums and its column sums (`engines.compact`).

    logits = h W^T -> sums over rows and columns -> kept columns J -> dh = G_J W_J + d (c^T W)/s,  dW[J] += G_J^T h
    and once, over all groups, dW += c (d^T h)/s

Loss and lse are those of `linear_rows`, bit for bit. With a screen the first product is a cheap one, and the kept
columns alone are computed in full. A shard of the vocabulary has been told lse and nll, and computes its logits again.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ppl import backends, checks, plan, reduction
from fused_ppl.engines import LIBRARY, compact, memory, without_autocast
from fused_ppl.engines.head import SLICE, Head, slices, wide_dtype
from fused_ppl.engines.linear_rows import accumulator_shapes, all_tokens, made_fake, tokens_of
from fused_ppl.engines.screen import Screen
from fused_ppl.spec import SPEC_SCHEMA, Columns, Factors, LossSpec, RowStats

LEAST = 4 * 2**20  # bytes of a buffer that waits for the next step

LIBRARY.define(
    "linear_compact(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    f"Tensor? token_weight, {SPEC_SCHEMA}, str backend, ScalarType dtype, bool[3] grads, "
    "int? memory_budget, float? gradient_tolerance, float? gradient_columns, str? screen) "
    "-> (Tensor sums, Tensor nll, Tensor lse, Tensor entropy, Tensor predicted, Tensor dhidden, Tensor dweight, "
    "Tensor dbias, Tensor residual, Tensor loss_error)"
)
LIBRARY.define(
    "linear_compact_shard(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    f"Tensor? token_weight, Tensor lse, Tensor nll, {SPEC_SCHEMA}, str backend, ScalarType dtype, bool[3] grads, "
    "int? memory_budget, float? gradient_tolerance, float? gradient_columns, int first, int num_classes) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias, Tensor residual)"
)


class Found(NamedTuple):
    """What the kept columns of a group say of its rows."""

    stats: RowStats
    left: Tensor  # (R,): the row sums of what is not kept
    wrong: Tensor  # (): the screen's error of the loss, summed


class How(NamedTuple):
    """What all groups share."""

    spec: LossSpec
    backend: ModuleType
    compact: ModuleType
    weight: Tensor | None  # (V,)
    token_weight: Tensor | None  # of the rows that take part
    memory_budget: int | None
    columns: compact.Choice
    shard: tuple[int, int] | None  # the first of the classes, and the number of all


class Known(NamedTuple):
    """Of the rows that take part, before the walk: where the vocabulary is in shards."""

    lse: Tensor
    nll: Tensor

    def stats(self, r: slice) -> RowStats:
        """As the backends take it, who look at lse and nll alone: the loss of these rows has been made elsewhere."""
        nll = self.nll[r]
        return RowStats(nll, nll, nll, self.lse[r], None, None)


@without_autocast
def _forward(*args):  # type: ignore[no-untyped-def]
    target, spec, dtype = args[3], LossSpec.of(*args[6:14]), args[15]
    head, walk, gradients = _over_rows(args[:6], spec, args[14:-1], args[-1], None, None)  # type: ignore[no-untyped-call]
    rows = all_tokens(head, walk.parts, spec, target.numel(), dtype)
    sums = reduction.stack_sums(rows, spec, target.shape)
    return sums, *tokens_of(rows, target.shape), *gradients, walk.residual(), walk.mean_loss_error(rows.weight)


@without_autocast
def _shard(*args):  # type: ignore[no-untyped-def]
    spec = LossSpec.of(*args[8:16])
    _, walk, gradients = _over_rows(args[:6], spec, args[16:-2], None, args[6:8], args[-2:])  # type: ignore[no-untyped-call]
    return *gradients, walk.residual()


def _over_rows(tensors, spec, how, screen, known, shard):  # type: ignore[no-untyped-def]
    hidden, linear_weight, linear_bias, target, weight, token_weight = tensors
    backend_name, dtype, grads, memory_budget, tolerance, share = how
    (v, d), n = linear_weight.shape, target.numel()
    flat, labels = hidden.reshape(-1, d), target.reshape(-1)
    head = Head(flat, linear_weight, linear_bias, labels, spec, dtype, memory_budget)
    size = head.dtype.itemsize
    asked = plan.Compact(tolerance, share, screen)
    case = plan.LinearCase(n, v, d, size, hidden.device.type, tuple(grads), memory_budget, asked, head.converts)
    made = plan.linear_plan(case, "compact")
    row_bytes = max(4, size) * (1 + (spec.stats or spec.softcap is not None))
    group = plan.whole_chunks(made.group, v, row_bytes, case, torch.get_num_threads())
    shapes = accumulator_shapes(hidden, linear_weight, grads)
    dhidden, dweight, dbias = (memory.empty(s, wide_dtype(dtype), hidden.device).zero_() for s in shapes)
    if head.on_cpu:  # here, where positions are still the caller's
        checks.check_target_range(labels, v if shard is None else shard[1], spec.ignore_index)
    m = head.target.shape[0]
    dh = dhidden.view(-1, d) if head.kept is None else dhidden.new_zeros((m, d) if grads[0] else (0, d))
    u = head.rows(None if token_weight is None else token_weight.reshape(-1))
    choice = compact.Choice(linear_weight, tolerance, asked.count(v))
    modules = backends.load(backend_name), backends.load_compact(backend_name)
    shared = How(spec, *modules, None if weight is None else weight.to(head.wide), u, memory_budget, choice, shard)
    rows = None if known is None else Known(*(head.rows(t.reshape(-1)) for t in known))  # type: ignore[arg-type]
    cheap = None if screen is None else Screen(screen, linear_weight, linear_bias)
    buffer = memory.empty((min(made.rows, max(m, 1)), v), cheap.dtype if cheap else head.dtype, hidden.device)
    walk = _Walk(head, shared, cheap, rows, (dh, dweight, dbias), min(group, max(m, 1)))
    first = 0 if shard is None else shard[0]
    for start in range(0, m, made.rows):
        r = slice(start, min(start + made.rows, m))
        z = buffer[: r.stop - r.start]
        h = head.hidden[r].to(head.dtype)
        target_logit = head.target_logits(h, head.target[r] - first)
        (cheap or head).logits(h, z)
        for here in range(0, r.stop - r.start, group):
            g = slice(here, min(here + group, r.stop - r.start))
            walk.group(slice(start + g.start, start + g.stop), h[g], z[g], target_logit[g])
    walk.finish()
    if head.kept is not None and grads[0]:
        dhidden.view(-1, d).index_copy_(0, head.kept, dh)
    return head, walk, (dhidden, dweight, dbias)


class _Walk:
    """Goes over groups of rows, and holds what they add to."""

    def __init__(
        self,
        head: Head,
        how: How,
        screen: Screen | None,
        known: Known | None,
        out: tuple[Tensor, Tensor, Tensor],
        rows: int,
    ) -> None:
        self.head, self.how, self.screen, self.known = head, how, screen, known
        self.dh, self.dw, self.db = out
        self.needed = tuple(t.numel() > 0 for t in out)
        self.parts: list[RowStats] = []
        self.thin: list[tuple[slice, Tensor, Tensor]] = []  # rows, a factor of each, a factor of each column
        wide = reduction.sum_dtype(head.target.device)
        self.error, self.norm, self.loss_error = (head.zeros(1).to(wide) for _ in range(3))
        # fresh pages cost more than what is computed in them
        (v, d), device = head.weight.shape, head.target.device
        most = max(how.columns.most, min(rows, v))  # the targets of a group are kept
        self.weight = how.weight if how.shard is None or how.weight is None else how.weight[how.shard[0] :][:v]
        empty = functools.partial(memory.empty, device=device, least=LEAST)
        self.w, self.g = empty((most, d), head.dtype), empty((rows * most,), head.dtype)
        self.product = empty((min(most, SLICE), d), head.dtype if head.on_cpu else head.wide)
        self.sum = self.product
        if self.product.dtype != self.dw.dtype:
            self.sum = empty(self.product.shape, self.dw.dtype)

    def group(self, r: slice, h: Tensor, z: Tensor, target_logit: Tensor) -> None:
        how, y = self.how, self.head.target[r]
        label = self.label(y, z.shape[1])
        u = None if how.token_weight is None else how.token_weight[r]
        signed = self.needed[2] and (u is not None or how.weight is not None or how.spec.z_loss > 0)
        rows = (y, how.spec, how.weight, u)
        if self.known is None or how.shard is None:
            stats, columns, factors = how.compact.nll_columns(z, target_logit, *rows, signed, how.memory_budget)
        else:
            stats = self.known.stats(r)
            columns, factors = how.compact.nll_columns_shard(
                z, target_logit, y, stats.lse, stats.nll, *rows[1:], signed, how.memory_budget, how.shard
            )
        norm = compact.norm_square(columns, factors)
        self.norm += norm
        count = how.columns.of_group(columns, factors, label)
        while count is not None:
            kept = compact.keep(columns, label, count)
            w, g, found = self.restrict(h, z, stats, factors, kept)
            error = compact.error_square(kept, found.left)
            enough = how.columns.after(count, error, norm)
            if enough == count:
                self.error += error
                self.add(r, h, w, g, kept, found.left)
                self.add_bias(label, columns, factors, kept, g)
                self.parts.append(found.stats)
                self.loss_error += found.wrong
                break
            count = enough
        else:
            self.parts.append(self.exact(r, h, z, target_logit, *rows))
        if factors.pull.numel() and count is not None:
            w = factors.pull.new_ones(columns.size.shape) if self.weight is None else self.weight
            self.thin.append((r, -factors.pull, w))
            if self.needed[2]:
                self.db.sub_(w * factors.pull.sum())

    def label(self, y: Tensor, v: int) -> Tensor:
        """The target's column, inside the range everywhere; V where it is in another shard."""
        ignore, shard = self.how.spec.ignore_index, self.how.shard
        label = (y if ignore is None else torch.where(y == ignore, 0, y)).long()
        if shard is None:
            return label.clamp(0, v - 1)
        label = label - shard[0]
        return torch.where((label >= 0) & (label < v), label, v)

    def exact(
        self,
        r: slice,
        h: Tensor,
        z: Tensor,
        target_logit: Tensor,
        y: Tensor,
        spec: LossSpec,
        weight: Tensor | None,
        u: Tensor | None,
    ) -> RowStats:
        """All columns of a group, as the plans "rows" and "vocab" do it."""
        head, how = self.head, self.how
        if self.screen is not None:
            z = torch.empty_like(z, dtype=head.dtype)
            head.logits(h, z)
        stats: RowStats
        if self.known is None:
            stats = how.backend.nll_forward_backward(z, target_logit, y, spec, weight, u, 1.0, how.memory_budget)
        else:
            stats = self.known.stats(r)
            of_s = torch.ones_like(stats.nll)
            upstream = (of_s, of_s if spec.z_loss else None)
            known = (stats.lse, stats.nll)
            how.backend.nll_backward(z, y, *known, *upstream, spec, weight, u, z, how.memory_budget, how.shard)
        if self.needed[0]:
            head.add_hidden_gradient(z, self.dh[r])
        if self.needed[1]:
            head.add_weight_gradient(z, h, self.dw, False)
        if self.needed[2]:
            self.db += z.sum(0, dtype=self.db.dtype)
        return stats

    def restrict(
        self, h: Tensor, z: Tensor, stats: RowStats, factors: Factors, kept: compact.Kept
    ) -> tuple[Tensor, Tensor, Found]:
        """The rows of the weight and the columns of the gradient that are kept."""
        head, how, index = self.head, self.how, kept.columns
        count, n = index.shape[0], h.shape[0]
        g = self.g[: n * count].view(n, count)
        w = self.w[:count]
        if head.weight.dtype == w.dtype:
            torch.index_select(head.weight, 0, index, out=w)
        else:
            w.copy_(head.weight.index_select(0, index))
        if self.screen is None:
            left = how.compact.nll_kept(z, index, kept.place, stats, factors, how.spec, g, how.memory_budget)
            return w, g, Found(stats, left, left.new_zeros(()))
        if head.bias is None:
            torch.mm(h, w.t(), out=g)
        else:
            torch.addmm(head.bias[index].to(g.dtype), h, w.t(), out=g)
        total = head.weight.shape[0] if how.weight is None else how.weight.sum()
        stats, left, wrong = how.compact.nll_rescreen(
            g, z, index, kept.place, stats, factors, how.spec, total, how.memory_budget
        )
        return w, g, Found(stats, left, (wrong * (factors.a - factors.rest).abs()).sum())

    def add(self, r: slice, h: Tensor, w: Tensor, g: Tensor, kept: compact.Kept, left: Tensor) -> None:
        """The products of the kept columns, and what the rest will be made of."""
        share = kept.tail / kept.tail.sum().clamp_min(torch.finfo(kept.tail.dtype).tiny)
        self.thin.append((r, left, share.to(left.dtype)))
        if self.needed[0]:
            self.head.add_product(self.dh[r], g, w)
        if not self.needed[1]:
            return
        # by slices that stay in cache
        index = kept.columns
        for s in slices(index.shape[0], SLICE):
            product = self.product[: s.stop - s.start]
            if self.head.on_cpu or product.dtype == g.dtype:
                torch.mm(g[:, s].t(), h, out=product)
            else:
                torch.mm(g[:, s].t(), h, out_dtype=product.dtype, out=product)
            wide = self.sum[: s.stop - s.start]
            self.dw.index_add_(0, index[s], wide if wide.dtype == product.dtype else wide.copy_(product))

    def add_bias(self, label: Tensor, columns: Columns, factors: Factors, kept: compact.Kept, g: Tensor) -> None:
        """The column sums, all of them exact; in the kept columns those of a screen would be too coarse."""
        if not self.needed[2]:
            return
        sums = (columns.total if columns.total.numel() else columns.size).to(self.db.dtype)
        if self.screen is None:
            self.db += sums
            compact.add_repeated(self.db, label.clamp(max=self.db.shape[0] - 1), factors.at_target)  # 0 from elsewhere
        else:
            self.db += sums.index_fill(0, kept.columns, 0)
            self.db.index_add_(0, kept.columns, g.sum(0, dtype=self.db.dtype))

    def finish(self) -> None:
        """The thin products of all groups at once."""
        if not self.thin:
            return
        head, c = self.head, torch.stack([of_columns for _, _, of_columns in self.thin])
        if self.needed[0]:
            towards = torch.zeros((c.shape[0], self.dh.shape[1]), dtype=self.dh.dtype, device=c.device)
            head.add_hidden_gradient(c.to(head.dtype), towards)
            for (r, of_rows, _), row in zip(self.thin, towards, strict=True):
                self.dh[r].addcmul_(of_rows.unsqueeze(1), row)
        if self.needed[1]:
            rows = [of_rows @ head.hidden[r].to(of_rows.dtype) for r, of_rows, _ in self.thin]
            self.dw.addmm_(c.t(), torch.stack(rows))

    def residual(self) -> Tensor:
        """(): |G - G'| / |G|, at the end of the step."""
        self.how.columns.report()
        relative = torch.where(self.norm == 0, 0, (self.error / self.norm).sqrt())
        return relative.squeeze(0).to(torch.float32)

    def mean_loss_error(self, weight: Tensor) -> Tensor:
        """(): the estimate of the mean error of nll, each by the size of its weight."""
        total = weight.abs().sum(dtype=self.loss_error.dtype)
        mean = torch.where(total == 0, 0, self.loss_error / total)
        return mean.squeeze(0).to(torch.float32)


def _fake(hidden, linear_weight, linear_bias, target, weight, token_weight, *rest):  # type: ignore[no-untyped-def]
    reduction_, z_loss, stats, dtype, grads = rest[0], rest[5], rest[7], rest[9], rest[10]
    tokens = reduction.empty_results(hidden, target, wide_dtype(dtype), reduction_, stats)[5:]
    sums = reduction.empty_sums(hidden, target, reduction_, z_loss)
    errors = (hidden.new_empty((), dtype=torch.float32) for _ in range(2))
    return sums, *tokens, *made_fake(hidden, linear_weight, dtype, grads), *errors


def _shard_fake(hidden, linear_weight, *rest):  # type: ignore[no-untyped-def]
    dtype, grads = rest[15], rest[16]
    return *made_fake(hidden, linear_weight, dtype, grads), hidden.new_empty((), dtype=torch.float32)


LIBRARY.impl("linear_compact", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_compact_shard", _shard, "CompositeExplicitAutograd")
torch.library.register_fake("fused_ppl::linear_compact", _fake, lib=LIBRARY)
torch.library.register_fake("fused_ppl::linear_compact_shard", _shard_fake, lib=LIBRARY)
