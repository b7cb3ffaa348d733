# SPDX-License-Identifier: Apache-2.0
"""A number of a loss may be a 0-d tensor: it has the result of the number, and torch.compile compiles once for all."""

from __future__ import annotations

import itertools

import options as option_table
import pytest
import torch
import torch._dynamo.utils
from op_cases import checked_op
from torch.testing import assert_close

import fused_ppl
from fused_ppl import CrossEntropyLoss, LinearPerplexityLoss, Options, cross_entropy, linear_cross_entropy, perplexity
from fused_ppl.engines.linear_rows import linear_forward
from fused_ppl.records import HeadExecution, HeadInputs
from fused_ppl.spec import IN_SCALARS, MAY_BE_TENSORS, LossSpec
from fused_ppl.testing import make_logits, make_target

N, V, D = 6, 11, 5
TARGET = make_target((N,), V, ignored=0.2)
HIDDEN, WEIGHT, LOGITS = torch.randn(N, D), torch.randn(V, D), make_logits((N, V))
NUMBERS = {"logit_scale": 0.75, "softcap": 3.1, "z_loss": 0.013, "max_nll": 1.3}


pytestmark = pytest.mark.usefixtures("nothing_compiled")


def numbers_of(function, step=0):
    """The numbers that this function takes, others at each step; z_loss is 0 at the first."""
    scaled = {name: value * (1 + step / 7) for name, value in NUMBERS.items()} | {"z_loss": 0.013 * step}
    return {name: scaled[name] for name in option_table.numbers(function) if name in MAY_BE_TENSORS}


def as_tensors(numbers, dtype=torch.float64, **where):
    return {name: torch.tensor(value, dtype=dtype, **where) for name, value in numbers.items()}


def inputs_of(function):
    return [HIDDEN, WEIGHT] if function.__name__.startswith("linear") else [LOGITS]


