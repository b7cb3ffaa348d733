# SPDX-License-Identifier: Apache-2.0
"""Divergences of two predictions against float64 over full logits: `torch.nn.functional.kl_div` and the formulas."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from fused_ppl import Options, kl_divergence, kl_divergence_with_stats, linear_kl_divergence
from fused_ppl.testing import assert_as_good_as_eager

DIRECTIONS = [
    ("forward", 0.5),
    ("reverse", 0.5),
    ("jensen_shannon", 0.1),
    ("jensen_shannon", 0.5),
    ("jensen_shannon", 0.9),
]
REFERENCE = Options(backend="reference")
IDS = [f"{name} {beta}" if name == "jensen_shannon" else name for name, beta in DIRECTIONS]


def how(direction: str, beta: float) -> dict[str, Any]:
    return {"direction": direction, "beta": beta}


def two_logits(shape: tuple[int, ...], kind: str = "near", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    z, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "near":
        t = z + 0.1 * noise
    elif kind == "independent":
        t = 2 * noise
    elif kind == "peaked":  # a confident student, and a teacher that is as confident of another class
        z[..., 0] += 40
        t = noise.clone()
        t[..., -1] += 30
    else:  # "wide": differences of hundreds of nats
        z, t = 100 * z, 100 * noise
    return z.to(dtype), t.to(dtype)


def truth(z: Tensor, t: Tensor, direction: str, beta: float) -> Tensor:
    """(...,): by torch's kl_div, in the dtype of the logits."""
    log_p, log_q = z.log_softmax(-1), t.log_softmax(-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)

    if direction == "forward":
        return kl(log_q, log_p)
    if direction == "reverse":
        return kl(log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def in_dtype(
    z: Tensor, t: Tensor, case: tuple[str, float], dtype: torch.dtype, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    z = z.detach().to(dtype).requires_grad_()
    value = truth(z, t.to(dtype), *case)
    return value.detach(), torch.autograd.grad(value, z, upstream.to(dtype))[0]


def judge(mine: Tensor, eager: Tensor, exact: Tensor, *, condition: float) -> None:
    """By the policy, where float64 is more exact: for a sure class it rounds log p - D to 1e-16 times a gap of 400."""
    equal = (mine.double() - exact).abs() < 1e-13
    assert_as_good_as_eager(torch.where(equal, exact.to(mine.dtype), mine), eager, exact, condition=condition)


@pytest.mark.parametrize("kind", ["near", "independent", "peaked", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", DIRECTIONS, ids=IDS)
@pytest.mark.parametrize("columns", [1, 2, 129, 4099])
def test_value_and_gradient_of_each_token(columns, case, dtype, kind, options):
    z, t = two_logits((4, columns), kind, dtype)
    z.requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.0, 0.3])
    value = kl_divergence(z, t, reduction="none", options=options, **how(*case))
    (gradient,) = torch.autograd.grad(value, z, upstream)
    (eager, wide), (exact, right) = (in_dtype(z, t, case, d, upstream) for d in (torch.float32, torch.float64))
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    # both log-probabilities are rounded in proportion to their size
    condition = 1 + z.detach().abs().max().item() + t.abs().max().item()
    judge(value.detach(), eager, exact, condition=condition)
    judge(gradient, wide.to(dtype), right, condition=condition)


@pytest.mark.parametrize("case", DIRECTIONS, ids=IDS)
def test_two_classes_by_hand(case, options):
    """p = (0.5, 0.5), q = (0.8, 0.2)."""
    z, t = torch.zeros(1, 2, requires_grad=True), torch.tensor([[math.log(4.0), 0.0]])
    direction, beta = case
    p, q = (0.5, 0.5), (0.8, 0.2)
    m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    k = kl(p, m)
    value, gradient = {
        "forward": (kl(q, p), [a - b for a, b in zip(p, q, strict=True)]),
        "reverse": (kl(p, q), [a * (math.log(a / b) - kl(p, q)) for a, b in zip(p, q, strict=True)]),
        "jensen_shannon": (
            beta * kl(q, m) + (1 - beta) * k,
            [(1 - beta) * a * (math.log(a / b) - k) for a, b in zip(p, m, strict=True)],
        ),
    }[direction]
    loss = kl_divergence(z, t, options=options, **how(*case))
    assert_close(loss.item(), value, rtol=2e-6, atol=0)
    assert_close(torch.autograd.grad(loss, z)[0][0], torch.tensor(gradient), rtol=3e-6, atol=0)


@pytest.mark.parametrize("case", DIRECTIONS, ids=IDS)
def test_equal_predictions_have_no_divergence_and_no_gradient(case, options):
    z, _ = two_logits((6, 300), "independent")
    z.requires_grad_()
    value = kl_divergence(z, z.detach() + 5, reduction="none", options=options, **how(*case))
    same = kl_divergence(z, z.detach().clone(), reduction="none", options=options, **how(*case))
    (gradient,) = torch.autograd.grad(same.sum(), z)
    assert value.abs().max() < 2e-6 and same.abs().max() < 1e-6 and gradient.abs().max() < 1e-7
    if case[0] != "jensen_shannon":
        assert not same.any() and not gradient.any()


@pytest.mark.parametrize("case", DIRECTIONS, ids=IDS)
def test_a_class_that_both_exclude_has_no_part(case, options):
    """Logits of -inf, as a mask of the vocabulary gives them."""
    z, t = two_logits((3, 40), "independent")
    z[:, ::3], t[:, ::3] = -math.inf, -math.inf
    kept = [i for i in range(40) if i % 3]
    want, right = in_dtype(z[:, kept], t[:, kept], case, torch.float64, torch.ones(3))
    z.requires_grad_()
    value = kl_divergence(z, t, reduction="none", options=options, **how(*case))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert_close(value.double(), want, rtol=2e-6, atol=1e-6)
    assert_close(gradient[:, kept].double(), right, rtol=1e-5, atol=1e-6)
    assert not gradient[:, ::3].any()


def test_a_class_that_one_excludes_costs_infinitely_much_where_the_other_needs_it(options):
    z, t = torch.zeros(2, 3), torch.zeros(2, 3)
    z[0, 1] = t[1, 1] = -math.inf
    forward, reverse, both = (
        kl_divergence(z, t, reduction="none", direction=d, options=options).tolist()
        for d in ("forward", "reverse", "jensen_shannon")
    )
    assert forward[0] == math.inf and forward[1] == pytest.approx(math.log(1.5))
    assert reverse[1] == math.inf and reverse[0] == pytest.approx(math.log(1.5))
    assert all(0 < value < math.log(2) for value in both)


@pytest.mark.parametrize("case", DIRECTIONS, ids=IDS)
def test_ignored_tokens_may_hold_anything_and_are_exactly_zero(case, options):
    z, t = two_logits((5, 50))
    z[1], t[1], z[3], t[3] = math.nan, math.inf, -math.inf, math.nan
    target = torch.tensor([0, -100, 49, -100, 7])
    z.requires_grad_()
    out = kl_divergence_with_stats(z, t, target, reduction="none", options=options, **how(*case))
    (gradient,) = torch.autograd.grad(out.loss.sum(), z)
    assert not gradient[[1, 3]].any() and gradient[[0, 2, 4]].isfinite().all()
    for name in ("loss", "divergence", "entropy", "teacher_entropy", "agrees", "log_prob_difference", "total_weight"):
        assert not getattr(out, name)[[1, 3]].any(), name
    mean = kl_divergence(z, t, target, options=options, **how(*case))
    assert_close(mean, out.loss.sum() / 3)


def test_statistics(options):
    z, t = two_logits((6, 5000), "independent")
    target = torch.arange(6) * 800
    t[2] = z[2]
    out = kl_divergence_with_stats(z, t, target, options=options)
    log_p, log_q = z.double().log_softmax(-1), t.double().log_softmax(-1)
    assert_close(out.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-6, atol=0)
    assert_close(out.teacher_entropy.double(), -(log_q.exp() * log_q).sum(-1), rtol=1e-6, atol=0)
    assert out.agrees.tolist() == (z.argmax(-1) == t.argmax(-1)).tolist() and out.agrees[2]
    want = (log_p - log_q).gather(-1, target[:, None])[:, 0]
    assert_close(out.log_prob_difference.double(), want, rtol=1e-6, atol=2e-6)
    assert out.total_weight == 6 and out.loss.item() == pytest.approx(out.divergence.mean().item(), rel=1e-6)
    assert not any(getattr(out, name).requires_grad for name in out._fields)


# --- options in pairs ----------------------------------------------------------------------------------------------

N, V, D, OTHER = 9, 37, 6, 11
CHOICES: dict[str, list[dict[str, Any]]] = {
    "direction": [how(*case) for case in DIRECTIONS[:4]],
    "reduction": [{"reduction": name} for name in ("mean", "sum", "none", "sequence")] + [{"num_items": 4}],
    "target": [{}, {"target": torch.tensor([[3, -100, 1], [0, 36, -100], [-100, -100, -100]])}],
    "token_weight": [{}, {"token_weight": torch.tensor([[1.0, 0.0, 2.0], [-0.5, 1.0, 0.0], [1.0, 1.0, 3.0]])}],
    "student": [{}, {"logit_scale": 0.6}, {"softcap": 3.0, "logit_scale": 1.5}],
    "teacher": [{}, {"teacher_logit_scale": 0.5}, {"teacher_softcap": 4.0}],
    "bias": [{}, {"linear_bias": True, "teacher_linear_bias": True}],
}
PAIRS = [
    {**a, **b}
    for first, second in itertools.combinations(CHOICES, 2)
    for a, b in itertools.product(CHOICES[first], CHOICES[second])
]


def heads(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((3, 3, D), (V, D), (V,), (3, 3, OTHER), (V, OTHER), (V,))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [t.requires_grad_() for t in tensors[:3]], tensors[3:]


def through_heads(student: list[Tensor], teacher: list[Tensor], options: Options, **keywords: Any) -> list[Tensor]:
    """The loss, and gradients for an upstream gradient that is not 1."""
    biases = {"linear_bias": student[2], "teacher_linear_bias": teacher[2]} if keywords.get("linear_bias") else {}
    keywords = {k: v for k, v in keywords.items() if not k.endswith("bias")} | biases
    loss = linear_kl_divergence(*student[:2], *teacher[:2], options=options, **keywords)
    leaves = student if biases else student[:2]
    upstream = torch.linspace(-1.7, 2.0, loss.numel() or 1)[: loss.numel()].view(loss.shape).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.parametrize("start", range(8))
def test_every_pair_of_options(start, options):
    for keywords in PAIRS[start::8]:
        student, teacher = heads()
        got = through_heads(student, teacher, options, **keywords)
        eager = through_heads(student, teacher, REFERENCE, **keywords)
        double = [t.detach().double().requires_grad_() for t in student], [t.double() for t in teacher]
        right = through_heads(*double, REFERENCE, **keywords)
        for mine, other, exact in zip(got, eager, right, strict=True):
            assert_as_good_as_eager(mine, other, exact, str(keywords), condition=12.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", DIRECTIONS[:4], ids=IDS[:4])
def test_other_dtypes_through_heads(case, reduction, dtype, options):
    if dtype == torch.float64 and options.backend == "triton":
        pytest.skip("the kernels compute in float32")
    student, teacher = heads(dtype)
    got = through_heads(student, teacher, options, reduction=reduction, **how(*case))
    eager = through_heads(student, teacher, REFERENCE, reduction=reduction, **how(*case))
    double = [t.detach().double().requires_grad_() for t in student], [t.double() for t in teacher]
    right = through_heads(*double, REFERENCE, reduction=reduction, **how(*case))
    for mine, other, exact in zip(got, eager, right, strict=True):
        assert mine.dtype == other.dtype
        if dtype == torch.float64:  # whose truth has roundings of its own
            assert_close(mine, exact, rtol=1e-12, atol=1e-13)
        else:
            assert_as_good_as_eager(mine, other, exact, condition=12.0)


def test_heads_of_two_dtypes_and_chunks_of_few_rows(options, monkeypatch):
    """A float32 student, a bfloat16 teacher, and a budget of two rows."""
    student, teacher = heads()
    teacher = [t.bfloat16() for t in teacher]
    tight = Options(backend=options.backend, memory_budget=3000)
    want = through_heads(student, [t.float() for t in teacher], REFERENCE)
    for how_ in (options, tight):
        for mine, other in zip(through_heads(student, teacher, how_), want, strict=True):
            assert_close(mine, other, rtol=0.02, atol=0.02)


def test_all_ignored_and_no_token(options):
    student, teacher = heads()
    none = torch.full((3, 3), -100)
    loss, *gradients = through_heads(student, teacher, options, target=none)
    assert loss.isnan() and not any(g.any() for g in gradients)
    hidden = student[0][:0].detach().requires_grad_()
    empty = linear_kl_divergence(hidden, student[1], teacher[0][:0], teacher[1], reduction="sum", options=options)
    gradients = torch.autograd.grad(empty, (hidden, student[1]))
    assert empty == 0 and gradients[0].shape == hidden.shape and not gradients[1].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_needs_a_gradient_gets_one(reduction, options):
    student, teacher = heads()
    whole = through_heads(student, teacher, options, reduction=reduction)
    student[1].requires_grad_(False)
    teacher[1].requires_grad_()
    loss = linear_kl_divergence(*student[:2], *teacher[:2], reduction=reduction, options=options)
    upstream = torch.linspace(-1.7, 2.0, loss.numel())[: loss.numel()].view(loss.shape)
    assert_close(torch.autograd.grad(loss, student[0], upstream, retain_graph=True)[0], whole[1])
    assert torch.autograd.grad(loss, teacher[1], upstream, allow_unused=True) == (None,)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_has_the_same_bits_and_a_second_derivative_raises(reduction, options):
    student, teacher = heads()
    loss = linear_kl_divergence(*student[:2], *teacher[:2], reduction=reduction, options=options).sum()
    first, second = (torch.autograd.grad(loss, student[:2], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (gradient,) = torch.autograd.grad(loss, student[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()
    z, t = two_logits((3, 20))
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(kl_divergence(z, t, options=options), z, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


@pytest.mark.parametrize("case", DIRECTIONS[:3], ids=IDS[:3])
def test_gradcheck(case):
    z, t = two_logits((3, 7), "independent", torch.float64)
    z.requires_grad_()
    how_ = {"options": Options(backend="torch"), "softcap": 3.0, **how(*case)}
    assert torch.autograd.gradcheck(lambda x: kl_divergence(x, t, reduction="none", **how_), z)
    student, teacher = heads(torch.float64)
    weights = [t.detach().requires_grad_() for t in student]

    def loss(hidden, weight, bias):
        return linear_kl_divergence(hidden, weight, *teacher[:2], linear_bias=bias, **how_)

    assert torch.autograd.gradcheck(loss, weights)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "channels"])
@pytest.mark.parametrize("case", DIRECTIONS[:3], ids=IDS[:3])
def test_any_layout(case, layout, options):
    z, t = two_logits((6, 21))
    target = torch.tensor([0, 1, -100, 3, 4, 5])
    want = kl_divergence(z.requires_grad_(), t, target, options=options, **how(*case))
    (right,) = torch.autograd.grad(want, z)
    make = {
        "transposed": lambda x: x.detach().t().contiguous().t(),
        "sliced": lambda x: torch.cat((x.detach(), x.detach() + 1), 1)[:, :21],
        "offset": lambda x: torch.cat((torch.zeros(3), x.detach().flatten()))[3:].view(6, 21),
    }
    if layout == "channels":  # (N, C, d)
        x, y = (v.detach().view(2, 3, 21).movedim(-1, 1).contiguous() for v in (z, t))
        target, right = target.view(2, 3), right.view(2, 3, 21).movedim(-1, 1)
    else:
        x, y = make[layout](z), make["sliced"](t)
    x.requires_grad_()
    loss = kl_divergence(x, y, target, options=options, **how(*case))
    assert_close(loss, want, rtol=1e-6, atol=1e-7)
    assert_close(torch.autograd.grad(loss, x)[0], right, rtol=1e-5, atol=1e-7)


def test_inputs_stay_as_they_are(options):
    student, teacher = heads()
    before = [t.detach().clone() for t in (*student, *teacher)]
    through_heads(student, teacher, options)
    z, t = two_logits((4, 50))
    kept = z.clone(), t.clone()
    kl_divergence(z.requires_grad_(), t, softcap=3.0, teacher_softcap=2.0, options=options).backward()
    for a, b in zip((*before, *kept), (*student, *teacher, z, t), strict=True):
        assert torch.equal(a, b)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"direction": "backward"}, ValueError, "direction must be one of"),
    ({"beta": 1.0, "direction": "jensen_shannon"}, ValueError, r"beta must be in \[0.001, 0.999\]"),
    ({"beta": 0.3}, ValueError, "beta only has an effect"),
    ({"teacher_logit_scale": 0.0}, ValueError, "teacher_logit_scale must be > 0"),
    ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap must be > 0"),
    ({"options": Options(inplace_backward=True)}, ValueError, "got it for a divergence"),
    ({"options": Options(gradient_columns=4)}, ValueError, "compact plan"),
    ({"options": "torch"}, TypeError, "must be a fused_ppl.Options"),
    ({"target": torch.zeros(2, dtype=torch.long)}, ValueError, "target must have shape"),
    ({"target": torch.full((3, 3), 99)}, IndexError, "target must be in"),
    ({"token_weight": torch.ones(2)}, ValueError, "token_weight must have shape"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of"),
]


@pytest.mark.parametrize(("keywords", "error", "message"), BAD, ids=lambda x: str(x)[:40])
def test_what_does_not_fit_raises_a_sentence(keywords, error, message):
    student, teacher = heads()
    with pytest.raises(error, match=message):
        linear_kl_divergence(*student[:2], *teacher[:2], **keywords)


@pytest.mark.parametrize(
    ("place", "tensor", "message"),
    [
        (2, torch.ones(2, 3, OTHER), "teacher_input must have shape"),
        (2, torch.ones(3, 3, OTHER, dtype=torch.long), "teacher_input must be float16"),
        (3, torch.ones(V + 1, OTHER), "one vocabulary"),
        (3, torch.ones(V, OTHER, dtype=torch.bfloat16), "must have one dtype"),
    ],
    ids=["rows", "integers", "vocabulary", "dtypes"],
)
def test_teachers_that_do_not_fit(place, tensor, message):
    student, teacher = heads()
    given = [*student[:2], *teacher[:2]]
    given[place] = tensor
    with pytest.raises((ValueError, TypeError), match=message):
        linear_kl_divergence(*given)
    with pytest.raises(ValueError, match="one vocabulary"):
        kl_divergence(torch.zeros(2, 5), torch.zeros(2, 6))
