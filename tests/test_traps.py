# SPDX-License-Identifier: Apache-2.0
"""One test, or more, for each bug that a library like this one has had. The numbers are those of the list of traps.

5 (frozen parts of a head) and 16 stand in tests/test_linear.py; 17 to 21 and 26 need several devices or ranks, or
belong to the benchmarks.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import fused_ppl
from fused_ppl import Options, cross_entropy, cross_entropy_with_stats, perplexity
from fused_ppl.engines import logits as engine
from fused_ppl.testing import assert_as_good_as_eager, make_logits, make_target

LOSSES = [cross_entropy, perplexity]
REDUCTIONS = {cross_entropy: ["mean", "sum", "none", "sequence"], perplexity: ["mean", "none", "sequence"]}


def grad(loss, x, upstream=None):
    return torch.autograd.grad(loss, x, upstream, retain_graph=True)[0]


@pytest.mark.parametrize("scale", [3.7, 0.0, -1.0, 65536.0])
def test_01_upstream_gradient_is_not_taken_for_one(scale, options):
    x, target = make_logits((5, 11)).requires_grad_(), make_target((5,), 11)
    loss = cross_entropy(x, target, options=options)
    assert_close(grad(loss * scale, x), scale * grad(F.cross_entropy(x, target), x), rtol=1e-5, atol=1e-6 * abs(scale))
    per_token = cross_entropy(x, target, reduction="none", options=options)
    expanded = torch.tensor(scale).expand(5)
    expected = grad(F.cross_entropy(x, target, reduction="none"), x, expanded)
    assert_close(grad(per_token, x, expanded), expected, rtol=1e-5, atol=1e-6 * abs(scale))


def test_01_upstream_gradient_of_another_dtype_raises_or_is_right(options):
    x, target = make_logits((5, 11)).requires_grad_(), make_target((5,), 11)
    loss = cross_entropy(x, target, options=options)
    try:
        got = grad(loss, x, torch.tensor(2.0, dtype=torch.float64))
    except RuntimeError as error:
        assert "dtype" in str(error) or "type" in str(error)
    else:
        assert_close(got, 2 * grad(F.cross_entropy(x, target), x))


def test_02_a_wrong_result_is_not_compared_with_itself(judge, monkeypatch, backend):
    """The comparison that the other tests use sees an error of 1e-5 in one entry."""
    rows = engine.backends.load(backend)
    right = rows.nll_backward

    def wrong(*args, out, **keywords):
        right(*args, out=out, **keywords)
        out[..., 1, 3] += 1e-5

    x, target = make_logits((5, 11)), make_target((5,), 11)
    judge(cross_entropy, x, target)
    monkeypatch.setattr(rows, "nll_backward", wrong)
    with pytest.raises(AssertionError, match="gradient of cross_entropy"):
        judge(cross_entropy, x, target)


def test_03_second_backward_does_not_scale_twice(options):
    x = make_logits((5, 11)).requires_grad_()
    loss = perplexity(x, make_target((5,), 11), options=options)
    first = grad(loss, x, torch.tensor(3.0))
    assert torch.equal(grad(loss, x, torch.tensor(3.0)), first)
    assert_close(grad(loss, x) * 3, first)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_04_ignored_rows_of_the_caller_are_not_zeroed(mode, options):
    x = make_logits((5, 11))
    target = torch.tensor([-100, 3, -100, 10, 0])
    copies = x.clone(), target.clone()
    with mode():
        cross_entropy_with_stats(x, target, softcap=2.0, options=options)
        perplexity(x, target, options=options)
    assert torch.equal(x, copies[0])
    assert torch.equal(target, copies[1])


@pytest.mark.parametrize("chunks", [1, 4, 32, 256])
def test_06_loss_is_not_accumulated_in_half_precision(chunks, backend, fits):
    fits(256, 65)
    x, target = make_logits((256, 65), torch.bfloat16), make_target((256,), 65)
    options = Options(backend, memory_budget=256 // chunks * 65 * 4)
    truth = F.cross_entropy(x.double(), target)
    assert abs(cross_entropy(x, target, options=options).double() - truth) < 3e-7 * truth
    assert abs(perplexity(x, target, options=options).double() - truth.exp()) < 3e-6 * truth.exp()


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 1 - 1e-6])
def test_07_the_gradient_of_a_confident_target_keeps_its_digits(p, judge):
    x = torch.randn(6, 11)
    target = make_target((6,), 11)
    rest = x.scatter(1, target[:, None], -math.inf).logsumexp(1)
    x = x.scatter(1, target[:, None], (rest + math.log(p / (1 - p)))[:, None])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        judge(cross_entropy, x.to(dtype), target, reduction="none")
        judge(perplexity, x.to(dtype), target, 3.7)


def test_07_one_over_n_is_not_rounded_in_fp16(options, fits):
    fits(65536, 5)
    x, target = make_logits((65536, 5), torch.float16), make_target((65536,), 5)

    def of(x, loss):
        x = x.detach().requires_grad_()
        return grad(loss(x) * 65536, x)  # as a GradScaler would: 1 / n alone is a subnormal of fp16

    got = of(x, lambda x: cross_entropy(x, target, options=options))
    eager, truth = (of(y, lambda y: F.cross_entropy(y, target)) for y in (x.float(), x.double()))
    assert got.dtype == torch.float16
    assert_as_good_as_eager(got, eager.half(), truth)
    assert_close(got.double(), truth, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_08_the_loss_is_float32_and_does_not_overflow(dtype, options, fits):
    fits(2, 128256)
    x = torch.zeros(2, 128256, dtype=dtype, requires_grad=True)
    value = perplexity(x, torch.tensor([0, 128255]), options=options)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(128256, rel=1e-6)  # fp16 ends at 65504
    gradient = grad(value, x)
    assert gradient.isfinite().all()
    assert gradient[0, 1].item() == pytest.approx(0.5, rel=2**-8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf, -math.inf])
def test_09_no_counted_token_gives_zero_gradients_and_a_connected_graph(fill, shape, loss, options):
    for reduction in REDUCTIONS[loss]:
        leaf = torch.full((*shape, 5), fill, requires_grad=True)
        target = torch.full(shape, -100)
        value = loss(leaf * 1, target, class_dim=-1, reduction=reduction, softcap=2.0, options=options)
        assert value.requires_grad
        empty = {"mean": math.nan, "sum": 0.0, "sequence": math.nan, "none": 0.0 if loss is cross_entropy else 1.0}
        assert_close(value, torch.full_like(value, empty[reduction]), equal_nan=True)
        assert value.nan_to_num(0.0).isfinite().all()
        gradient = grad(value.nan_to_num(0.0).sum(), leaf)
        if leaf.isfinite().all():
            assert torch.equal(gradient, torch.zeros_like(leaf))
        value.sum().backward()
        assert leaf.grad is not None


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
def test_09_gradient_of_ignored_rows_is_exactly_zero(fill, options):
    x = make_logits((4, 7))
    x[[0, 2]] = fill
    x.requires_grad_()
    out = cross_entropy_with_stats(
        x, torch.tensor([-100, 3, -100, 6]), label_smoothing=0.1, z_loss=0.1, options=options
    )
    assert out.loss.isfinite()
    gradient = grad(out.loss + out.perplexity, x)
    assert torch.equal(gradient[[0, 2]], torch.zeros(2, 7))
    assert gradient[[1, 3]].abs().min() > 0
    for name, value in (("nll", 0), ("lse", 0), ("entropy", 0), ("predicted", -1)):
        assert getattr(out, name)[[0, 2]].eq(value).all(), name


def test_09_weights_that_are_all_zero_count_no_token(options):
    x, target = make_logits((4, 7)).requires_grad_(), make_target((4,), 7)
    for keywords in ({"token_weight": torch.zeros(4)}, {"weight": torch.zeros(7)}):
        out = cross_entropy_with_stats(x, target, options=options, **keywords)
        assert out.loss.isnan()
        assert out.perplexity.isnan()
        assert torch.equal(grad(out.loss + out.perplexity, x), torch.zeros_like(x))


def test_09_no_counted_weight_is_nan_with_label_smoothing_as_in_torch(options):
    # the smoothed part of S is not zero: S / M would be inf
    weight, x, target = torch.tensor([0.0, 1.0, 1.0]), torch.randn(2, 3, requires_grad=True), torch.zeros(2).long()
    expected = F.cross_entropy(x, target, weight, label_smoothing=0.1)
    assert expected.isnan()
    out = cross_entropy_with_stats(x, target, weight, label_smoothing=0.1, z_loss=0.1, options=options)
    assert out.loss.isnan()
    assert out.perplexity.isnan()
    assert torch.equal(grad(out.loss + out.perplexity, x), torch.zeros_like(x))


def test_09_num_items_with_an_empty_micro_batch_adds_zero(options):
    x = torch.randn(2, 3, requires_grad=True)
    loss = cross_entropy(x, torch.tensor([-100, -100]), num_items=7, options=options)
    assert loss == 0
    assert torch.equal(grad(loss, x), torch.zeros(2, 3))


@pytest.mark.parametrize("kind", ["flat", "peaked"])
@pytest.mark.parametrize("num_classes", [1, 2, 3, 127, 129, 1000, 32001, 50257, 129920, 151936])
def test_10_no_phantom_class_behind_the_last(num_classes, kind, judge, fits):
    fits(3, num_classes)
    # far below zero, so that a padding with 0 would take all the mass
    x = make_logits((3, num_classes), kind=kind) - 50
    judge(cross_entropy, x, make_target((3,), num_classes))


def test_11_offsets_beyond_two_to_the_31(options, fits):
    fits(2**31)
    num_classes, gap = 1000, 2**31
    memory = torch.empty(gap + num_classes, dtype=torch.float16)  # pages that nobody touches cost nothing
    x = memory.as_strided((2, num_classes), (gap, 1))
    x.copy_(make_logits((2, num_classes), torch.float16))
    x.requires_grad_()
    target = torch.tensor([999, 0])
    loss = perplexity(x, target, options=options)
    near = x.detach().clone().requires_grad_()
    expected = perplexity(near, target, options=options)
    assert torch.equal(loss, expected)
    gradient = grad(loss, x)
    assert torch.equal(gradient, grad(expected, near))
    assert gradient.is_contiguous()  # not one more gap of 4 GB


def test_11_more_than_two_to_the_31_logits(backend, fits):
    fits(2**31 + 1)
    num_classes, n = 65536, 2**15 + 2
    row = make_logits((num_classes,))
    target = torch.full((n,), -100)
    target[-1] = 5  # all other chunks are skipped
    out = cross_entropy_with_stats(row.expand(n, num_classes), target, options=Options(backend))
    assert_close(out.nll[-1], F.cross_entropy(row, torch.tensor(5)))
    assert out.nll[:-1].eq(0).all()
    assert out.total_weight == 1


@pytest.mark.parametrize("shape", [(2**20, 4096), (65536, 2**16 + 1), (1, 2**31 + 1)], ids=str)
def test_11_shapes_are_computed_beyond_two_to_the_31(shape):
    x, target = (
        torch.empty(shape, device="meta", requires_grad=True),
        torch.zeros(shape[0], dtype=torch.long, device="meta"),
    )
    (gradient,) = torch.autograd.grad(perplexity(x, target, options=Options("torch")), x)
    assert gradient.shape == x.shape
    assert gradient.stride() == x.stride()


def test_12_a_row_stride_that_is_not_the_number_of_classes(judge):
    x = make_logits((6, 40))[:, :37]
    assert x.stride() == (40, 1)
    judge(perplexity, x, make_target((6,), 37))


def test_12_gradient_has_the_strides_of_the_logits(options):
    for x in (make_logits((6, 40))[:, :37], make_logits((37, 6)).T):
        x.requires_grad_()
        assert grad(perplexity(x, make_target((6,), 37), options=options), x).stride() == x.stride()


def test_12_gradient_does_not_keep_the_gaps_of_a_small_part(options):
    x = make_logits((6, 4, 37))[:, -1].requires_grad_()
    assert grad(perplexity(x, make_target((6,), 37), options=options), x).is_contiguous()


@pytest.mark.cpu("a GPU makes NaN of a target out of range")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("bad", [7, -1, -101, 2**31 - 1, -(2**31)])
def test_13_a_target_out_of_range_raises_and_reads_nothing(bad, dtype, options):
    target = torch.tensor([0, bad, -100], dtype=dtype)
    for loss in LOSSES:
        with pytest.raises(IndexError, match=rf"\[0, 7\).*got {bad} at flat position 1"):
            loss(torch.randn(3, 7), target, options=options)


@pytest.mark.cpu("a GPU makes NaN of a target out of range")
@pytest.mark.parametrize("bad", [-1, 7])
@pytest.mark.parametrize("ignore_index", [-100, 3, None])
def test_13_one_beyond_the_range_raises_where_nothing_is_ignored(ignore_index, bad, options):
    with pytest.raises(IndexError, match=f"got {bad} at flat position 1"):
        cross_entropy(torch.randn(2, 7), torch.tensor([0, bad]), ignore_index=ignore_index, options=options)


@pytest.mark.cpu("a GPU makes NaN of a target out of range")
def test_13_an_index_that_int32_would_wrap_raises(options):
    with pytest.raises(IndexError, match=f"got {2**32}"):
        cross_entropy(torch.randn(2, 7), torch.tensor([0, 2**32]), options=options)


def test_13_on_a_gpu_a_target_out_of_range_gives_nan(monkeypatch):
    """The code that a GPU takes, on a CPU: it is chosen by the device's type alone."""
    from fused_ppl.backends import torch_chunks, torch_stats
    from fused_ppl.records import TokenInputs

    x, tokens = make_logits((1, 3, 7)), TokenInputs(torch.tensor([0, 7, -100]), None, None)
    chunks = torch_chunks.Chunks(x, tokens, fused_ppl.spec.LossSpec(), memory_budget=None)
    monkeypatch.setattr(chunks, "on_cpu", False)
    (rows,) = chunks
    assert rows.target.flatten().tolist() == [0, 6, 0]  # inside the range: nothing else is read
    stats = torch_stats._mark_out_of_range(torch_stats.chunk_stats(chunks, rows), chunks)
    assert stats.loss.isnan().tolist() == [False, True, False]
    assert stats.lse.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("value", [0.3, 2])
