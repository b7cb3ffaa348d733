# SPDX-License-Identifier: Apache-2.0
"""The nll of every scored token: windows in batches through a model, its head in the fused loss.

Windows of one length make a batch, so that nothing is padded. Batches follow from the text alone: a run that is
stopped and resumed has the same ones, and the same bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fused_ppl
from fused_ppl import Options
from fused_ppl.backends.presence import widens_half_products
from fused_ppl.engines import memory
from fused_ppl.engines.head import logits_into
from fused_ppl.evaluation.models import HiddenModel
from fused_ppl.evaluation.records import EvaluationError, Window

RANKED_ROWS = 128  # whose logits exist at once


class Scored(NamedTuple):
    """The scored tokens of one window, in their order."""

    window: Window
    nll: NDArray[np.float64]  # nats
    entropy: NDArray[np.float64] | None  # nats; None if not asked
    predicted: NDArray[np.int64] | None  # the most likely token
    ranked: Ranked | None = None


class Ranked(NamedTuple):
    """What only the logits of a token can tell."""

    rank: NDArray[np.int64]  # of the target, from 1
    ids: NDArray[np.int64]  # (n, K): the most likely tokens
    probabilities: NDArray[np.float64]  # (n, K)

    def of(self, part: slice) -> Ranked:
        return Ranked(self.rank[part], self.ids[part], self.probabilities[part])


class Rows(NamedTuple):
    """Hidden states of all scored tokens of a batch of windows."""

    hidden: Tensor  # (n, D)
    target: Tensor  # (n,)
    counts: list[int]  # of each window


def batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Consecutive windows with as many inputs each, at most `batch_size` of them."""

    def shape(window: Window) -> tuple[int, str]:
        return window.stop - window.start, window.bos

    for _, group in itertools.groupby(windows, shape):
        same = list(group)
        for i in range(0, len(same), batch_size):
            yield same[i : i + batch_size]


