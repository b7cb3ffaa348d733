# SPDX-License-Identifier: Apache-2.0
"""What a caller may rely on whatever the backend: the contracts of the design, as far as they need no GPU.

The eighth, one graph under torch.compile, is tests/test_compile.py; the ninth, errors, is tests/test_errors.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.testing import assert_close

import fused_ppl
from fused_ppl import Options, cross_entropy, cross_entropy_with_stats, perplexity
from fused_ppl.engines import linear_rows, linear_vocab
from fused_ppl.engines import logits as engine
from fused_ppl.records import Execution, HeadExecution, HeadInputs, LogitsInputs, Normalizers, Shard, Upstream
from fused_ppl.spec import LossSpec
from fused_ppl.testing import assert_as_good_as_eager, make_logits, make_target

REFERENCE = Options(backend="reference")
LOSSES = [cross_entropy, perplexity]
UPSTREAM = {
    "scalar": lambda shape: torch.full(shape, 3.7),
    "zero": torch.zeros,
    "negative": lambda shape: -torch.ones(shape),
    "loss scale": lambda shape: torch.full(shape, 65536.0),
    "each its own": torch.randn,
    "stride 0": lambda shape: torch.tensor(-0.3).expand(shape),
    "non-contiguous": lambda shape: torch.randn(*shape, 3)[..., 1],
    "transposed": lambda shape: torch.randn(shape[::-1]).permute(tuple(range(len(shape)))[::-1]),
}


def gradient(loss: Tensor, x: Tensor, upstream: Tensor | None = None, **keywords) -> Tensor:
    (g,) = torch.autograd.grad(loss, x, upstream, **keywords)
    return g


# 1


@pytest.mark.parametrize("keywords", [{}, {"softcap": 3.0, "label_smoothing": 0.1}, {"logit_scale": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_inputs_are_bit_identical_afterwards(grad, dtype, keywords, options):
    x = make_logits((6, 37), dtype)
    x[1] = torch.nan  # an ignored row may hold anything, and keeps it
    target = make_target((6,), 37).index_fill(0, torch.tensor([1]), -100)
    tensors = {"input": x, "target": target, "weight": torch.rand(37), "token_weight": torch.rand(6)}
    before = {name: (t.clone(), t._version) for name, t in tensors.items()}
    x.requires_grad_(grad)
    out = cross_entropy_with_stats(**tensors, options=options, **keywords)
    if grad:
        (out.loss + out.perplexity).backward()
    for name, (copy, version) in before.items():
        assert_close(tensors[name].detach(), copy, rtol=0, atol=0, equal_nan=True)
        assert tensors[name]._version == version, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "padded", "images"])
def test_inplace_backward_gives_the_same_gradient_in_the_memory_of_the_logits(layout, dtype, backend):
    source = make_logits((2, 7, 3, 4) if layout == "images" else (6, 7), dtype).requires_grad_()
    target = make_target((2, 3, 4), 7, ignored=0.2) if layout == "images" else make_target((6,), 7, ignored=0.2)

    def run(inplace: bool) -> tuple[Tensor, Tensor, int]:
        x = torch.nn.functional.pad(source, (0, 3))[:, :7] if layout == "padded" else source.clone()
        version = x._version
        options = Options(backend=backend, inplace_backward=inplace)
        loss = perplexity(x, target, weight=torch.linspace(1, 2, 7), label_smoothing=0.1, options=options)
        return gradient(loss, source), x.detach(), x._version - version

    expected, _, unchanged = run(False)
    got, logits, bumped = run(True)
    assert_close(got, expected, rtol=0, atol=0)
    assert not got.requires_grad  # the logits do
    assert unchanged == 0
    assert bumped > 0
    assert_close(logits, got, rtol=0, atol=0)


def test_inplace_backward_makes_another_user_of_the_logits_raise(backend):
    source = torch.randn(4, 7, requires_grad=True)
    x = source * 1
    other = x.square().sum()  # has saved the logits, and goes backward after a loss that is made after it
    loss = perplexity(x, make_target((4,), 7), options=Options(backend=backend, inplace_backward=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


# 2


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none", "sequence"])
@pytest.mark.parametrize("name", UPSTREAM)
def test_any_upstream_gradient_is_right(name, reduction, loss, judge):
    shape = {"mean": (), "none": (4, 5), "sequence": (4,)}[reduction]
    target = make_target((4, 5), 37, ignored=0.2)
    judge(loss, make_logits((4, 5, 37)), target, UPSTREAM[name](shape), class_dim=-1, reduction=reduction)


@pytest.mark.parametrize("function", [torch.exp, torch.square, lambda a: a.half().float(), lambda a: a.double().sin()])
def test_whatever_follows_the_loss_is_differentiated(function, options):
    def of(x, how):
        x = x.detach().requires_grad_()
        return gradient(function(cross_entropy(x, target, options=how)).float(), x)

    x, target = make_logits((4, 7), kind="flat"), make_target((4,), 7)
    assert_close(of(x, options), of(x.double(), REFERENCE).float(), rtol=1e-3, atol=1e-6)


# 3


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_over_a_retained_graph_is_the_same(reduction, loss, options):
    x = make_logits((4, 37)).requires_grad_()
    value = loss(x, make_target((4,), 37), reduction=reduction, softcap=5.0, options=options)
    upstream = torch.full_like(value, 3.0)
    first, second = (gradient(value, x, upstream, retain_graph=True) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(gradient(value, x, upstream), first)


def test_second_backward_in_place_raises(backend):
    x = torch.randn(4, 7, requires_grad=True)
    loss = perplexity(x * 1, make_target((4,), 7), options=Options(backend=backend, inplace_backward=True))
    gradient(loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(loss, x)


DOUBLE = {
    "of the gradient alone": lambda loss, g: g.sum(),
    "of a penalty beside the loss": lambda loss, g: loss + g.pow(2).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("scaled", [False, True])
def test_double_backward_raises_in_a_sentence(scaled, name, loss, options):
    x = torch.randn(4, 7, requires_grad=True)
    value = loss(x, make_target((4,), 7), options=options)
    value = value * x.sum() if scaled else value  # the upstream gradient requires grad as well
    first = gradient(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient(DOUBLE[name](value, first), x)


def test_double_backward_in_place_raises_in_a_sentence(backend):
    x = torch.randn(4, 7, requires_grad=True)
    loss = perplexity(x * 1, make_target((4,), 7), options=Options(backend=backend, inplace_backward=True))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient(gradient(loss, x, create_graph=True).sum(), x)


@pytest.mark.parametrize(
    "twice", [lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum()), torch.func.hessian]
)
def test_second_derivatives_raise_under_torch_func(twice, options):
    target = make_target((4,), 7)
    with pytest.raises(RuntimeError, match=r"first derivatives only|forward-mode"):
        twice(lambda x: perplexity(x, target, options=options))(torch.randn(4, 7))


def test_forward_mode_raises(options):
    target, x = make_target((4,), 7), torch.randn(4, 7)
    with pytest.raises(NotImplementedError, match="forward"):
        torch.func.jvp(lambda x: perplexity(x, target, options=options), (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward"):
        perplexity(torch.autograd.forward_ad.make_dual(x, x), target, options=options)


def test_torch_func_grad_works(options):
    x, target = make_logits((4, 7)), make_target((4,), 7)
    got, value = torch.func.grad_and_value(lambda x: perplexity(x, target, options=options))(x)
    truth = torch.func.grad(lambda x: torch.nn.functional.cross_entropy(x, target).exp())(x.double())
    assert_close(got, truth.float())
    assert_close(value, torch.nn.functional.cross_entropy(x, target).exp())


# 4


def test_logits_that_need_no_gradient_get_no_graph_and_no_buffer(options, peak_bytes):
    x, target = torch.randn(512, 2000), make_target((512,), 2000)
    assert not perplexity(x, target, options=options).requires_grad
    assert peak_bytes(lambda: perplexity(x, target, options=Options(options.backend, memory_budget=2**18))) < 2**19


# 5


@pytest.mark.parametrize("chunks", [1, 4, 32, 256])
def test_error_does_not_grow_with_the_number_of_chunks(chunks, backend, fits):
    fits(256, 100)
    x, target = make_logits((256, 100)), make_target((256,), 100)
    budget = 256 // chunks * 100 * 4

    def run(x, options):
        x = x.detach().requires_grad_()
        loss = perplexity(x, target, options=options)
        return loss.detach(), gradient(loss, x)

    ours, eager, truth = run(x, Options(backend, budget)), run(x, REFERENCE), run(x.double(), REFERENCE)
    for a, b, c in zip(ours, eager, truth, strict=True):
        assert_as_good_as_eager(a, b, c, condition=truth[0].log().item())
    assert abs(ours[0].double() - truth[0]) <= 4e-7 * truth[0]


def test_sums_are_counted_beyond_what_float32_holds(options):
    # 2**24 + 1 is not a float32: weights of 2**22, five of them, and ones
    weight = torch.tensor([2.0**22] * 5 + [1.0] * 3)
    out = cross_entropy_with_stats(
        torch.zeros(8, 4), torch.zeros(8, dtype=torch.long), token_weight=weight, options=options
    )
    assert out.total_weight.item() == 5 * 2**22 + 3


# 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_the_same_from_run_to_run(dtype, options):
    x, target = make_logits((64, 301), dtype).requires_grad_(), make_target((64,), 301, ignored=0.1)
    runs = []
    for _ in range(3):
        loss = perplexity(x, target, label_smoothing=0.1, options=options)
        runs.append((loss.detach(), gradient(loss, x)))
    for value, grad in runs[1:]:
        assert torch.equal(value, runs[0][0])
        assert torch.equal(grad, runs[0][1])


def test_a_row_does_not_depend_on_the_values_of_other_rows(options):
    x, target = make_logits((64, 301)), make_target((64,), 301)
    alone = cross_entropy(x, target, reduction="none", options=options)
    other = make_logits((64, 301), seed=5, kind="wild")
    other[::3] = x[::3]
    assert torch.equal(cross_entropy(other, target, reduction="none", options=options)[::3], alone[::3])


def test_deterministic_algorithms_can_be_asked_for(options):
    x, target = make_logits((8, 37)).requires_grad_(), make_target((8,), 37)
    before = gradient(perplexity(x, target, options=options), x)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(gradient(perplexity(x, target, options=options), x), before)
    finally:
        torch.use_deterministic_algorithms(False)


# 7

SPECS = {
    "plain": LossSpec(),
    "perplexity": LossSpec(max_nll=3.0),
    "all": LossSpec(label_smoothing=0.1, logit_scale=0.5, softcap=3.0, z_loss=0.1, stats=True),
    "each token": LossSpec(reduction="none", z_loss=0.1),
    "sequences": LossSpec(reduction="sequence", ignore_index=None),
}


@pytest.fixture(params=["torch", "triton"])
def without_launches(request, monkeypatch) -> str:
    """Each backend, whose kernels do not run."""
    if request.param == "triton":
        rows = pytest.importorskip("fused_ppl.backends.triton_rows", reason="it imports triton, in the extra `test`")
        for name in ("launch_nll_forward", "launch_nll_backward", "launch_nll_forward_backward"):
            monkeypatch.setattr(rows, name, lambda *args, **keywords: None)
    return request.param


def tokens_on(device: str, spec: LossSpec) -> tuple[Tensor | None, ...]:
    """Target, class weights, token weights and num_items."""
    num_items = torch.ones((), device=device) if spec.reduction == "mean" else None
    target = torch.zeros(2, 3, dtype=torch.long, device=device)
    return target, torch.ones(11, device=device), torch.ones(2, 3, device=device), num_items


def run_logits_on(device: str, spec: LossSpec, dtype: torch.dtype, backend: str) -> Tensor:
    """The engine's forward and backward, as the opaque ops call them."""
    x, (*tokens, num_items) = torch.empty(2, 3, 11, dtype=dtype, device=device), tokens_on(device, spec)
    execution = Execution(backend, None)
    out = engine.logits_forward.function(LogitsInputs(x, *tokens, num_items), spec, execution)
    one = torch.ones(out.loss.shape, device=device)
    upstream = Upstream(out.loss_factor, out.perplexity_factor, one, one)
    saved = engine.Saved(x, *tokens, out.lse, out.nll)
    engine.logits_backward_.function(saved, upstream, spec, execution)
    return engine.logits_backward.function(saved, upstream, spec, execution)