def test_14_python_numbers_do_not_widen_the_result(value, options):
    x, target = make_logits((4, 7), torch.bfloat16).requires_grad_(), make_target((4,), 7)
    loss = cross_entropy(x, target, logit_scale=value, softcap=value, z_loss=value, num_items=value, options=options)
    assert loss.dtype == torch.float32
    assert grad(loss, x).dtype == torch.bfloat16


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 36, 5, None, 2**40])
def test_22_ignore_index_is_used_as_given(ignore_index, judge, options):
    target = make_target((6,), 37)  # holds 0 and 36
    target[2] = 5
    if ignore_index is not None and ignore_index < 0:
        target[3] = ignore_index
    x = make_logits((6, 37))
    judge(perplexity, x, target, ignore_index=ignore_index)
    counted = torch.ones(6, dtype=torch.bool) if ignore_index is None else target != ignore_index
    out = cross_entropy_with_stats(x, target, ignore_index=ignore_index, options=options)
    assert out.total_weight == counted.sum()
    assert_close(out.loss, F.cross_entropy(x[counted], target[counted]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_23_the_gradient_has_the_dtype_of_the_logits(dtype, options, fits):
    fits(dtype=dtype)
    x = make_logits((4, 7), dtype).requires_grad_()
    out = cross_entropy_with_stats(x, make_target((4,), 7), options=options)
    assert grad(out.loss, x).dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in (out.loss, out.perplexity, out.nll, out.lse, out.entropy)} == {wide}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keywords", [{}, {"softcap": 3.0}, {"z_loss": 0.1}, {"weight": torch.ones(6)}], ids=str)
def test_24_masked_classes_take_no_part(keywords, dtype, options):
    """-inf before softcap is a class at -softcap; without it the class does not exist."""
    x = make_logits((4, 6), dtype)
    x[:, [1, 4]] = -math.inf
    x.requires_grad_()
    target = torch.tensor([0, 2, 3, 5])
    loss = cross_entropy(x, target, options=options, **keywords)
    z = x.detach().double().requires_grad_()
    capped = 3.0 * torch.tanh(z / 3.0) if "softcap" in keywords else z
    expected = F.cross_entropy(capped, target)
    if "z_loss" in keywords:
        expected = expected + 0.1 * capped.logsumexp(1).square().mean()
    assert_close(loss, expected.float())
    gradient = grad(loss, x)
    assert torch.equal(gradient[:, [1, 4]], torch.zeros(4, 2, dtype=dtype))
    assert_close(gradient.double(), grad(expected, z), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_24_label_smoothing_over_a_masked_class_is_infinite_as_in_torch(options):
    x = torch.tensor([[1.0, -math.inf, 0.0]], requires_grad=True)
    loss = cross_entropy(x, torch.tensor([0]), label_smoothing=0.1, options=options)
    expected = F.cross_entropy(x, torch.tensor([0]), label_smoothing=0.1)
    assert loss == expected == math.inf
    assert_close(grad(loss, x), grad(expected, x), equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_24_a_row_that_is_not_finite_spoils_no_other(bad, options):
    x = make_logits((3, 6))
    x[1, 2] = bad
    x.requires_grad_()
    loss = cross_entropy(x, torch.tensor([0, 1, 5]), reduction="none", options=options)
    assert loss.isfinite().tolist() == [True, False, True]
    gradient = grad(loss, x, torch.ones(3))
    assert gradient.isfinite().all(1).tolist() == [True, False, True]


def test_24_all_masked_is_nan_as_in_torch(options):
    x = torch.full((1, 4), -math.inf)
    assert F.cross_entropy(x, torch.tensor([0])).isnan()
    assert cross_entropy(x, torch.tensor([0]), options=options).isnan()


def test_25_statistics_are_marked_as_constants(options):
    x = make_logits((4, 7)).requires_grad_()
    out = cross_entropy_with_stats(x, make_target((4,), 7), options=options)
    assert [t.requires_grad for t in out[:7]] == [True, True, False, False, False, False, False]
    # a constant beside the loss changes no gradient
    assert torch.equal(grad(out.loss + out.entropy.sum() + out.lse.sum(), x), grad(out.loss, x))
