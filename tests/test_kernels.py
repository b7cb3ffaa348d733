# SPDX-License-Identifier: Apache-2.0
"""The kernels by themselves, interpreted or on a GPU: values and gradients against plain float64 PyTorch."""

from __future__ import annotations

import dataclasses
import math

import options as option_table
import pytest
import torch
from torch.testing import assert_close

from fused_ppl import cross_entropy_with_stats
from fused_ppl.records import TokenInputs
from fused_ppl.spec import LossSpec
from fused_ppl.testing import make_logits, make_target

tl = pytest.importorskip("triton.language")

import kernel_cases  # noqa: E402
import triton  # noqa: E402
from kernel_cases import (  # noqa: E402
    DTYPES,
    IGNORED,
    NAN,
    Case,
    backward,
    check,
    config_of,
    count_bytes,
    embed,
    forward,
    make,
    uneven,
)

from fused_ppl.backends import triton_rows  # noqa: E402
from fused_ppl.kernels import launch, row_tiles  # noqa: E402
from fused_ppl.kernels.launch import Device, Rows, Workspace, choose_config  # noqa: E402
from fused_ppl.kernels.nll_forward import launch_nll_forward  # noqa: E402

pytestmark = pytest.mark.usefixtures("integer_overflow_is_an_error")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 2, 3, 127, 129, 1000])
def test_any_vocabulary(v, dtype):
    check(make(4, v, dtype, offset=v % 7, pad=v % 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_alignment(dtype):
    """An odd row stride brings every misalignment in turn; 61 classes are 7 vectors, edges, or both."""
    check(make(9, 61, dtype, offset=3, pad=2))


@pytest.mark.parametrize("offset", range(8))
def test_a_base_off_by_elements(offset):
    check(make(2, 300, torch.bfloat16, offset=offset, ignored=0), stats=offset % 2 == 0)


# the configurations of a GPU: 4 warps of 4 vectors, 8 warps
LARGE = [(4099, torch.bfloat16, 1), (50257, torch.bfloat16, 1), (151643, torch.bfloat16, 3)]
LARGE += [
    pytest.param(v, dtype, slices, marks=pytest.mark.slow)
    for v in (4099, 50257, 151643)
    for dtype in (torch.float16, torch.float32)
    for slices in (1, 4)
]


@pytest.mark.parametrize(("v", "dtype", "slices"), LARGE)
def test_large_vocabularies_with_the_configuration_of_a_gpu(v, dtype, slices):
    case = make(2, v, dtype, offset=1, pad=2, ignored=0)
    config = choose_config(10**6, v, dtype.itemsize, Device(132))
    per_slice = math.ceil(config.tiles_per_slice / slices)
    check(
        case,
        dataclasses.replace(config, tiles_per_slice=per_slice, slices=math.ceil(config.tiles_per_slice / per_slice)),
    )


def test_a_slice_that_begins_behind_the_end_of_an_unaligned_row():
    """259 bf16 classes are a whole tile where the row is aligned, and 248 of them stand in vectors where it is not."""
    case = make(2, 259, torch.bfloat16, offset=1, pad=5, ignored=0)
    config = config_of(case, 2)
    assert config.slices == 2
    check(case, config)
    rows, _ = forward(case, config)
    want = backward(case, rows, torch.ones(2), torch.ones(2), config, torch.empty_like(case.logits).contiguous())
    assert torch.equal(backward(case, rows, torch.ones(2), torch.ones(2), config, case.logits), want)


V = 533
ALL = kernel_cases.options_of(option_table.together(cross_entropy_with_stats), 4, V)
OPTIONS = {
    "none": {},
    "sum": {"spec": LossSpec(reduction="sum")},
    **{name: kernel_cases.options_of([name], 4, V) for name in option_table.alone(cross_entropy_with_stats)},
    "weight and label_smoothing": kernel_cases.options_of(["weight", "label_smoothing"], 4, V),
    "all": ALL,
}


@pytest.mark.parametrize(("stats", "slices"), [(False, 1), (True, 2)], ids=["", "stats of slices"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_alone_and_all_together(name, stats, slices):
    case = make(4, V, torch.float32 if slices == 1 else torch.bfloat16, offset=1, pad=1, **OPTIONS[name])
    check(case, config_of(case, slices), stats)


@pytest.mark.parametrize(
    ("stats", "slices"), [(False, 1), (False, 3), (True, 3)], ids=["", "slices", "stats of slices"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wild_logits(dtype, stats, slices):
    """-inf, rows at +-1e4, and targets far below the maximum, where the sum overflows and is redone."""
    case = make(4, 700, dtype, kind="wild", ignored=0, offset=1)
    x = case.logits[0]
    case.target.copy_(torch.tensor([0, 2, 699, 3]))
    x[2, 600], x[3, 3] = x[2, 699] + 300, x[3].max() - 90
    check(case, config_of(case, slices), stats)


@pytest.mark.parametrize("distance", [5, 15, 21, 45, 80, 200])
def test_no_depth_of_the_target_costs_the_other_gradients(distance):
    """fp32 t is rounded in proportion to its size, and the largest p must not be: 45 nats are 65 in base 2."""
    case = make(8, 40, torch.float32, ignored=0)
    case.target.fill_(9)
    case.logits[0, :, 7] = 25.0 + torch.rand(8)
    case.logits[0, :, 9] = case.logits[0, :, 7] - distance
    check(case)


@pytest.mark.parametrize("rest", [1e-1, 1e-3, 1e-6, 1e-12, 1e-25, 1e-36])
@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
def test_a_confident_row_keeps_its_digits(rest, stats):
    """Eager loses 1 - p below 6e-8; here it is accurate relative to itself, and so is the target's gradient.

    At 1e-36 each p of the others is below 2**-126, which a GPU takes as 0; their sum is not.
    """
    case = make(1, 400, torch.float32, kind="flat", ignored=0)
    case.target[0] = 17
    case.logits[0, 0, 17] = depth = math.log(399 / rest)
    error = 1.4e-8 * depth  # log2(e) is 1.3e-8 off in fp32
    rows, _ = forward(case, config_of(case), stats)
    e = (case.logits[0, 0].double() - case.logits[0, 0, 17].double()).exp()
    e[17] = 0
    assert_close(rows.nll[0].double(), e.sum().log1p(), rtol=1e-6 + error, atol=0)
    out = backward(case, rows, torch.ones(1), torch.zeros(1), config_of(case), torch.full_like(case.logits, NAN))
    gradient = e / (1 + e.sum())
    gradient[17] = -gradient.sum()
    assert_close(out[0, 0, 17].double(), gradient[17], rtol=2e-6 + error, atol=0)
    # p of the others is 2**t, and fp32 rounds t in proportion to its size
    assert_close(out[0, 0].double(), gradient, rtol=2e-6 + error + 6e-8 * depth, atol=2**-126)


@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
@pytest.mark.parametrize("slices", [1, 2])
def test_what_is_not_finite_stays_in_its_row(stats, slices):
    """NaN or +inf in a row makes NaN of it, as in PyTorch; a target of -inf costs infinitely much; all -inf is NaN."""
    case = make(6, 600, torch.float32, ignored=0)
    x, y = case.logits[0], case.target
    x[0, 5], x[1, 6], x[2, int(y[2])], x[3, int(y[3])] = NAN, math.inf, math.inf, -math.inf
    x[4] = -math.inf
    rows, _ = forward(case, config_of(case, slices), stats)
    truth = torch.nn.functional.cross_entropy(x.double(), y, reduction="none")
    assert truth[:3].isnan().all() and truth[3].isposinf() and truth[4].isnan() and truth[5].isfinite()
    assert_close(rows.nll.double(), truth, rtol=1e-6, atol=0, equal_nan=True)
    assert_close(rows.lse[3:], x.double().logsumexp(1)[3:], rtol=1e-6, atol=0)
    if stats:
        assert rows.predicted is not None and torch.equal(rows.predicted[1:], x.argmax(1)[1:])


@pytest.mark.parametrize("slices", [1, 2])
def test_ignored_rows_are_zero_whatever_they_hold(slices):
    case = make(4, 600, torch.bfloat16, ignored=0)
    case.logits[0, 1], case.logits[0, 2] = NAN, math.inf
    case.target[1:3] = IGNORED
    check(case._replace(logits=case.logits), config_of(case, slices), stats=True)


def test_nothing_is_ignored_without_an_index():
    case = make(3, 40, torch.float32, ignored=0, spec=LossSpec(ignore_index=None))
    check(case)
    check(case._replace(spec=LossSpec(ignore_index=int(case.target[0]))))


@pytest.mark.parametrize("target", [-1, 40, 2**31 + 3])
def test_a_target_out_of_range_makes_a_row_of_nan(target):
    case = make(3, 40, torch.float32, ignored=0, weight=torch.ones(40))
    case.target[1] = target
    rows, totals = forward(case, config_of(case))
    assert torch.stack([rows.loss, rows.nll, rows.lse.float()]).isnan().any(0).tolist() == [False, True, False]
    assert totals.loss.isnan()
    out = backward(case, rows, torch.ones(3), torch.ones(3), config_of(case), torch.zeros_like(case.logits))
    assert out[0].isnan().all(1).tolist() == [False, True, False]


def test_the_lowest_column_is_predicted_on_ties():
    """Ties across edges, threads, tiles and slices, with the target first, in between and last."""
    x = torch.zeros(2, 600)
    x[:, [3, 40, 41, 300, 598]] = 5.0
    logits, _ = embed(x.bfloat16(), 5, 3)
    for target in ([3, 300], [598, 2]):
        case = Case(logits, torch.tensor(target))
        for slices in (1, 2):
            rows, _ = forward(case, config_of(case, slices), stats=True)
            assert rows.predicted is not None and rows.predicted.tolist() == [3] * 2
    for column in (0, 1, 2, 299, 599):
        logits[0, :, column] = 6.0
        rows, _ = forward(case, config_of(case), stats=True)
        assert rows.predicted is not None and rows.predicted.tolist() == [column] * 2
        logits[0, :, column] = 0.0


def test_int32_targets():
    case = make(4, 50, torch.float32)
    check(case._replace(target=case.target.int()))


def test_classes_of_any_stride():
    """(N, C, H * W) with the classes in the middle, as images have them; and rows that overlap."""
    x = make_logits((2, 37, 5))
    case = Case(x.transpose(1, 2), make_target((10,), 37, ignored=0.2))
    rows, _ = forward(case, config_of(case))
    flat = case._replace(logits=case.logits.reshape(1, 10, 37))
    same, _ = forward(flat, config_of(flat))
    for a, b in zip(rows[:4], same[:4], strict=True):
        assert_close(a, b)
    dloss = torch.ones(10)
    want = backward(flat, rows, dloss, dloss, config_of(case), torch.full_like(flat.logits, NAN)).view(2, 5, 37)
    assert_close(backward(case, rows, dloss, dloss, config_of(case), torch.full_like(case.logits, NAN)), want)
    assert_close(backward(case, rows, dloss, dloss, config_of(case), torch.full((2, 5, 37), NAN)), want)


def test_a_gradient_of_other_alignment_than_the_logits():
    case = make(3, 301, torch.bfloat16, offset=3, pad=1)
    rows, _ = forward(case, config_of(case))
    dloss = torch.ones(3)
    want = backward(case, rows, dloss, dloss, config_of(case), embed(case.logits[0], 3, 1)[0])
    for offset, pad in ((4, 1), (3, 2)):
        out, _ = embed(torch.full((3, 301), NAN, dtype=torch.bfloat16), offset, pad)
        assert not launch.same_alignment(case.logits, out)
        assert torch.equal(backward(case, rows, dloss, dloss, config_of(case), out), want)


@pytest.mark.parametrize("slices", [1, 3])
def test_in_place_gives_the_same_bits(slices):
    case = make(3, 700, torch.bfloat16, offset=3, pad=1, **{**ALL, "weight": torch.ones(700), "token_weight": None})
    config = config_of(case, slices)
    rows, _ = forward(case, config)
    dloss = uneven(3, 1, 2)
    want = backward(case, rows, dloss, dloss, config, embed(torch.zeros(3, 700).bfloat16(), 3, 1)[0])
    assert torch.equal(backward(case, rows, dloss, dloss, config, case.logits), want)


def test_one_upstream_for_all_rows_has_stride_zero():
    case = make(3, 50, torch.float32)
    rows, _ = forward(case, config_of(case))
    one = torch.tensor(1.7).expand(3)
    wants = [
        backward(case, rows, dloss, dloss, config_of(case), torch.empty_like(case.logits))
        for dloss in (one, one.contiguous())
    ]
    assert torch.equal(*wants)


def test_slices_of_a_row_are_deterministic_and_agree():
    case = make(3, 3000, torch.bfloat16, offset=1)
    whole, _ = forward(case, config_of(case))
    for slices in (2, 5, 12):
        config = config_of(case, slices)
        assert config.slices > 1
        rows, totals = forward(case, config)
        again, totals_again = forward(case, config)
        assert all(
            torch.equal(a, b) for a, b in zip((*rows[:4], *totals[:5]), (*again[:4], *totals_again[:5]), strict=True)
        )
        assert_close(rows.nll, whole.nll)


@pytest.mark.parametrize("n", [1, 130, pytest.param(600, marks=pytest.mark.slow)])
def test_the_last_program_sums_all_rows(n):
    """More rows than one step of its loop takes, ignored ones among them."""
    check(make(n, 3, torch.float32, spec=LossSpec(z_loss=0.1)))


def test_without_counted_tokens_values_are_nan_and_factors_zero():
    case = make(3, 40, torch.float32)
    case.target.fill_(IGNORED)
    result = check(case)
    assert result.totals.loss.isnan() and result.totals.perplexity.isnan()
    assert result.totals.loss_factor == result.totals.perplexity_factor == 0
    check(case._replace(spec=LossSpec(reduction="sum")))
    check(make(3, 40, torch.float32, ignored=0, weight=torch.zeros(40), spec=LossSpec(label_smoothing=0.1)))


@pytest.mark.parametrize("slices", [1, 2])
def test_shards_of_the_vocabulary_hold_what_the_whole_is_made_of(slices):
    """max z, sum e^(z - max), z of the target, sum w z, sum e^(z - max) (z - max) and argmax of unequal shards; the
    totals are without the target."""
    spec = LossSpec(label_smoothing=0.1, logit_scale=0.7, softcap=9.0)
    x, y = make_logits((4, 1500)), torch.tensor([0, 700, IGNORED, 1499])
    w = uneven(1500, 0.5, 2)
    z = (9 * torch.tanh(x.double() * 0.7 / 9))[y != IGNORED]
    for first, last in ((0, 700), (700, 701), (701, 1500)):
        case = Case(embed(x[:, first:last], first % 4, 1)[0], y, spec, w)
        config = config_of(case, slices)
        split = config.slices > 1
        shards = torch.full((4, launch.SHARD_FIELDS), NAN, dtype=torch.float64)
        partials = torch.full((launch.SLICE_FIELDS, 4, config.slices), NAN) if split else None
        launch_nll_forward(
            case.logits, y, triton_rows.weights(TokenInputs(y, w, None), spec), triton_rows.numbers(spec),
            rows=Rows(*(None,) * 6), totals=None, workspace=Workspace(torch.zeros(5, dtype=torch.int32), partials),
            config=config, ignore_index=IGNORED, first_class=first, num_classes=1500, shards=shards,
        )  # fmt: skip
        part, label = z[:, first:last], y[y != IGNORED]
        top = part.amax(1)
        owned = (label >= first) & (label < last)
        others = torch.arange(first, last) != label[:, None]
        e = (part - top[:, None]).exp() * others
        target = torch.where(owned, z.gather(1, label[:, None])[:, 0], 0)
        want = [
            top,
            e.sum(1),
            target,
            (w[first:last] * part * others).sum(1),
            (e * (part - top[:, None])).sum(1),
            part.argmax(1),
        ]
        assert_close(shards[y != IGNORED], torch.stack([t.double() for t in want], 1), rtol=3e-6, atol=1e-5)
        assert not shards[2].any()


def test_the_gradient_of_slices_of_the_vocabulary_is_that_of_the_whole():
    case = make(4, 900, torch.float32, **{**ALL, "weight": uneven(900, 0.5, 2)})
    rows, _ = forward(case, config_of(case))
    dloss = uneven(4, 1, 2)
    want = backward(case, rows, dloss, dloss, config_of(case), torch.empty_like(case.logits))
    for first, last in ((0, 300), (300, 301), (301, 900)):
        piece = case._replace(logits=case.logits[:, :, first:last].contiguous())
        out = torch.full_like(piece.logits, NAN)
        backward(piece, rows, dloss, dloss, config_of(piece), out, first_class=first, num_classes=900)
        assert_close(out, want[:, :, first:last], rtol=1e-6, atol=0)


@pytest.mark.parametrize("slices", [1, 3])
def test_three_passes_over_the_logits(slices, monkeypatch):
    """Perplexity forward and backward reads every logit twice and writes every gradient once."""
    n, v = 3, 1200
    case = make(n, v, torch.bfloat16, offset=3, pad=1, ignored=0)
    out, _ = embed(torch.zeros(n, v, dtype=torch.bfloat16), 3, 1)
    counts = count_bytes(monkeypatch, case.logits, out)
    config = config_of(case, slices)
    assert config.slices == slices
    rows, totals = forward(case, config)
    logits, again = n * v * 2, n * slices * 2  # the target's logit may be read twice, and every slice reads it
    assert logits <= counts["load"] <= logits + again and counts["store"] == 0
    backward(case, rows, totals.perplexity_factor.float().expand(n), torch.zeros(1).expand(n), config, out)
    assert 2 * logits <= counts["load"] <= 2 * logits + again and counts["store"] == logits


# nats from all others together to the target, and whether their sum overflows or loses digits without a running maximum
READ_TWICE = [(torch.float32, -40, True), (torch.float32, -17, False), (torch.bfloat16, -95, True)]
READ_TWICE += [(torch.bfloat16, -80, False), (torch.float16, -80, False)]
READ_TWICE += [(dtype, depth, depth > 60) for dtype in DTYPES for depth in (0, 55, 70)]


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize(("dtype", "depth", "again"), READ_TWICE)
def test_a_row_is_read_twice_only_where_it_must_be(dtype, depth, again, slices, monkeypatch):
    n, v = 2, 1700
    case = make(n, v, dtype, kind="flat", offset=3, pad=1, ignored=0)
    case.logits[0] = 0
    case.target.fill_(900)
    case.logits[0, :, 900] = depth + math.log(v)
    counts = count_bytes(monkeypatch, case.logits)
    forward(case, config_of(case, slices))
    once, target = n * v * dtype.itemsize, n * slices * dtype.itemsize
    passes = 2 if again else 1
    assert passes * once - target <= counts["load"] <= passes * once + target


def test_offsets_beyond_int32():
    @triton.jit
    def offset_kernel(out_ptr, ptr, row, R, stride_b, stride_r):
        row_ptr = row_tiles.row_pointer(ptr, tl.program_id(0) + row, R, stride_b, stride_r)
        tl.store(out_ptr, row_ptr.to(tl.int64) - ptr.to(tl.int64))

    out, ptr = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bfloat16)
    offset_kernel[(1,)](out, ptr, 40_007, 10_000, 10_000 * 151_643, 151_643)
    assert out.item() == 2 * 40_007 * 151_643


def test_no_rows_launch_nothing():
    tokens = TokenInputs(torch.zeros(0, dtype=torch.int64), None, None)
    rows, totals = triton_rows.nll_forward(torch.zeros(1, 0, 7), tokens, LossSpec(), num_items=None, memory_budget=None)
    assert totals is None and all(t.numel() == 0 for t in rows if t is not None)