def run_head_on(device: str, spec: LossSpec, dtype: torch.dtype, backend: str) -> Tensor:
    """The fused head by either plan."""
    head = [torch.empty(shape, dtype=dtype, device=device) for shape in ((2, 3, 5), (11, 5), (11,))]
    *tokens, num_items = tokens_on(device, spec)
    grads, inputs = (spec.reduction == "mean",) * 3, HeadInputs(*head, *tokens, num_items)
    losses, unscaled, *_ = linear_rows.linear_forward.function(inputs, spec, HeadExecution(backend, None, dtype, grads))
    one = torch.ones(losses.loss.shape, device=device)
    upstream = Upstream(losses.loss_factor, losses.perplexity_factor, one, one)
    if any(grads):  # one factor for all tokens, as this plan has it
        linear_rows.linear_scale.function(inputs, unscaled, upstream, spec, grads=grads)
    known, execution = Normalizers(losses.lse, losses.nll), HeadExecution(backend, None, dtype, (True, True, True))
    vocab = linear_vocab.linear_vocab_backward.function
    return vocab(inputs, upstream, spec, execution, normalizers=known, shard=Shard(0, 11)).grad_hidden


ENGINES = {run_logits_on: (2, 3, 11), run_head_on: (2, 3, 5)}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("run_on", ENGINES)
def test_nothing_waits_for_a_gpu(run_on, dtype, name, fake_gpu, without_launches):
    try:
        with fake_gpu():
            grad = run_on("cuda", SPECS[name], dtype, without_launches)
    except TypeError as error:
        if "meta_mm()" not in str(error):
            raise
        pytest.skip("torch 2.8 has mm(out_dtype=) for real tensors alone")
    assert grad.device.type == "cuda"
    assert grad.shape == ENGINES[run_on]


