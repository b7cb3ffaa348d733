# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of the public functions over a backend, against the float64 reference within the policy."""

from __future__ import annotations

import math

import options as option_table
import pytest
import torch
from torch.testing import assert_close

import fused_ppl
from fused_ppl import Options, cross_entropy, cross_entropy_with_stats, perplexity
from fused_ppl.testing import KINDS, assert_as_good_as_eager, make_logits, make_target

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# one class; fewer than a vector; a power of two and one less or more; a round number; a tile and a bit; GPT-2; Qwen
ROWS_OF = {1: 5, 2: 5, 3: 7, 127: 5, 129: 5, 1000: 7, 4099: 3, 50257: 3, 151643: 2}
REFERENCE = Options(backend="reference")
LOSSES = [cross_entropy, perplexity]

REDUCTIONS = {cross_entropy: ["mean", "sum", "none", "sequence"], perplexity: ["mean", "none", "sequence"]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", ROWS_OF)
def test_value_and_gradient_for_any_vocabulary_dtype_and_logits(num_classes, kind, dtype, judge, fits):
    n = ROWS_OF[num_classes]
    fits(n, num_classes, dtype=dtype)
    logits, target = make_logits((n, num_classes), dtype, kind=kind), make_target((n,), num_classes, ignored=0.2)
    if kind == "wild":  # a target of probability zero has a test of its own
        target = torch.where((target > 0) & logits.gather(1, target.clamp(min=0)[:, None])[:, 0].isinf(), 0, target)
    for upstream in (1.0, -0.37):
        judge(cross_entropy, logits, target, upstream)
        # 2**-14: the perplexity of untrained logits is near V and above, and its gradient would overflow float16
        judge(perplexity, logits, target, upstream * 2**-14)


def upstream_of(reduction):
    """Another one for each result, or one that is not 1."""
    return {"none": torch.randn(3, 4), "sequence": torch.randn(3)}.get(reduction, -1.7)


@pytest.mark.parametrize(
    ("loss", "name", "reduction"),
    [
        (loss, name, reduction)
        for loss in LOSSES
        for name in option_table.alone(loss)
        for reduction in REDUCTIONS[loss]
        if reduction in option_table.VALUE[name][0].reductions
    ],
)
def test_each_option_alone(loss, name, reduction, judge):
    logits, target = make_logits((3, 4, 37)), make_target((3, 4), 37, ignored=0.2)
    keywords = option_table.keywords([name], 37, target)
    judge(loss, logits, target, upstream_of(reduction), class_dim=-1, reduction=reduction, **keywords)


@pytest.mark.parametrize(("loss", "reduction"), [(loss, r) for loss in LOSSES for r in REDUCTIONS[loss]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_options_together(dtype, loss, reduction, judge, fits, every_option):
    fits(12, 37, dtype=dtype)
    logits, target = make_logits((3, 4, 37), dtype), make_target((3, 4), 37, ignored=0.2)
    keywords = every_option(loss, 37, target)
    judge(loss, logits, target, upstream_of(reduction), class_dim=-1, reduction=reduction, **keywords)


def padded(x):
    """Rows with a gap behind them."""
    return torch.nn.functional.pad(x, (0, 3))[..., : x.shape[-1]]


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "padded rows": padded,
    "every second class": lambda x: x.repeat_interleave(2, -1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "rows backwards in memory": lambda x: x.flip(0).clone().flip(0),
    "offset by one element": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded rows": lambda x: x[:1].expand_as(x),
    "expanded classes": lambda x: x[:, :1].expand_as(x),
    "last position of a sequence": lambda x: x[:, None].expand(-1, 4, -1).contiguous()[:, -1],
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_logits(layout, dtype, loss, judge):
    logits = LAYOUTS[layout](make_logits((6, 37), dtype))
    target = make_target((6,), 37, ignored=0.2)
    judge(loss, logits, target)
    judge(loss, logits, target, softcap=3.0, label_smoothing=0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_more_chunks_than_rows_fit(layout, backend, judge):
    logits = LAYOUTS[layout](make_logits((6, 37)))
    judge(perplexity, logits, make_target((6,), 37), options=Options(backend=backend, memory_budget=37 * 4 * 2))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("shape", "class_dim"),
    [
        ((4, 37, 3), 1),
        ((2, 37, 3, 2), 1),
        ((2, 5, 37), -1),
        ((2, 5, 37), 2),
        ((37, 6), 0),
        ((2, 3, 37, 2), -2),
        ((5, 1), 1),
    ],
    ids=str,
)
def test_classes_at_any_dimension(shape, class_dim, loss, judge):
    logits = make_logits(shape)
    target = make_target(logits.movedim(class_dim, -1).shape[:-1], shape[class_dim], ignored=0.2)
    for reduction in ("mean", "none", "sequence"):
        judge(loss, logits, target, 0.5, class_dim=class_dim, reduction=reduction)


def test_layouts_that_no_view_turns_into_rows(judge):
    images = make_logits((2, 7, 4, 6))[:, :, :3, :5]  # cropped
    target = make_target((2, 3, 5), 7, ignored=0.2)
    judge(perplexity, images, target)
    judge(cross_entropy, images.permute(3, 1, 0, 2), target.permute(2, 0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    "part", [lambda x: x[:, :-1], lambda x: x[:, -2:], lambda x: x[:, 1:3], lambda x: x[::2], lambda x: x[:, ::3]]
)
def test_parts_of_a_batch_of_sequences(part, rows, dtype, backend, judge):
    """Slices (B, T', V) of (B, T, V), whose gradient is not laid out as they are; in chunks of any size."""
    logits = part(make_logits((3, 8, 37), dtype))
    target = make_target(logits.shape[:2], 37, ignored=0.2)
    judge(perplexity, logits, target, class_dim=-1, options=Options(backend=backend, memory_budget=37 * 4 * rows))


def test_channels_last_images(judge):
    images = make_logits((2, 7, 4, 6)).contiguous(memory_format=torch.channels_last)
    judge(perplexity, images, make_target((2, 4, 6), 7, ignored=0.2))


@pytest.mark.parametrize("loss", LOSSES)
def test_one_row_without_a_batch(loss, judge):
    judge(loss, make_logits((37,)), torch.tensor(36))
    judge(loss, make_logits((37,)), torch.tensor(0), reduction="none")


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y.int(),
        lambda y: y.int().repeat_interleave(2)[::2],
        lambda y: torch.cat([y[:1], y])[1:],  # 8 bytes behind an aligned address
        lambda y: y[:1].expand_as(y),
    ],
)
def test_targets_of_any_integer_type_and_layout(make, judge):
    target = make(make_target((6,), 37, ignored=0.2))
    judge(perplexity, make_logits((6, 37)), target)


@pytest.mark.parametrize("kind", ["random", "peaked", "wild"])
@pytest.mark.parametrize("keywords", [{}, {"softcap": 3.0}, {"logit_scale": 2.0, "label_smoothing": 0.1}], ids=str)
def test_statistics(kind, keywords, options):
    logits, target = make_logits((7, 129), kind=kind), make_target((7,), 129, ignored=0.2)
    ours = cross_entropy_with_stats(logits, target, options=options, **keywords)
    eager = cross_entropy_with_stats(logits, target, options=REFERENCE, **keywords)
    truth = cross_entropy_with_stats(logits.double(), target, options=REFERENCE, **keywords)
    for name in ("loss", "perplexity", "nll", "lse", "entropy"):
        assert_as_good_as_eager(getattr(ours, name), getattr(eager, name), getattr(truth, name), name)
    assert ours.total_weight == truth.total_weight
    if "softcap" not in keywords:  # a cap makes ties of float32
        assert_close(ours.predicted, truth.predicted)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence"])
@pytest.mark.parametrize(
    ("shape", "class_dim"),
    [((7,), 1), ((4, 7), 1), ((2, 3, 7), -1), ((2, 7, 3, 5), 1), ((0, 7), 1), ((2, 0, 7), -1)],
    ids=str,
)
def test_every_result_has_the_shape_and_dtype_that_is_promised(shape, class_dim, reduction, options):
    logits = make_logits(shape)
    of_target = logits.shape[:-1] if class_dim == -1 or logits.ndim == 1 else logits.movedim(1, -1).shape[:-1]
    if not of_target and reduction == "sequence":
        pytest.skip("one token is no sequence")
    target = make_target(of_target, 7)
    of_loss = {"none": of_target, "sequence": of_target[:-1]}.get(reduction, ())
    for how in (options, REFERENCE):
        out = cross_entropy_with_stats(logits, target, class_dim=class_dim, reduction=reduction, options=how)
        for name in ("loss", "perplexity", "total_weight"):
            assert getattr(out, name).shape == of_loss, name
        for name in ("nll", "lse", "entropy", "predicted"):
            assert getattr(out, name).shape == of_target, name
        kinds = [torch.float32] * 2 + [torch.float32] * 3 + [torch.int64, torch.float64]
        assert [t.dtype for t in out[:7]] == kinds


def test_lse_is_exact_where_the_target_has_no_chance(options):
    # a masked class as target: nll is 1e9, and lse must not be what is left after subtracting it
    logits = torch.tensor([[5.0, 0.0, 1.0, -1e9], [5.0, 0.0, 1.0, -math.inf], [5.0, 0.0, 1.0, -60.0]])
    out = cross_entropy_with_stats(logits, torch.full((3,), 3), options=options)
    assert_close(out.lse, logits.double().logsumexp(1).float())
    assert out.nll[1] == math.inf


def test_a_target_of_probability_zero_costs_infinitely_much(options):
    logits = torch.tensor([[1.0, -math.inf, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, 2]), reduction="none", options=options)
    assert loss[0] == math.inf
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones(2))
    expected = logits.detach().softmax(1) - torch.tensor([[0.0, 1, 0], [0, 0, 1]])
    assert_close(gradient, expected)


@pytest.mark.parametrize("columns", [1000, 4999])  # a CPU looks through long rows by blocks of 256
def test_the_lowest_index_is_predicted_on_ties(columns, options):
    logits = torch.zeros(3, columns)
    logits[1, [77, 500, columns - 1]] = 1.0
    logits[2, columns - 1] = 1.0
    out = cross_entropy_with_stats(logits, torch.zeros(3, dtype=torch.long), options=options)
    assert out.predicted.tolist() == [0, 77, columns - 1]


@pytest.mark.parametrize("reduction", ["mean", "none", "sequence", "sum"])
def test_loss_and_perplexity_differentiate_together(reduction, options):
    x = make_logits((3, 4, 19))
    target = make_target((3, 4), 19, ignored=0.2)

    def gradient(x, options):
        x = x.detach().requires_grad_()
        keywords = {"class_dim": -1, "reduction": reduction, "z_loss": 0.01, "max_nll": 2.0, "options": options}
        out = cross_entropy_with_stats(x, target, **keywords)
        (0.3 * out.loss.square() + 0.01 * out.perplexity).sum().backward()
        return x.grad

    assert_as_good_as_eager(gradient(x, options), gradient(x, REFERENCE), gradient(x.double(), REFERENCE))


def test_sum_carries_what_adds_up(options):
    x, target = make_logits((10, 19)), make_target((10,), 19, ignored=0.3)
    out = cross_entropy_with_stats(x, target, reduction="sum", options=options)
    counted = target != -100
    expected = torch.nn.functional.cross_entropy(x.double(), target, reduction="sum")
    assert_close(out.loss, expected.float())
    assert out.total_weight.dtype == torch.float64
    assert out.total_weight == counted.sum()
    assert_close(out.perplexity, (expected / counted.sum()).exp().float())


def test_max_nll_is_continuous_in_value_and_slope(options):
    c = 2.0

    def at(nll):
        x = torch.tensor([[math.log(math.expm1(nll)), 0.0]], requires_grad=True)
        value = perplexity(x, torch.tensor([1]), max_nll=c, options=options)
        value.backward()
        return value.item(), x.grad[0, 0].item() / -math.expm1(-nll)  # d value / d nll

    below, above = at(c - 1e-4), at(c + 1e-4)
    assert below[0] == pytest.approx(math.exp(c - 1e-4), rel=1e-5)
    assert above[0] == pytest.approx(math.exp(c) * (1 + 1e-4), rel=1e-5)
    assert below[1] == pytest.approx(math.exp(c), rel=2e-4)
    assert above[1] == pytest.approx(math.exp(c), rel=1e-5)
    assert at(5.0) == pytest.approx((math.exp(c) * 4, math.exp(c)), rel=1e-5)


def test_max_nll_keeps_value_and_gradient_finite(options):
    x = torch.tensor([[300.0, 0.0], [0.0, 200.0]], requires_grad=True)
    value = perplexity(x, torch.tensor([1, 0]), max_nll=20.0, options=options)
    value.backward()
    assert value.item() == pytest.approx(math.exp(20) * (1 + 250 - 20), rel=1e-6)
    assert_close(x.grad, math.exp(20) / 2 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    assert perplexity(x, torch.tensor([1, 0]), options=options) == math.inf


def test_float64_is_computed_in_float64(options, fits, every_option):
    fits(dtype=torch.float64)
    target = make_target((2, 3), 5, ignored=0.2)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    keywords = every_option(cross_entropy, 5, target)

    def both(x, reduction):
        out = cross_entropy_with_stats(
            x, target, class_dim=-1, reduction=reduction, max_nll=1.0, options=options, **keywords
        )
        return out.loss, out.perplexity

    for reduction in ("mean", "none", "sequence", "sum"):
        assert torch.autograd.gradcheck(lambda x, r=reduction: both(x, r), x)


def test_num_items_of_float64_input_is_not_rounded(options, fits):
    fits(dtype=torch.float64)
    logits = torch.zeros(2, 4, dtype=torch.float64)
    loss = cross_entropy(logits, torch.tensor([0, 1]), num_items=3.3, options=options)
    assert loss.item() == pytest.approx(2 * math.log(4) / 3.3, rel=1e-14)


@pytest.mark.parametrize("items", [0, -2.0, math.inf])
def test_num_items_that_make_no_sense_follow_torch(items, options):
    loss = cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]), num_items=items, options=options)
    expected = torch.tensor(2 * math.log(4)) / torch.tensor(float(items))
    assert_close(loss, expected)


def test_results_have_no_graph_where_none_is_wanted(options):
    x, target = make_logits((4, 19)), make_target((4,), 19)
    assert not perplexity(x, target, options=options).requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not perplexity(x, target, options=options).requires_grad
    with torch.inference_mode():
        assert_close(
            perplexity(x, target, options=options), fused_ppl.perplexity(x.detach(), target, options=REFERENCE)
        )