def reported(
    batches: Sequence[list[Window]], size: int, progress: Callable[[int], None]
) -> Iterator[tuple[int, list[Window]]]:
    """Batches and their numbers. After each, `progress` gets its share of the `size` of the text."""
    for number, batch in enumerate(batches):
        yield number, batch
        progress(size * (number + 1) // len(batches) - size * number // len(batches))
    if not batches:
        progress(size)


def inputs_of(ids: NDArray[np.int64], window: Window, bos: int) -> NDArray[np.int64]:
    inputs = ids[window.start : window.stop - 1]
    if window.bos == "before":
        return np.concatenate(([bos], inputs))
    if window.bos == "over":
        inputs = inputs.copy()
        inputs[0] = bos
    return inputs


def rows_of(model: HiddenModel, ids: NDArray[np.int64], batch: Sequence[Window], bos: int) -> Rows:
    """One forward of the model, and the hidden states before each scored token."""
    tokens = torch.from_numpy(np.stack([inputs_of(ids, w, bos) for w in batch])).to(model.device)
    hidden = model.hidden_states(tokens)
    if hidden.shape[:2] != tokens.shape:
        raise EvaluationError(
            f"hidden_states must be (B, T, D) for tokens of {tuple(tokens.shape)}; they are {tuple(hidden.shape)}."
        )
    parts, targets = [], []
    for row, w in zip(hidden, batch, strict=True):
        before = int(w.bos == "before")
        parts.append(row[w.first - 1 - w.start + before : w.stop - 1 - w.start + before])
        targets.append(ids[w.first : w.stop])
    target = torch.from_numpy(np.concatenate(targets)).to(model.device)
    return Rows(torch.cat(parts), target, [len(t) for t in targets])


@torch.no_grad()
def score(
    model: HiddenModel,
    ids: NDArray[np.int64],
    batch: Sequence[Window],
    *,
    bos: int,
    stats: bool = False,
    alternatives: int = 0,
    options: Options | None = None,
) -> list[Scored]:
    """The scored tokens of every window of a batch; their entropies and most likely tokens with `stats`."""
    rows = rows_of(model, ids, batch, bos)
    entropy = predicted = ranked = None
    if stats:
        out = fused_ppl.linear_cross_entropy_with_stats(
            rows.hidden.to(model.dtype), model.linear_weight, rows.target, **keywords(model, options)
        )
        nll, entropy, predicted = out.nll, out.entropy.cpu().double().numpy(), out.predicted.cpu().numpy()
        if alternatives:
            ranked = rank(model, rows, alternatives)
    else:
        nll = nll_of(model, rows, options=options)
    values = nll.cpu().double().numpy()
    found, at = [], 0
    for window, count in zip(batch, rows.counts, strict=True):
        part = slice(at, at + count)
        at += count
        if not np.isfinite(values[part]).all():
            i = int(np.flatnonzero(~np.isfinite(values[part]))[0])
            token = int(ids[window.first + i])
            raise EvaluationError(
                f"The model must give finite logits; the nll of token {window.first + i} (id {token}) is "
                f"{values[part][i]}. Try another dtype."
            )
        of_stats = (None if entropy is None else entropy[part], None if predicted is None else predicted[part])
        found.append(Scored(window, values[part], *of_stats, None if ranked is None else ranked.of(part)))
    return found


def keywords(model: HiddenModel, options: Options | None) -> dict[str, Any]:
    """What the fused losses are told of a model, for a result of each token."""
    of_model = {"linear_bias": model.linear_bias, "logit_scale": model.logit_scale, "softcap": model.softcap}
    return {**of_model, "ignore_index": None, "reduction": "none", "options": options}


def nll_of(model: HiddenModel, rows: Rows, *, options: Options | None) -> Tensor:
    """(n,), nats."""
    hidden = rows.hidden.to(model.dtype)
    return fused_ppl.linear_cross_entropy(hidden, model.linear_weight, rows.target, **keywords(model, options))


def logits_of(model: HiddenModel, hidden: Tensor) -> Tensor:
    """(n, V): what the head gives before a scale and a cap. In float32 also where the model is not, float64 for that.

    Rounded to bf16, the logits of two models that are nearly equal would differ by their roundings.
    """
    weight, bias, dtype = model.linear_weight, model.linear_bias, torch.promote_types(model.dtype, torch.float32)
    if hidden.shape[-1] != weight.shape[1]:
        raise EvaluationError(
            f"hidden_states of {model.name} must be (B, T, {weight.shape[1]}), because its head has the shape "
            f"{tuple(weight.shape)}; their last size is {hidden.shape[-1]}."
        )
    hidden, out = hidden.to(model.dtype), memory.empty((len(hidden), len(weight)), dtype, model.device)
    if model.dtype == dtype or not widens_half_products(model.device.type):
        logits_into(out, hidden.to(dtype), weight, bias)
        return out
    torch.mm(hidden, weight.t(), out_dtype=dtype, out=out)
    return out if bias is None else out.add_(bias)


def rank(model: HiddenModel, rows: Rows, alternatives: int) -> Ranked:
    """Ranks and the most likely tokens, from the logits of a few rows at a time."""
    parts = []
    for i in range(0, len(rows.target), RANKED_ROWS):
        part = slice(i, i + RANKED_ROWS)
        z = logits_of(model, rows.hidden[part]) * model.logit_scale
        if model.softcap is not None:
            z = model.softcap * torch.tanh(z / model.softcap)
        z_y = z.gather(1, rows.target[part].unsqueeze(1))
        top, ids = z.topk(min(alternatives, z.shape[1]), dim=1)
        lse = fused_ppl.cross_entropy_with_stats(z, rows.target[part], ignore_index=None, reduction="none").lse
        bits = (top.cpu().double() - lse.cpu().double().unsqueeze(1)) / math.log(2)
        parts.append((((z > z_y).sum(1) + 1).cpu(), ids.cpu(), torch.pow(2.0, bits)))
    return Ranked(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))