WAITS = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.any()),
    "nonzero": lambda t: t.nonzero(),
    "tolist": lambda t: t.tolist(),
    "torch.equal": lambda t: torch.equal(t, t),
    "masked_select": lambda t: t.masked_select(t > 0),
}


@pytest.mark.parametrize("run_on", ENGINES)
@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_a_gpu_would_be_seen(name, run_on, fake_gpu, monkeypatch):
    right = engine.reduction.finish

    def wait_and_finish(sums, *args, **keywords):
        WAITS[name](sums.s.expand(3))
        return right(sums, *args, **keywords)

    monkeypatch.setattr(engine.reduction, "finish", wait_and_finish)
    with fake_gpu(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        run_on("cuda", LossSpec(), torch.float32, "torch")


def test_a_wait_in_the_public_function_would_be_seen(fake_gpu, monkeypatch):
    with fake_gpu():
        x, target = torch.empty(4, 11, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
        out = cross_entropy_with_stats(x, target, num_items=torch.tensor(3.0, device="cuda"))
        assert out.loss.device.type == "cuda"
        monkeypatch.setattr(fused_ppl.checks, "check_device", lambda name, value, input: value.sum().item())
        with pytest.raises(DataDependentOutputException):
            perplexity(x, target)


# 10


def test_every_result_says_whether_it_has_a_gradient(options):
    x = make_logits((4, 7)).requires_grad_()
    out = cross_entropy_with_stats(x, make_target((4,), 7), options=options)
    assert out.loss.requires_grad
    assert out.perplexity.requires_grad
    for name in ("nll", "lse", "entropy", "predicted", "total_weight"):
        assert not getattr(out, name).requires_grad, name
        with pytest.raises(RuntimeError, match="does not require grad"):
            getattr(out, name).sum().backward()
