# SPDX-License-Identifier: Apache-2.0
"""What the tests of the compact fused head run on, and its approximation in dense float64."""

from __future__ import annotations

import on_device
import pytest
import torch
from torch import Tensor

import fused_ppl
from fused_ppl import Options, checks, plan
from fused_ppl.spec import LossSpec

N, V, D = 37, 210, 12
# (V, D) of a screened head: products in int8 of a GPU want multiples of 8
WHOLE = (208, 16) if on_device.elsewhere() else (V, D)
ROWS = 20  # of a group: 37 rows in two, and then whole walks of 4 or of 2
WEIGHTED = {"weight": True, "token_weight": True, "logit_scale": 0.6}
OPTIONS = {
    "plain": {},
    "weight": {"weight": True},
    "token_weight": {"token_weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing and weight": {"label_smoothing": 0.1, "weight": True, "token_weight": True},
    "softcap": {"softcap": 4.0},
    "scale": {"logit_scale": 0.6},
    "z_loss": {"z_loss": 1e-2},
    "all but softcap": {**WEIGHTED, "label_smoothing": 0.1, "z_loss": 1e-2},
    "softcap and weights": {**WEIGHTED, "softcap": 4.0, "z_loss": 1e-2},
}
named = pytest.mark.parametrize("keywords", OPTIONS.values(), ids=list(OPTIONS))


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups of rows in a small batch."""
    monkeypatch.setattr(plan, "GROUP_ROWS", {"cpu": ROWS, "gpu": ROWS})
    monkeypatch.setattr(plan, "CPU_BUFFER_PER_THREAD", 4 * V * 4)
    monkeypatch.setattr(plan, "CPU_BUFFER", 4 * V * 4)
    monkeypatch.setattr(plan, "GPU_BUFFER", 4 * V * 4)


def make(
    dtype: torch.dtype = torch.float32, seed: int = 0, ignored: bool = True, v: int = V, d: int = D
) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and bias of a head with a few likely classes, and targets, some ignored."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, d, generator=g), torch.randn(v, d, generator=g)
    bias = torch.randn(v, generator=g) * 2
    target = torch.randint(v, (N,), generator=g)
    if ignored:
        target[5], target[20:23] = -100, -100
    return [t.to(dtype) for t in (hidden, weight, bias)], target


def expand(keywords: dict[str, object], negative: bool = False, v: int = V) -> dict[str, object]:
    g = torch.Generator().manual_seed(3)
    tensors = {"weight": torch.rand(v, generator=g) + 0.5, "token_weight": torch.rand(N, generator=g) + 0.1}
    if negative:
        tensors["token_weight"] = torch.randn(N, generator=g)
    return {k: tensors[k] if v is True else v for k, v in keywords.items()}


def gradients(loss: object, tensors: list[Tensor], target: Tensor, **keywords: object) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(leaves[0], leaves[1], target, linear_bias=leaves[2], **keywords)
    value = value if isinstance(value, Tensor) else value.loss
    return value.detach(), list(torch.autograd.grad(value, leaves))


def dense(
    tensors: list[Tensor],
    target: Tensor,
    keywords: dict[str, object],
    rows: int,
    count: int,
    sizes: tuple[int, ...] = (V,),
) -> tuple[list[Tensor], list[float]]:
    """The approximation, in float64 over full logits: (gradients of S + z_loss * Z, |G - G'| / |G| of each shard of
    the vocabulary).

    G without the smoothing's -C w, by plain autograd: smoothing's part is that of the loss sum_v w[v] z[v].
    """
    wide = [t.double() for t in tensors]
    keep = target != -100
    names = ("label_smoothing", "logit_scale", "softcap", "z_loss")
    spec = LossSpec.of(reduction="sum", **{name: keywords[name] for name in names if name in keywords})
    given = {k: None if keywords.get(k) is None else keywords[k].double() for k in ("weight", "token_weight")}
    weights = list(given.values())
    logits = (wide[0] @ wide[1].T + wide[2]).requires_grad_()
    (full,) = torch.autograd.grad(fused_ppl.reference.logits_loss(logits, target, spec, **given).loss, logits)
    pull = torch.zeros(N, dtype=torch.float64)
    w = torch.ones(V, dtype=torch.float64) if weights[0] is None else weights[0]
    if spec.label_smoothing:
        u = torch.ones(N, dtype=torch.float64) if weights[1] is None else weights[1]
        pull = u * spec.label_smoothing / V * spec.logit_scale * keep
    soft = full + pull.unsqueeze(1) * w
    # a GPU would have to wait for the number of counted rows: there ignored ones are in the groups, with a target of 0
    taken = keep if target.device.type == "cpu" else torch.ones_like(keep)
    soft, label = soft[taken], torch.where(keep, target, 0)[taken]
    made, residuals, end = torch.zeros_like(soft), [], 0
    for size in sizes:
        start, end = end, end + size
        shard = slice(start, end)
        y = torch.where((label >= start) & (label < end), label - start, -1)
        for first in range(0, soft.shape[0], rows):
            r = slice(first, first + rows)
            made[r, shard] = _kept_and_rank_one(soft[r, shard], y[r], count)
        residuals.append(((made - soft)[:, shard].norm() / soft[:, shard].norm()).item())
    approx = torch.zeros_like(full)
    approx[taken] = made
    approx = approx - pull.unsqueeze(1) * w
    return [approx @ wide[1], approx.T @ wide[0], full.sum(0)], residuals


def _kept_and_rank_one(g: Tensor, y: Tensor, count: int) -> Tensor:
    """`y` is -1 where the target is in another shard."""
    here = (y >= 0).nonzero().squeeze(1)
    others = g.clone()
    others[here, y[here]] = 0
    score = others.square().sum(0)
    score[y[here]] = torch.inf
    kept = score.topk(min(max(count, g.shape[0]), g.shape[1])).indices
    tail = g.clone()
    tail[:, kept] = 0
    d, c = tail.sum(1), tail.abs().sum(0)
    return g - tail + (torch.outer(d, c / c.sum()) if c.sum() > 0 else 0)


def of_two_ranks(group: object) -> tuple[Tensor, list[Tensor]]:
    """What each of two ranks says of its half of the tokens, with all columns kept."""
    (hidden, weight, bias), target = make()
    half = slice(0, N // 2) if torch.distributed.get_rank(group) == 0 else slice(N // 2, N)
    options = Options(backend="torch", gradient_columns=V)
    how = {"group": group, "options": options}
    return gradients(fused_ppl.linear_cross_entropy, [hidden[half], weight, bias], target[half], **how)


def of_a_shard(
    group: object, sizes: tuple[int, ...], which: str, options: Options, loss: str = "linear_cross_entropy"
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The loss and the gradients of this rank's classes, and its residual."""
    (hidden, weight, bias), target = make()
    first = sum(sizes[: torch.distributed.get_rank(group)])
    mine = slice(first, first + sizes[torch.distributed.get_rank(group)])
    how = {**expand(OPTIONS[which]), "options": options, "vocab_group": (group, sizes), "reduction": "sum"}
    shard = [hidden, weight[mine], bias[mine]]
    found, made = gradients(getattr(fused_ppl, loss), shard, target, **how)
    how.pop("z_loss", None)  # whose statistics need the gradient of each token, which is exact
    leaves = [t.requires_grad_() for t in shard]
    out = fused_ppl.linear_cross_entropy_with_stats(*leaves[:2], target, linear_bias=leaves[2], **how)
    return found, made, out.residual


def of_mixed_plans(group: object, sizes: tuple[int, ...], per_rank: tuple[Options, ...]) -> list[Tensor]:
    """The gradients where ranks may come to different plans."""
    (hidden, weight, bias), target = make()
    rank = torch.distributed.get_rank(group)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    how = {"options": per_rank[rank], "vocab_group": (group, sizes)}
    return gradients(fused_ppl.linear_cross_entropy, [hidden, weight[mine], bias[mine]], target, **how)[1]


def of_an_idle_shard(group: object, sizes: tuple[int, ...], why: str) -> tuple[Tensor, list[Tensor]]:
    """All targets are in the first shard, and little or nothing is in the others."""
    (hidden, weight, bias), target = make(ignored=False)
    target = target % sizes[0]
    token_weight = torch.ones(N)
    if why == "masked":
        bias[sizes[0] :] = -torch.inf
    elif why == "confident":
        bias[: sizes[0]] = 150.0
    elif why == "nan":
        hidden[0, 0] = torch.nan
    else:
        token_weight.zero_()
    rank = torch.distributed.get_rank(group)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    how = {"options": Options(gradient_tolerance=0.01), "vocab_group": (group, sizes), "token_weight": token_weight}
    return gradients(fused_ppl.linear_cross_entropy, [hidden, weight[mine], bias[mine]], target, **how)


def of_a_compiled_shard(group: object, sizes: tuple[int, ...]) -> None:
    (hidden, weight, bias), target = make()
    rank = torch.distributed.get_rank(group)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    how = {"options": Options(backend="torch", gradient_columns=40), "vocab_group": (group, sizes)}
    shard = [hidden, weight[mine], bias[mine]]
    loss = fused_ppl.linear_cross_entropy
    compiled = torch.compile(lambda *a, **k: loss(*a, **k, **how), backend="aot_eager", fullgraph=True)
    eager, compiled = gradients(loss, shard, target, **how), gradients(compiled, shard, target)
    for mine_, true in zip((compiled[0], *compiled[1]), (eager[0], *eager[1]), strict=True):
        assert torch.equal(mine_, true)


# rows of the table of tests/test_errors.py
ERRORS = [
    ("check_compact", lambda: Options(gradient_columns=2.5), ValueError, "whole number", "2.5", "an eighth"),
    (
        "check_compact",
        lambda: Options(gradient_columns=8, gradient_tolerance=0.1),
        ValueError,
        "chooses the number",
        "got both",
        "Leave out one",
    ),
    ("check_compact", lambda: Options(screen="int8"), ValueError, "nothing asks", "'int8'", "gradient_tolerance"),
    (
        "check_screen",
        lambda: checks.check_screen("int8", torch.float64, "cpu", shape=(8, 8), shards=0),
        NotImplementedError,
        "None for float64",
        "'int8'",
        "Leave it out",
    ),
    (
        "check_screen",
        lambda: checks.check_screen("fp8", torch.float32, "cuda", shape=(50257, 768), shards=0),
        NotImplementedError,
        "multiples of 16",
        "50257",
        "Pad the head",
    ),
    (
        "check_screen",
        lambda: checks.check_screen("fp8", torch.float32, "cpu", shape=(16, 16), shards=0),
        NotImplementedError,
        "need a GPU",
        "cpu",
        "screen='bf16'",
    ),
    ("check_compact", lambda: Options(gradient_columns=float("inf")), ValueError, "finite count", "inf", "an eighth"),
    (
        "check_screen",
        lambda: checks.check_screen("int8", torch.float32, "cpu", shape=(8, 8), shards=9),
        NotImplementedError,
        "in full",
        "'int8'",
        "Leave it out",
    ),
]
