# SPDX-License-Identifier: Apache-2.0
"""The kernel of the fused LM head by itself, interpreted or on a GPU, against plain float64 PyTorch.

The target's column of the logits is NaN in all of these tests, because the kernel gets the fp32 logit as an argument.
"""

from __future__ import annotations

import math

import kernel_cases
import options as option_table
import pytest
import torch
from kernel_cases import DTYPES, IGNORED, NAN, Case, bytes_of, config_of, count_bytes, embed, judge, unwritten_rows
from torch import Tensor
from torch.testing import assert_close

from fused_ppl import linear_cross_entropy
from fused_ppl.backends import torch_rows, triton_rows
from fused_ppl.kernels import launch, nll_forward_backward
from fused_ppl.kernels.launch import LaunchConfig, Rows
from fused_ppl.kernels.nll_forward_backward import launch_nll_forward_backward
from fused_ppl.records import TokenInputs
from fused_ppl.spec import LossSpec
from fused_ppl.testing import make_logits

pytestmark = pytest.mark.usefixtures("integer_overflow_is_an_error")


def take_targets(case: Case) -> Tensor:
    """Replaces the logits of the targets by NaN and returns them in fp32, changed so that bf16 cannot hold them."""
    rows = (case.target != IGNORED).nonzero().squeeze(1)
    columns = case.target[rows].long()
    target_logit = torch.zeros(len(case.target))
    target_logit[rows] = case.logits[0, rows, columns].float() * 1.0013
    case.logits[0, rows, columns] = NAN
    return target_logit


def make(*args, **keywords) -> tuple[Case, Tensor]:
    case = kernel_cases.make(*args, **keywords)
    return case, take_targets(case)


def whole(case: Case, target_logit: Tensor) -> Case:
    """The case with the targets' logits in their places, for the comparison."""
    logits = case.logits.float().clone()
    rows = (case.target != IGNORED).nonzero().squeeze(1)
    logits[0, rows, case.target[rows].long()] = target_logit[rows]
    return case._replace(logits=logits)


def run(
    case: Case,
    target_logit: Tensor,
    config: LaunchConfig | None = None,
    stats: bool = False,
    upstream: float | None = -1.7,
) -> Rows:
    """Runs the kernel, which leaves the gradient in the logits."""
    rows = unwritten_rows(len(case.target), stats)
    launch_nll_forward_backward(
        case.logits[0],
        case.target,
        triton_rows.weights(TokenInputs(case.target, case.weight, case.token_weight), case.spec),
        triton_rows.numbers(case.spec),
        target_logit=target_logit,
        rows=rows,
        upstream=upstream,
        config=config or config_of(case),
        ignore_index=case.spec.ignore_index,
    )
    return rows


def check(case: Case, target_logit: Tensor, config: LaunchConfig | None = None, stats: bool = False) -> Rows:
    dloss = torch.full((len(case.target),), -1.7)
    truth = whole(case, target_logit)
    rows = run(case, target_logit, config, stats, -1.7)
    judge(truth, rows, case.logits[0], dloss, dloss)
    return rows


def config_of_a_gpu(case: Case) -> LaunchConfig:
    return launch.choose_two_pass_config(case.logits.shape[2], case.logits.itemsize, launch.Device(132))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 2, 3, 127, 129, 1000])