def gradients(function, tensors, **keywords):
    """Value and gradients of a loss, of the loss and the perplexity together where it returns both."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    found = function(*leaves, TARGET, **keywords)
    value = (found if isinstance(found, torch.Tensor) else found.loss + found.perplexity).sum()
    return value.detach(), *torch.autograd.grad(value, leaves)


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("function", option_table.FUNCTIONS)
def test_a_tensor_has_the_result_of_its_number(function, options):
    numbers, given = numbers_of(function, 1), inputs_of(function)
    expected = gradients(function, given, options=options, **numbers)
    assert_equal(gradients(function, given, options=options, **as_tensors(numbers)), expected)
    rounded = as_tensors(numbers, torch.bfloat16)
    same = {name: tensor.item() for name, tensor in rounded.items()}
    assert_equal(
        gradients(function, given, options=options, **rounded), gradients(function, given, options=options, **same)
    )
    reference = Options(backend="reference")
    truth = gradients(function, [t.double() for t in given], options=reference, **numbers)
    assert_close(expected, tuple(t.float() for t in truth), rtol=1e-4, atol=1e-5)


# a loss, and the options that lead to the plan of its head
PLANS = {
    "logits": (cross_entropy, {}, {}),
    "logits, each token": (cross_entropy, {"reduction": "none"}, {}),
    "logits, perplexity": (perplexity, {}, {}),
    "logits, in place": (cross_entropy, {}, {"inplace_backward": True}),
    "logits, stats": (fused_ppl.cross_entropy_with_stats, {}, {}),
    "rows": (linear_cross_entropy, {}, {}),
    "rows, smoothing": (linear_cross_entropy, {"label_smoothing": 0.1}, {}),
    "vocab": (linear_cross_entropy, {"reduction": "sequence"}, {}),
    "vocab, small budget": (fused_ppl.linear_perplexity, {}, {"memory_budget": 1}),
    "compact": (linear_cross_entropy, {}, {"gradient_columns": 8}),
}


SLOW = ("logits, perplexity", "logits, in place", "rows, smoothing")


@pytest.mark.parametrize("name", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in PLANS])
def test_twelve_numbers_compile_once(name, backend):
    function, keywords, how = PLANS[name]
    keywords["options"] = Options(backend, **how)

    def step(*tensors, **keywords):
        *tensors, target = tensors
        return function(*(t * 1 for t in tensors), target, **keywords)

    compiled, given = torch.compile(step, backend="aot_eager", fullgraph=True), inputs_of(function)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(12):
            numbers = numbers_of(function, i)
            if name == "logits, stats":
                numbers["z_loss"] += 0.1  # without z_loss the plan may be another one
            found = gradients(compiled, given, **as_tensors(numbers), **keywords)
            assert_equal(found, gradients(step, given, **numbers, **keywords))
            if not how or "memory_budget" in how:
                wide = [t.double() for t in given]
                truth = gradients(step, wide, **numbers, **{**keywords, "options": Options("reference")})
                assert_close(found, tuple(t.float() for t in truth), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_tensors_of_a_module_may_change_in_place_or_be_replaced(dynamic, options):
    module = CrossEntropyLoss(z_loss=torch.tensor(0.5), logit_scale=torch.tensor(2.0), options=options)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    compiled(LOGITS, TARGET)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(1, 12):
            module.z_loss.fill_(step / 8)
            module.logit_scale = torch.tensor(1 + step / 4)
            expected = cross_entropy(LOGITS, TARGET, z_loss=step / 8, logit_scale=1 + step / 4, options=options)
            for called in (module, compiled):
                assert_close(called(LOGITS, TARGET), expected, rtol=0, atol=0)


@pytest.mark.parametrize("names", [("z_loss",), ("logit_scale",), ("logit_scale", "z_loss")])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_backward_keeps_the_numbers_of_forward(compiler, names, options):
    """float64: Inductor makes no copy where nothing has to be converted."""
    compiled = torch.compile(
        lambda x, k: cross_entropy(x * 1, TARGET, options=options, **k), backend=compiler, fullgraph=True
    )
    numbers, leaf = dict.fromkeys(names, 0.5), LOGITS.clone().requires_grad_()
    tensors = as_tensors(numbers)
    loss = compiled(leaf, tensors)
    for tensor in tensors.values():
        tensor.fill_(3.0)
    (expected,) = torch.autograd.grad(cross_entropy(leaf, TARGET, options=options, **numbers), leaf)
    assert_close(torch.autograd.grad(loss, leaf)[0], expected, rtol=1e-6, atol=1e-7)


def test_the_reference_compiles_with_tensors_too():
    compiled = torch.compile(fused_ppl.cross_entropy_with_stats, backend="aot_eager", fullgraph=True)
    options = Options(backend="reference")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(1, 4):
            numbers = numbers_of(fused_ppl.cross_entropy_with_stats, step)
            found = gradients(compiled, [LOGITS], options=options, **as_tensors(numbers))
            expected = gradients(fused_ppl.cross_entropy_with_stats, [LOGITS], options=options, **numbers)
            assert_close(found, expected, rtol=1e-6, atol=1e-6)


def head(weight, numbers, options):
    return linear_cross_entropy(HIDDEN, weight, TARGET, options=options, **numbers)


def test_transforms_of_torch_func_compile_once(options):
    numbers = numbers_of(linear_cross_entropy, 1)

    def gradient(weight, numbers):
        return torch.func.grad(lambda w: head(w, numbers, options))(weight)

    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(1, 4):
            numbers = numbers_of(linear_cross_entropy, step)
            assert_close(compiled(WEIGHT, as_tensors(numbers)), gradient(WEIGHT, numbers), rtol=1e-5, atol=1e-6)


class Model(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.weight, self.options = torch.nn.Parameter(WEIGHT.clone()), options

    def forward(self, numbers):
        return head(self.weight, numbers, self.options)


def test_an_exported_model_takes_other_numbers(options):
    numbers = numbers_of(linear_cross_entropy, 1)
    exported = torch.export.export(Model(options), (as_tensors(numbers),), strict=False).module()
    for step in range(1, 4):
        numbers = numbers_of(linear_cross_entropy, step)
        (found,) = torch.autograd.grad(exported(as_tensors(numbers)), list(exported.parameters()))
        expected = torch.func.grad(lambda w, numbers=numbers: head(w, numbers, options))(WEIGHT)
        assert_close(found, expected, rtol=1e-5, atol=1e-6)


OUT_OF_RANGE = [("logit_scale", 0.0), ("logit_scale", float("nan")), ("softcap", float("inf")), ("z_loss", -0.1)]


@pytest.mark.parametrize(("name", "value"), [*OUT_OF_RANGE, ("max_nll", -1.0)])
def test_a_number_out_of_range_raises_compiled_or_not(name, value, options):
    function = perplexity if name == "max_nll" else cross_entropy
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        with pytest.raises(ValueError, match=f"{name} must be >"):
            call(LOGITS, TARGET, options=options, **as_tensors({name: value}))


WRONG = {
    "must have shape": lambda: torch.ones(2),
    "floating-point tensor": lambda: torch.tensor(1),
    "gets no gradient": lambda: torch.tensor(1.0, requires_grad=True),
}


@pytest.mark.parametrize(("message", "name"), list(itertools.product(WRONG, ["logit_scale", "z_loss"])))
def test_a_tensor_that_is_no_number_raises_compiled_or_not(message, name, options):
    for call in (cross_entropy, torch.compile(cross_entropy, backend="eager")):
        with pytest.raises(Exception, match=f"{name}.*{message}"):
            call(LOGITS, TARGET, options=options, **{name: WRONG[message]()})
    with pytest.raises((ValueError, TypeError), match=message):
        LinearPerplexityLoss(D, V, logit_scale=WRONG[message]())


def test_label_smoothing_is_a_number_only():
    with pytest.raises(TypeError, match="label_smoothing must be a number"):
        cross_entropy(LOGITS, TARGET, label_smoothing=torch.tensor(0.1))


def test_a_cuda_graph_does_not_keep_a_number(monkeypatch, options):
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    compiled(LOGITS, TARGET, z_loss=torch.tensor(0.1), options=options)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        compiled(LOGITS, TARGET, z_loss=torch.tensor(0.1), options=options)


def test_a_number_is_validated_once_and_a_tensor_each_time(options):
    assert LossSpec.of(z_loss=0.5) is LossSpec.of(z_loss=0.5)
    tensor = torch.tensor(0.5)
    assert LossSpec.of(z_loss=tensor) == LossSpec.of(z_loss=0.5)
    assert LossSpec.of(z_loss=tensor.fill_(0.25)) == LossSpec.of(z_loss=0.25)


def test_ops_of_the_head_keep_the_rules_of_torch_library(backend):
    scalars = torch.tensor([0.5, 3.0, 0.1, 0.0], dtype=torch.float64, device="cpu")
    spec = LossSpec(logit_scale=IN_SCALARS, softcap=IN_SCALARS, z_loss=IN_SCALARS, scalars=scalars)
    execution = HeadExecution(backend, None, torch.float32, (True, True, False))
    inputs = HeadInputs(HIDDEN, WEIGHT, None, TARGET, None, None, None)
    found = checked_op("linear_forward", inputs, spec, execution)
    numbers = LossSpec(logit_scale=0.5, softcap=3.0, z_loss=0.1)
    expected = linear_forward(inputs, numbers, execution)
    assert_close(found.losses.loss, expected.losses.loss, rtol=0, atol=0)
