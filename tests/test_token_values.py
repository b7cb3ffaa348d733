# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities, entropies and lse of tokens: worked out by hand, then by the reference, with every gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from token_cases import FIELDS, REFERENCE, SUBSETS, judge_head, judge_logits, mixture, values_and_gradients

from fused_ppl import (
    LogProbs,
    Options,
    cross_entropy_with_stats,
    linear_cross_entropy,
    linear_cross_entropy_with_stats,
    linear_log_probs,
    log_probs,
    plan,
)
from fused_ppl.testing import KINDS, assert_as_good_as_eager, make_logits, make_target

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# V: one class besides the target; less than a tile; a prime over several tiles
SIZES = [(5, 2), (16, 129), (4, 4099)]


def test_two_classes_by_hand(options):
    """For p = (3/4, 1/4) everything is a small expression in ln 2 and ln 3."""
    x = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
    out = log_probs(x, torch.tensor([1]), options=options)
    entropy = 2 * math.log(2) - 0.75 * math.log(3)
    torch.testing.assert_close(out.log_prob.item(), -2 * math.log(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.entropy.item(), entropy, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.lse.item(), 2 * math.log(2), rtol=1e-6, atol=0)
    expected = {
        "log_prob": [-3 / 4, 3 / 4],
        # -p (ln p + H): ln(3/4) + H = ln 3 / 4, and ln(1/4) + H = -3/4 ln 3
        "entropy": [-3 / 16 * math.log(3), 3 / 16 * math.log(3)],
        "lse": [3 / 4, 1 / 4],
    }
    for name, values in expected.items():
        (got,) = torch.autograd.grad(getattr(out, name), x, torch.ones(1), retain_graph=True)
        torch.testing.assert_close(got, torch.tensor([values]), rtol=1e-6, atol=0)


def test_three_classes_by_hand(options):
    """For p = (1/2, 1/4, 1/4) the entropy is 3/2 ln 2, and ln p + H is ln 2 / 2 and twice -ln 2 / 2."""
    x = torch.tensor([[math.log(2), 0.0, 0.0]], requires_grad=True)
    out = log_probs(x, torch.tensor([0]), options=options)
    ln2 = math.log(2)
    for value, expected in zip(out, (-ln2, 1.5 * ln2, 2 * ln2), strict=True):
        torch.testing.assert_close(value.item(), expected, rtol=1e-6, atol=0)
    (got,) = torch.autograd.grad(2 * out.log_prob + 3 * out.entropy - out.lse, x)
    by_hand = [2 / 2 - 3 * ln2 / 4 - 1 / 2, -2 / 4 + 3 * ln2 / 8 - 1 / 4, -2 / 4 + 3 * ln2 / 8 - 1 / 4]
    torch.testing.assert_close(got, torch.tensor([by_hand]), rtol=2e-6, atol=0)


def test_three_classes_with_scale_and_cap_by_hand(options):
    """With scale 1/2 and cap 2 the logits 4 artanh(c) are 2c, and each has the slope (1 - c^2) / 2."""
    c = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64)
    z, y = 2 * c, 2
    p = z.exp() / z.exp().sum()
    entropy = -(p * p.log()).sum()
    x = (4 * torch.atanh(c))[None].float().requires_grad_()
    out = log_probs(x, torch.tensor([y]), logit_scale=0.5, softcap=2.0, options=options)
    for value, expected in zip(out, (p[y].log(), entropy, z.exp().sum().log()), strict=True):
        torch.testing.assert_close(value.double(), expected[None], rtol=1e-6, atol=0)
    dz = (F.one_hot(torch.tensor(y), 3) - p) - 2 * p * (p.log() + entropy) + 3 * p
    (got,) = torch.autograd.grad(out.log_prob + 2 * out.entropy + 3 * out.lse, x)
    torch.testing.assert_close(got.double(), (dz * (1 - c**2) / 2)[None], rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", ["random", "flat", "peaked"])
def test_the_reference_is_categorical_and_the_formulas(kind):
    x, y = make_logits((7, 13), torch.float64, kind=kind).requires_grad_(), make_target((7,), 13)
    out, categorical = log_probs(x, y, options=REFERENCE), torch.distributions.Categorical(logits=x)
    expected = LogProbs(categorical.log_prob(y), categorical.entropy(), x.logsumexp(-1))
    p, logp = x.detach().softmax(-1), x.detach().log_softmax(-1)
    formulas = (F.one_hot(y, 13) - p, -p * (logp - (p * logp).sum(-1, keepdim=True)), p)
    for got, want, formula in zip(out, expected, formulas, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        (gradient,) = torch.autograd.grad(got.sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient, formula, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(
            torch.autograd.grad(want.sum(), x, retain_graph=True)[0], formula, rtol=1e-9, atol=1e-14
        )


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_subset_of_upstream_gradients(dtype, names, options, fits):
    fits(16, 129, dtype=dtype)
    target = make_target((16,), 129, ignored=0.2)
    judge_logits(make_logits((16, 129), dtype), target, options, mixture((16,), names))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_and_kind_of_logits(dtype, shape, kind, options, fits):
    fits(*shape, dtype=dtype)
    judge_logits(make_logits(shape, dtype, kind=kind), make_target(shape[:1], shape[1], ignored=0.2), options)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_a_real_vocabulary(dtype, options, fits):
    fits(8, 50257, dtype=dtype)
    judge_logits(make_logits((8, 50257), dtype), make_target((8,), 50257), options)


@pytest.mark.parametrize("names", [("entropy",), FIELDS], ids="+".join)
@pytest.mark.parametrize("keywords", [{"softcap": 3.0}, {"logit_scale": 0.4}, {"softcap": 20.0, "logit_scale": 1.7}])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_and_cap(dtype, keywords, names, options, fits):
    fits(12, 300, dtype=dtype)
    target = make_target((12,), 300, ignored=0.2)
    judge_logits(make_logits((12, 300), dtype), target, options, mixture((12,), names), **keywords)


def test_one_class_has_no_uncertainty(options):
    x = torch.tensor([[3.5], [-2.0]], requires_grad=True)
    out = log_probs(x, torch.zeros(2, dtype=torch.long), options=options)
    assert out.log_prob.tolist() == out.entropy.tolist() == [0, 0] and out.lse.tolist() == [3.5, -2]
    (gradient,) = torch.autograd.grad(out.log_prob + 2 * out.entropy + 3 * out.lse, x, torch.ones(2))
    torch.testing.assert_close(gradient, torch.full((2, 1), 3.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_ignored_rows_may_hold_anything_and_are_exactly_zero(names, options):
    x, y = make_logits((6, 37)), make_target((6,), 37)
    y[[0, 3, 4]] = -100
    x[0], x[3], x[4] = torch.nan, torch.inf, -torch.inf
    out, (gradient,) = values_and_gradients(lambda x: log_probs(x, y, options=options), [x], mixture((6,), names))
    for value in (*out, gradient):
        assert not value[y == -100].any() and value[y != -100].isfinite().all()
    assert not out.log_prob[y == -100].signbit().any()
    judge_logits(x, y, options, mixture((6,), names))


@pytest.mark.parametrize("ignore_index", [0, 36, None])
def test_any_class_may_be_ignored(ignore_index, options):
    judge_logits(make_logits((6, 37)), make_target((6,), 37), options, ignore_index=ignore_index)


def test_all_tokens_ignored_and_no_token(options):
    for n, v in ((3, 7), (0, 7)):
        x, y = torch.full((n, v), torch.nan), torch.full((n,), -100)
        out, (gradient,) = values_and_gradients(lambda x, y=y: log_probs(x, y, options=options), [x], mixture((n,)))
        assert gradient.shape == x.shape and not gradient.any()
        assert all(value.shape == (n,) and not value.any() for value in out)
        tensors = [torch.full((n, 4), torch.nan), torch.ones(v, 4), torch.ones(v)]

        def head(h, w, b, y=y):
            return linear_log_probs(h, w, y, linear_bias=b, options=options)

        out, grads = values_and_gradients(head, tensors, mixture((n,)))
        assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, tensors, strict=True))
        assert all(value.shape == (n,) and not value.any() for value in out)


def by_rows(logits, target, options, names, **keywords):
    """The gradients by us, by eager and in float64, of an upstream gradient of 1 of each name."""
    upstream = {name: torch.ones(target.shape) for name in names}
    for x, how in ((logits, options), (logits, REFERENCE), (logits.double(), REFERENCE)):
        call = values_and_gradients(lambda x, o=how: log_probs(x, target, options=o, **keywords), [x], upstream)
        yield call[1][0]


@pytest.mark.parametrize("gap", [5, 10, 15, 20, 30])
def test_a_confident_row_keeps_the_digits_of_its_entropy(gap, options):
    """An entropy near 0: each row is judged by its own largest entry, which is as small as 1e-10.

    That holds where the target is the likely class. Where another class is, its p of 1 is rounded by fp32 arithmetic.
    """
    x = make_logits((4, 37), kind="flat") * 100
    target = torch.tensor([0, 0, 5, 36])
    x[:, 0] += gap
    for y, mine, eager, truth in zip(target, *by_rows(x, target, options, ("entropy",)), strict=True):
        if y == 0:
            assert_as_good_as_eager(mine, eager, truth, f"gradient of the entropy at gap {gap}")
        else:
            allowed = 2 * (eager - truth).abs().amax() + torch.finfo(torch.float32).eps * (1 + 4 * truth.abs().amax())
            assert ((mine - truth).abs() <= allowed).all()


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_a_flat_row_has_a_small_gradient_of_its_entropy(spread, options):
    """An entropy near ln V: ln p + H nearly cancels, and what is left of a rounding is ln V times it."""
    x = make_logits((4, 129), kind="flat") * (1e3 * spread)
    p, log_v = 1 / 129, math.log(129)
    for mine, _, truth in zip(*by_rows(x, make_target((4,), 129), options, ("entropy",)), strict=True):
        assert ((mine - truth).abs() <= 4 * torch.finfo(torch.float32).eps * (p * log_v + truth.abs())).all()


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_logit_of_minus_infinity_has_no_part(dtype, names, options, fits):
    """Its p is 0 and its ln p is -inf, whose product counts as 0 in the entropy and in every gradient."""
    fits(5, 37, dtype=dtype)
    x, y = make_logits((5, 37), dtype), torch.tensor([3, 0, 36, 3, 5])
    x[:, 7:20] = -torch.inf
    x[1, 1:] = -torch.inf  # one class is left
    x[4, 1:] = -torch.inf  # and it is not the target: log_prob is -inf
    upstream = mixture((5,), names)
    _, (gradient,) = values_and_gradients(lambda x: log_probs(x, y, options=options), [x], upstream)
    assert gradient.isfinite().all() and not gradient[:, 7:20].any()
    judge_logits(x, y, options, upstream)


def test_a_target_of_minus_infinity(options):
    x, y = make_logits((3, 9)), torch.tensor([2, 2, 2])
    x[:2, 2] = -torch.inf
    out = log_probs(x.requires_grad_(), y, options=options)
    assert out.log_prob.isneginf().tolist() == [True, True, False]
    judge_logits(x.detach(), y, options)
    for name, expected in (("log_prob", 1.0), ("entropy", 0.0), ("lse", 0.0)):
        (gradient,) = torch.autograd.grad(getattr(out, name).sum(), x, retain_graph=True)
        assert gradient.isfinite().all() and gradient[:2, 2].tolist() == [expected] * 2


LAYOUTS = {
    "(C,)": (lambda: make_logits((37,)), {}),
    "(N, C, d1, d2)": (lambda: make_logits((2, 11, 3, 2)), {}),
    "(B, T, V)": (lambda: make_logits((2, 5, 37)), {"class_dim": -1}),
    "classes first": (lambda: make_logits((11, 6)), {"class_dim": 0}),
    "every second row": (lambda: make_logits((8, 37))[::2], {}),
    "every second class": (lambda: make_logits((5, 74))[:, ::2], {}),
    "transposed": (lambda: make_logits((37, 6)).t(), {}),
    "shifted": (lambda: make_logits((2, 6, 37))[:, :-1], {"class_dim": -1}),
    "broken": (lambda: make_logits((4, 3, 2, 11)).permute(2, 0, 1, 3)[:, ::2], {"class_dim": -1}),
    "expanded": (lambda: make_logits((1, 37)).expand(4, 37), {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("int32", [False, True])
def test_any_layout(layout, int32, options):
    make, keywords = LAYOUTS[layout]
    x = make()
    dim = keywords.get("class_dim", min(1, x.ndim - 1))
    shape = x.movedim(dim, -1).shape
    target = make_target(shape[:-1], shape[-1], ignored=0.2)
    judge_logits(x, target.int() if int32 else target, options, **keywords)


def make_head(n, v, d, dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (v, d), (v,))[: 2 + bias]
    hidden, *rest = (torch.randn(shape, generator=generator) for shape in shapes)
    return [t.to(dtype) for t in (hidden / d**0.5 * 3, *rest)], make_target((n,), v, ignored=0.2)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_head(dtype, names, options, fits):
    fits(16, 129, dtype=dtype)
    tensors, target = make_head(16, 129, 8, dtype)
    judge_head(tensors, target, options, mixture((16,), names))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keywords", [{"softcap": 3.0}, {"logit_scale": 0.4}, {"softcap": 9.0, "logit_scale": 1.7}])
def test_the_head_with_scale_and_cap(keywords, bias, options, fits):
    fits(8, 1000)
    tensors, target = make_head(8, 1000, 16, bias=bias)
    judge_head(tensors, target, options, **keywords)


def test_the_head_in_slices_and_a_batch(options, monkeypatch):
    """Backward goes over slices of the vocabulary, of which the last is smaller."""
    monkeypatch.setattr(plan, "COLUMNS", 50)
    tensors, target = make_head(6, 129, 8)
    tensors[0], target = tensors[0].view(2, 3, 8), target.view(2, 3)
    judge_head(tensors, target, options)


def test_ignored_hidden_states_may_hold_anything(options):
    tensors, target = make_head(6, 37, 4)
    target[2] = -100
    tensors[0][2] = torch.nan

    def head(h, w, b):
        return linear_log_probs(h, w, target, linear_bias=b, options=options)

    out, (hidden, *others) = values_and_gradients(head, tensors, mixture((6,)))
    assert not hidden[2].any() and all(g.isfinite().all() for g in (hidden, *others, *out))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(needed, options):
    tensors, target = make_head(6, 37, 4)
    upstream = mixture((6,))

    def gradients(needed):
        leaves = [t.clone().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        out = linear_log_probs(*leaves[:2], target, linear_bias=leaves[2], options=options)
        torch.autograd.backward(out, [g.float() for g in upstream.values()])
        return [t.grad for t in leaves]

    for got, all_of, n in zip(gradients(needed), gradients((True,) * 3), needed, strict=True):
        assert torch.equal(got, all_of) if n else got is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_takes_the_memory_that_its_plan_says(dtype, options, peak_bytes, fits):
    n, v, d = 1024, 32768, 64
    fits(n, v)
    (hidden, weight), target = make_head(n, v, d, dtype, bias=False)
    leaves, upstream = [hidden.requires_grad_(), weight.requires_grad_()], [g.float() for g in mixture((n,)).values()]

    def step():
        return torch.autograd.grad(linear_log_probs(*leaves, target, options=options), leaves, upstream)

    step()
    case = plan.LinearCase(n, v, d, hidden.element_size(), "cpu", (True, True, False))
    said, peak = plan.linear_plan(case, "vocab").peak_bytes, peak_bytes(step)
    assert peak <= 1.1 * said
    assert peak < n * v * hidden.element_size()  # which the logits alone would take


@pytest.mark.parametrize("needs_grad", [False, True])
def test_log_prob_has_the_bits_of_the_loss(needs_grad, options, fits):
    """The kernels add in another order where they compute an entropy; so does `linear_cross_entropy_with_stats`."""
    fits(16, 1000)
    tensors, target = make_head(16, 1000, 16)
    losses = [lambda *given, **keywords: linear_cross_entropy_with_stats(*given, **keywords).loss]
    losses += [linear_cross_entropy] if options.backend == "torch" else []
    leaves = [t.requires_grad_(needs_grad) for t in tensors]
    given, keywords = (*leaves[:2], target), {"linear_bias": leaves[2], "options": options}
    log_prob = linear_log_probs(*given, **keywords).log_prob
    gradients = torch.autograd.grad(log_prob.sum(), leaves) if needs_grad else ()
    for loss in losses:
        nll = loss(*given, reduction="none", **keywords)
        assert torch.equal(log_prob, -nll)
        of_nll = torch.autograd.grad(nll.sum(), leaves) if needs_grad else ()
        assert all(torch.equal(a, -b) for a, b in zip(gradients, of_nll, strict=True))
    x = make_logits((16, 1000))
    nll = cross_entropy_with_stats(x, target, reduction="none", options=options).loss
    assert torch.equal(log_probs(x, target, options=options).log_prob, -nll)


def test_the_same_from_logits_and_through_the_head(options):
    (hidden, weight, bias), target = make_head(9, 37, 4, torch.float32)
    of_head = linear_log_probs(hidden, weight, target, linear_bias=bias, options=options)
    of_logits = log_probs(F.linear(hidden, weight, bias), target, options=options)
    for a, b in zip(of_head, of_logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


X, Y, H, W = torch.zeros(4, 7), torch.zeros(4, dtype=torch.long), torch.zeros(4, 3), torch.zeros(7, 3)
ERRORS = [
    (
        Options(inplace_backward=True),
        ValueError,
        r"inplace_backward=True is for .*got it for log-probabilities.*inplace_backward=False",
    ),
    (Options(gradient_tolerance=0.1), ValueError, r"linear_perplexity have; got \(0\.1, None, None\).*Leave them None"),
    (Options(gradient_columns=4), ValueError, r"linear_perplexity have; got \(None, 4, None\)"),
    (Options(gradient_tolerance=0.1, screen="int8"), ValueError, r"belong to the compact plan"),
    ({}, TypeError, "fused_ppl.Options"),
]


@pytest.mark.parametrize(("bad", "error", "message"), ERRORS, ids=str)
def test_options_that_do_not_fit(bad, error, message):
    for call in (lambda o: log_probs(X, Y, options=o), lambda o: linear_log_probs(H, W, Y, options=o)):
        with pytest.raises(error, match=message):
            call(bad)


CALLS = [
    (lambda o: log_probs(X, Y[:3], options=o), ValueError, r"shape \(4,\).*\(3,\)"),
    (lambda o: log_probs(X[None], Y[None], options=o), ValueError, "class_dim=-1"),
    (lambda o: log_probs(X, Y + 7, options=o), IndexError, r"\[0, 7\)"),
    (lambda o: log_probs(X, Y - 1, options=o), IndexError, r"\[0, 7\)"),
    (lambda o: log_probs(X, Y - 100, ignore_index=None, options=o), IndexError, r"\[0, 7\)"),
    (lambda o: log_probs(X.long(), Y, options=o), TypeError, "float16"),
    (lambda o: log_probs(X, X, options=o), TypeError, "class indices"),
    (lambda o: log_probs(X, Y, softcap=0.0, options=o), ValueError, "> 0"),
    (lambda o: log_probs(X, Y, logit_scale=-1.0, options=o), ValueError, "> 0"),
    (lambda o: log_probs(X, Y, class_dim=2, options=o), IndexError, r"\[-2, 1\]"),
    (lambda o: linear_log_probs(H, W[0], Y, options=o), ValueError, r"linear_weight must have shape \(V, D\)"),
    (lambda o: linear_log_probs(H, W[:, :2], Y, options=o), ValueError, r"D = 2 to match linear_weight"),
    (lambda o: linear_log_probs(H, W, Y[:3], options=o), ValueError, r"\(4,\)"),
    (lambda o: linear_log_probs(H, W, Y + 7, options=o), IndexError, r"\[0, 7\)"),
    (lambda o: linear_log_probs(H, W, Y, linear_bias=H[0], options=o), ValueError, "bias"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_inputs_that_do_not_fit(call, error, message, options):
    for how in (options, REFERENCE):
        with pytest.raises(error, match=message):
            call(how)