def test_any_vocabulary(v, dtype):
    check(*make(4, v, dtype, offset=v % 7, pad=v % 4), stats=v % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_alignment(dtype):
    """An odd row stride brings every misalignment in turn; 61 classes are 7 vectors, edges, or both."""
    check(*make(9, 61, dtype, offset=3, pad=2))


@pytest.mark.parametrize("offset", range(1, 8))
def test_a_base_off_by_elements(offset):
    check(*make(2, 300, torch.bfloat16, offset=offset, ignored=0), stats=offset % 2 == 0)


LARGE = [(4099, torch.bfloat16), (50257, torch.bfloat16), (4099, torch.float32)]
LARGE += [pytest.param(v, dtype, marks=pytest.mark.slow) for v in (50257, 151643) for dtype in DTYPES[1:]]


@pytest.mark.parametrize(("v", "dtype"), LARGE)
def test_large_vocabularies_with_the_configuration_of_a_gpu(v, dtype):
    case, target_logit = make(2, v, dtype, offset=1, pad=2, ignored=0)
    check(case, target_logit, config_of_a_gpu(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("v", "offset", "pad"), [(1, 3, 1), (61, 3, 2), (4099, 5, 3)])
def test_nothing_outside_of_the_rows_is_written(v, offset, pad, dtype):
    case = kernel_cases.make(9 if v < 100 else 2, v, dtype, offset=offset, pad=pad)
    x = case.logits[0].clone()
    memory = torch.empty(0, dtype=dtype).set_(case.logits.untyped_storage())
    memory.fill_(7.0)
    before = bytes_of(case.logits)
    case.logits[0] = x
    run(case, take_targets(case), config_of_a_gpu(case))
    assert not case.logits.eq(7.0).any()
    case.logits.fill_(7.0)
    assert torch.equal(bytes_of(case.logits), before)


V = 533
OPTIONS = {
    "none": {},
    **{
        name: kernel_cases.options_of([name], 4, V)
        for name in option_table.alone(linear_cross_entropy)
        if not name.startswith("num_items")  # which enters after the kernel
    },
    "weight and label_smoothing": kernel_cases.options_of(["weight", "label_smoothing"], 4, V),
    "all": kernel_cases.options_of(option_table.together(linear_cross_entropy), 4, V),
}


@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_alone_and_all_together(name, stats):
    check(*make(4, V, torch.bfloat16 if stats else torch.float32, offset=1, pad=1, **OPTIONS[name]), stats=stats)


@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_gives_the_bits_of_the_two_kernels_from_logits(name, stats):
    """Where the target's logit is what the logits hold; and without an upstream only the statistics, and no writing."""
    case = kernel_cases.make(4, V, torch.bfloat16, offset=3, pad=2, **OPTIONS[name])
    config = config_of(case)
    want, _ = kernel_cases.forward(case, config, stats)
    dloss, (out, _) = torch.full((4,), -1.7), embed(torch.zeros(4, V).bfloat16(), 3, 2)
    gradient = kernel_cases.backward(case, want, dloss, dloss, config, out)
    target_logit = case.logits[0].gather(1, case.target.clamp(0)[:, None])[:, 0].float()
    before = bytes_of(case.logits)
    for upstream in (None, -1.7):
        rows = run(case, target_logit, config, stats, upstream)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(rows, want, strict=True))
        assert torch.equal(bytes_of(case.logits), before) == (upstream is None)
    assert torch.equal(case.logits, gradient)


@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wild_logits(dtype, stats):
    """-inf, rows at +-1e4, and targets 300 below and above all others: the sum overflows and is redone, or is 0."""
    case = kernel_cases.make(5, 700, dtype, kind="wild", ignored=0, offset=1)
    case.target.copy_(torch.tensor([0, 2, 699, 3, 4]))
    target_logit = take_targets(case)
    for row, of_others, of_target in ((2, 50, -300), (3, 50, 350), (4, -50, 350)):
        case.logits[0, row].clamp_(-of_others if of_others > 0 else of_others, of_others)
        target_logit[row] = of_target
    check(case, target_logit, stats=stats)


@pytest.mark.parametrize("distance", [5, 15, 21, 45, 80, 200])
def test_no_depth_of_the_target_costs_the_other_gradients(distance):
    """fp32 t is rounded in proportion to its size, and the largest p must not be: 45 nats are 65 in base 2."""
    case = kernel_cases.make(8, 40, torch.float32, ignored=0)
    case.target.fill_(9)
    case.logits[0, :, 7] = 25.0 + torch.rand(8)
    case.logits[0, :, 9] = case.logits[0, :, 7] - distance
    check(case, take_targets(case))


@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
def test_confident_rows_keep_their_digits(stats):
    """The target 20 to 95 above 0, in bf16: nll, 1 - p and all gradients are accurate relative to themselves."""
    case, target_logit = make(8, 400, torch.bfloat16, ignored=0)
    target_logit.copy_(torch.tensor([20, 30, 40, 50, 60, 70, 80, 95]) + 0.01)
    others = case.logits[0].double().clone()
    others.scatter_(1, case.target[:, None], -math.inf)
    rest = (others - target_logit[:, None].double()).exp()
    rows = run(case, target_logit, stats=stats, upstream=1.0)
    assert rows.nll.min() > 0
    assert_close(rows.nll.double(), rest.sum(1).log1p(), rtol=2e-5, atol=0)
    gradient = rest / (1 + rest.sum(1, keepdim=True))
    gradient.scatter_(1, case.target[:, None], -gradient.sum(1, keepdim=True))
    # the interpreter truncates to bf16; below 1e-38 are no normal numbers
    assert_close(case.logits[0].double(), gradient, rtol=2**-7, atol=1e-38)


@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
def test_what_is_not_finite_stays_in_its_row(stats):
    """As in PyTorch; where no other class has any mass the target has all of it; all -inf is NaN."""
    case, target_logit = make(7, 600, torch.float32, ignored=0)
    x = case.logits[0]
    x[0, 5], x[1, 6] = NAN, math.inf
    target_logit[2], target_logit[3] = math.inf, -math.inf
    x[4], x[5] = -math.inf, -math.inf
    target_logit[5] = -math.inf
    truth = whole(case, target_logit).logits[0].double().requires_grad_()
    nll = torch.nn.functional.cross_entropy(truth, case.target, reduction="none")
    (gradient,) = torch.autograd.grad(nll.sum(), truth)
    rows = run(case, target_logit, stats=stats, upstream=1.0)
    assert nll[[0, 1, 2, 5]].isnan().all() and nll[3].isposinf() and nll[4] == 0 and nll[6].isfinite()
    assert_close(rows.nll.double(), nll.detach(), rtol=1e-6, atol=0, equal_nan=True)
    assert_close(rows.lse[[3, 4, 6]], truth.detach().logsumexp(1)[[3, 4, 6]], rtol=1e-6, atol=0)
    assert_close(x[[3, 4, 6]].double(), gradient[[3, 4, 6]], rtol=1e-5, atol=1e-9)
    assert x[[0, 2, 5]].isnan().all(1).all()
    if stats:
        assert torch.equal(rows.predicted[1:], truth.argmax(1)[1:])


def test_ignored_rows_are_zero_whatever_they_hold():
    case, target_logit = make(4, 600, torch.bfloat16, ignored=0)
    case.logits[0, 1], case.logits[0, 2] = NAN, math.inf
    case.target[1:3] = IGNORED
    check(case, target_logit, stats=True)
    assert not case.logits[0, 1:3].any()


def test_nothing_is_ignored_without_an_index():
    case, target_logit = make(3, 40, torch.float32, ignored=0, spec=LossSpec(ignore_index=None))
    copy = case._replace(logits=case.logits.clone(), spec=LossSpec(ignore_index=int(case.target[0])))
    check(case, target_logit)
    rows = run(copy, target_logit)
    assert rows.weight.tolist() == [0, 1, 1]
    assert not copy.logits[0, 0].any()


@pytest.mark.parametrize("target", [-1, 40, 2**31 + 3])
def test_a_target_out_of_range_makes_a_row_of_nan(target):
    case, target_logit = make(3, 40, torch.float32, ignored=0, weight=torch.ones(40))
    case.logits[0, 1] = 1.0
    case.target[1] = target
    rows = run(case, target_logit)
    assert torch.stack([rows.loss, rows.nll, rows.lse.float()]).isnan().any(0).tolist() == [False, True, False]
    assert case.logits[0].isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("stored", [-9.0, 5.0, 9.0])
@pytest.mark.parametrize("target", [3, 40, 299, 598])
def test_the_prediction_takes_the_logit_beside_the_row_and_not_the_one_in_it(target, stored):
    """Below the maximum, equal to it (then the lowest column), above it; at edges and in tiles."""
    for others in (2, 300):
        for target_logit, want in [(4.99, others), (5.0, min(others, target)), (5.01, target)]:
            logits, _ = embed(torch.zeros(1, 600).bfloat16(), 5, 3)
            logits[0, 0, others], logits[0, 0, target] = 5.0, stored
            rows = run(Case(logits, torch.tensor([target])), torch.tensor([target_logit]), stats=True)
            assert rows.predicted.tolist() == [want], (target_logit, others)


def test_the_lowest_column_is_predicted_on_ties():
    x = torch.zeros(1, 600)
    x[:, [3, 40, 41, 300, 598]] = 5.0
    for target in (2, 3, 41, 598):
        logits, _ = embed(x.bfloat16(), 5, 3)
        rows = run(Case(logits, torch.tensor([target])), torch.tensor([5.0]), stats=True)
        assert rows.predicted.tolist() == [min(3, target)]


def test_int32_targets():
    case, target_logit = make(4, 50, torch.float32)
    check(case._replace(target=case.target.int()), target_logit)


def test_two_reads_and_one_write_of_the_logits(monkeypatch):
    n, v = 3, 1200
    for upstream, reads, writes in ((-1.7, 2, 1), (None, 1, 0)):
        case = kernel_cases.make(n, v, torch.bfloat16, offset=3, pad=1, ignored=0)
        case.target.fill_(700)  # in the body: of an edge the target is not even loaded
        target_logit = take_targets(case)
        with monkeypatch.context() as patch:
            counts = count_bytes(patch, case.logits)
            run(case, target_logit, upstream=upstream)
        assert counts == {"load": reads * n * v * 2, "store": writes * n * v * 2}


def test_no_rows_launch_nothing(monkeypatch):
    monkeypatch.setattr(nll_forward_backward, "nll_forward_backward_kernel", None)
    tokens = TokenInputs(torch.zeros(0, dtype=torch.int64), None, None)
    how = {"target_logit": torch.zeros(0), "upstream": 1.0, "memory_budget": None}
    stats = triton_rows.nll_forward_backward(torch.zeros(0, 7), tokens, LossSpec(stats=True), **how)
    assert all(t.numel() == 0 for t in stats if t is not None)


def test_the_torch_backend_gives_the_same():
    """One interface: every statistic and the gradient, with every option."""
    logits, target = make_logits((5, 90)), torch.tensor([0, 89, IGNORED, 4, 5])
    spec = LossSpec(label_smoothing=0.1, softcap=7.0, z_loss=0.01, stats=True)
    tokens = TokenInputs(target, kernel_cases.uneven(90, 1, 2), kernel_cases.uneven(5, 1, 3))
    how = {"target_logit": kernel_cases.uneven(5, -1, 1), "upstream": 0.7, "memory_budget": None}
    results = []
    for module in (torch_rows, triton_rows):
        x = logits.clone()
        results.append((*module.nll_forward_backward(x, tokens, spec, **how), x))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=3e-6, atol=1e-6)
