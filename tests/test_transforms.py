# SPDX-License-Identifier: Apache-2.0
"""torch.func, torch.export and compiled transforms: the right gradient, or a sentence; never 0."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

from fused_ppl import Options, cross_entropy, linear_cross_entropy, linear_perplexity, perplexity
from fused_ppl.engines.finish import finish
from fused_ppl.engines.linear_rows import linear_forward
from fused_ppl.engines.ops import LIBRARY
from fused_ppl.records import HeadExecution, HeadInputs
from fused_ppl.spec import LossSpec
from fused_ppl.testing import make_logits, make_target

TARGET = make_target((6,), 11, ignored=0.2)
HIDDEN, WEIGHT = make_logits((6, 5), seed=1) / 4, make_logits((11, 5), seed=2) / 4


pytestmark = pytest.mark.usefixtures("nothing_compiled")


def of_logits(options, loss=cross_entropy, **keywords):
    return lambda weight: loss(HIDDEN @ weight.T, TARGET, options=options, **keywords)


def of_head(options, loss=linear_cross_entropy, **keywords):
    return lambda weight: loss(HIDDEN, weight, TARGET, options=options, **keywords)


FORMS = pytest.mark.parametrize("form", [of_logits, of_head])


def truth(reduction="mean"):
    return lambda weight: torch.nn.functional.cross_entropy(HIDDEN @ weight.T, TARGET, reduction=reduction)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@FORMS
def test_compiled_func_grad_is_the_gradient(form, compiler, options):
    """It was 0: Dynamo inlines the Function there, and the ops had no autograd."""
    compiled = torch.compile(torch.func.grad(form(options)), backend=compiler, fullgraph=True)
    assert_close(compiled(WEIGHT), torch.func.grad(truth())(WEIGHT), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("form", "loss"), [(of_logits, perplexity), (of_head, linear_perplexity)])
def test_compiled_func_grad_of_a_perplexity(form, loss, options):
    compiled = torch.compile(torch.func.grad_and_value(form(options, loss)), backend="aot_eager", fullgraph=True)
    expected = torch.func.grad_and_value(lambda w: truth()(w).exp())(WEIGHT)
    for a, b in zip(compiled(WEIGHT), expected, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiled_func_grad_of_all_inputs_and_options(options, every_option):
    keywords = {**every_option(linear_cross_entropy, 11, TARGET), "options": options}
    bias = torch.rand(11)

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, TARGET, linear_bias=bias, **keywords).sum()

    gradient = torch.func.grad(loss, (0, 1, 2))
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True, dynamic=True)
    for a, b in zip(compiled(HIDDEN, WEIGHT, bias), gradient(HIDDEN, WEIGHT, bias), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiled_func_grad_of_functional_call(options):
    model = torch.nn.Linear(5, 11)

    def step(parameters, h):
        return cross_entropy(torch.func.functional_call(model, parameters, (h,)), TARGET, options=options)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    compiled = torch.compile(torch.func.grad(step), backend="aot_eager", fullgraph=True)(parameters, HIDDEN)
    torch.nn.functional.cross_entropy(model(HIDDEN), TARGET).backward()
    for name, p in model.named_parameters():
        assert_close(compiled[name], p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", [{"gradient_columns": 4}, {"gradient_tolerance": 0.1}])
def test_compiled_func_grad_of_the_compact_plan_is_near_or_a_sentence(asked, options):
    compact = Options(options.backend, **asked)
    compiled = torch.compile(torch.func.grad(of_head(compact)), backend="aot_eager", fullgraph=True)
    try:
        got = compiled(WEIGHT)
    except Exception as error:
        assert "has a gradient only as a part of its loss" in str(error)
    else:
        expected = torch.func.grad(truth())(WEIGHT)
        assert (got - expected).norm() <= 0.5 * expected.norm()


@FORMS
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_raises_a_sentence(form, compiled, options):
    """Compiled it gave a tangent of 0.0."""
    f = form(options)

    def tangent(w):
        return torch.func.jvp(f, (w,), (w,))[1]

    if compiled:
        tangent = torch.compile(tangent, backend="aot_eager")
    with pytest.raises(Exception, match=r"no forward-mode derivative .*backend='reference'"):
        tangent(WEIGHT)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"backend='reference'"):
        f(forward_ad.make_dual(WEIGHT, WEIGHT))


@FORMS
def test_compiled_second_derivative_raises(form, options):
    twice = torch.func.grad(lambda w: torch.func.grad(form(options))(w).pow(2).sum())
    with pytest.raises(Exception, match="first derivatives only"):
        torch.compile(twice, backend="aot_eager")(WEIGHT)


@FORMS
def test_vmap_raises_a_sentence(form, options):
    weights = torch.stack([WEIGHT, WEIGHT])
    for function in (form(options), torch.func.grad(form(options))):
        with pytest.raises(NotImplementedError, match=r"torch.vmap.*backend='reference'"):
            torch.vmap(function)(weights)


@FORMS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_jacrev_and_batched_gradients_are_the_gradients_one_by_one(form, reduction, options):
    f, expected = form(options, reduction=reduction), torch.func.jacrev(truth(reduction))(WEIGHT)
    assert_close(torch.func.jacrev(f)(WEIGHT), expected, rtol=1e-5, atol=1e-6)
    w = WEIGHT.clone().requires_grad_()
    loss = f(w)
    each = torch.eye(loss.numel()).view(loss.numel(), *loss.shape)
    (got,) = torch.autograd.grad(loss, w, each, is_grads_batched=True)
    assert_close(got, expected.view(got.shape), rtol=1e-5, atol=1e-6)


def test_batched_gradients_have_no_place_in_the_logits(backend):
    f = of_logits(Options(backend, inplace_backward=True))
    w = WEIGHT.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"inplace_backward=False"):
        torch.autograd.grad(f(w), w, torch.ones(2), is_grads_batched=True)


@pytest.mark.parametrize("head", [False, True])
def test_the_reference_has_vmap(head):
    """It raised for batched targets, whose range it wanted to see."""
    options, targets = Options("reference"), make_target((3, 6), 11, ignored=0.2)

    def loss(target):
        if head:
            return linear_cross_entropy(HIDDEN, WEIGHT, target, options=options)
        return cross_entropy(HIDDEN @ WEIGHT.T, target, options=options)

    each = [torch.nn.functional.cross_entropy(HIDDEN @ WEIGHT.T, target) for target in targets]
    assert_close(torch.vmap(loss)(targets), torch.stack(each), rtol=1e-5, atol=1e-6)


class Model(torch.nn.Module):
    def __init__(self, options, fused):
        super().__init__()
        self.head, self.options, self.fused = torch.nn.Linear(5, 11), options, fused

    def forward(self, hidden, target):
        if self.fused:
            return linear_cross_entropy(
                hidden, self.head.weight, target, linear_bias=self.head.bias, options=self.options
            )
        return cross_entropy(self.head(hidden), target, options=self.options)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_an_exported_model_trains(fused, strict, options):
    """Strictly it had a loss without gradient, and the head raised about `out=` else."""
    if strict and torch.__version__ < (2, 8):
        pytest.skip("Dynamo of this torch does not say that it exports: the loss has no gradient, and backward raises")
    model = Model(options, fused)
    exported = torch.export.export(model, (HIDDEN, TARGET), strict=strict).module()
    model.zero_grad()  # which a strict export of torch leaves behind
    loss = exported(HIDDEN, TARGET)
    got = torch.autograd.grad(loss, list(exported.parameters()))
    reference = torch.nn.functional.cross_entropy(model.head(HIDDEN), TARGET)
    expected = torch.autograd.grad(reference, list(model.parameters()))
    assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_op_alone_has_the_gradient_of_its_loss(backend):
    """Also where it was not told that one would be asked for."""
    tensors = [t.clone().requires_grad_() for t in (HIDDEN, WEIGHT)]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(tensors[0] @ tensors[1].T, TARGET), tensors)
    inputs = HeadInputs(*tensors, None, TARGET, None, None, None)
    for made in ((True, True, False), (True, False, False), (False,) * 3):
        loss = linear_forward(inputs, LossSpec(), HeadExecution(backend, None, torch.float32, made)).losses.loss
        for a, b in zip(torch.autograd.grad(loss, tensors), expected, strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_every_op_has_autograd_or_says_that_it_has_none():
    for name in LIBRARY._op_defs:
        kernels = torch._C._dispatch_dump(name)
        assert "Autograd[alias]" in kernels, kernels


def test_a_part_of_a_loss_alone_has_no_gradient():
    sums = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = finish(sums, None, LossSpec(), dtype=torch.float32, ranks=1).loss
    with pytest.raises(NotImplementedError, match="only as a part of its loss"):
        loss.backward()
