# SPDX-License-Identifier: Apache-2.0
"""One graph under torch.compile, whatever the number of tokens, with the numbers of eager; and the ops keep the rules.

Most cases stop at AOTAutograd (`aot_eager`): what Inductor adds is code around opaque ops, and costs ten times as long.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import on_device
import options as option_table
import pytest
import torch
import torch._dynamo.utils
from op_cases import checked_op
from torch.testing import assert_close

from fused_ppl import Options, cross_entropy, cross_entropy_with_stats, perplexity
from fused_ppl.engines import logits as engine
from fused_ppl.records import Execution, LogitsInputs, Upstream
from fused_ppl.spec import IN_SCALARS, LossSpec
from fused_ppl.testing import make_logits, make_target

ROOT = Path(__file__).parents[1]
LOSSES = [cross_entropy, perplexity]
# every value of an option, and what is asked for of the tokens
EACH = {name: None for name in option_table.alone(cross_entropy)}
EACH |= {"ignore_index": {"ignore_index": None}} | {r: {"reduction": r} for r in ("none", "sum", "sequence")}


pytestmark = pytest.mark.usefixtures("nothing_compiled")


def both(loss):
    """The gradient of a compiled training step, and that of eager."""

    def step(x, target, **keywords):
        value = loss(x * 2, target, **keywords)
        return value.sum() if torch.is_tensor(value) else (value.loss + value.perplexity).sum()

    def gradient(function, x, target, **keywords):
        x = x.detach().requires_grad_()
        value = function(x, target, **keywords)
        return value.detach(), torch.autograd.grad(value, x)[0]

    return step, gradient


@pytest.mark.parametrize("loss", [cross_entropy, perplexity, cross_entropy_with_stats])
def test_one_graph_for_three_numbers_of_tokens(loss, options):
    step, gradient = both(loss)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (6, 9, 17):
            x, target = make_logits((n, 11), seed=n), make_target((n,), 11, ignored=0.2)
            for a, b in zip(*(gradient(f, x, target, options=options) for f in (compiled, step)), strict=True):
                assert_close(a, b, rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_compiles_where_nothing_requires_a_gradient(mode, options):
    """As in the evaluation of a model."""
    compiled = torch.compile(lambda x, y: perplexity(x, y, options=options), backend="aot_eager", fullgraph=True)
    x, target = make_logits((6, 11)), make_target((6,), 11)
    with mode():
        assert torch.equal(compiled(x, target), perplexity(x, target, options=options))


@pytest.mark.parametrize(
    ("shape", "make", "class_dim"),
    [
        ((11,), lambda x: x.contiguous(), -1),  # (B, T, V)
        ((11,), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), -1),
        ((16,), lambda x: x[..., :11], -1),
        ((11,), lambda x: x.movedim(-1, 1).contiguous(), 1),  # images
    ],
    ids=["sequences", "transposed", "padded", "images"],
)
def test_one_graph_for_other_layouts(shape, make, class_dim, options):
    def step(x, target):
        return perplexity(x, target, class_dim=class_dim, options=options)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for b, t in ((3, 4), (5, 7), (4, 9)):
        x, target = make(make_logits((b, t, *shape))), make_target((b, t), 11)
        results = []
        for function in (compiled, step):
            leaf = x.detach().requires_grad_()
            loss = function(leaf, target)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        for a, b_ in zip(*results, strict=True):
            assert_close(a, b_, rtol=0, atol=0)
            assert a.stride() == b_.stride()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_all_options_compile_together(options, every_option):
    x, target = make_logits((6, 11)), make_target((6,), 11, ignored=0.2)
    for loss in LOSSES:
        step, gradient = both(loss)
        keywords = every_option(loss, 11, target)
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
        for a, b in zip(*(gradient(f, x, target, options=options, **keywords) for f in (compiled, step)), strict=True):
            assert_close(a, b, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_each_option_compiles_alone(name, options):
    x, target = make_logits((6, 11)), make_target((6,), 11)
    step, gradient = both(cross_entropy)
    keywords = {**(EACH[name] or option_table.keywords([name], 11, target)), "options": options}
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for a, b in zip(*(gradient(f, x, target, **keywords) for f in (compiled, step)), strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_python_numbers_that_change_do_not_make_many_graphs(options):
    """num_items is another number in every step."""

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(x, target, items):
        return cross_entropy(x, target, num_items=items, options=options)

    x, target = make_logits((6, 11)), make_target((6,), 11)
    for items in (5, 7, 11, 13):
        assert_close(step(x, target, items), cross_entropy(x, target, num_items=items, options=options))
        assert_close(step(x, target, torch.tensor(items)), cross_entropy(x, target, num_items=items, options=options))
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    )  # one for the first number, one for any number, one for tensors


def test_autocast_compiles_and_computes_in_float32(options):
    linear, target = torch.nn.Linear(5, 11), make_target((6,), 11)
    x = torch.randn(6, 5)

    def step(x):
        with torch.autocast(on_device.device.type, torch.bfloat16):
            logits = linear(x)
            return logits, perplexity(logits, target, options=options)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for function in (step, compiled):
        logits, loss = function(x)
        assert logits.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        assert_close(loss, torch.nn.functional.cross_entropy(logits.float(), target).exp(), rtol=1e-5, atol=0)
        linear.zero_grad()
        loss.backward()
        assert linear.weight.grad.dtype == torch.float32
        assert linear.weight.grad.abs().min() > 0


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_inplace_backward_compiles(compiler, backend):
    target = make_target((6,), 11, ignored=0.2)

    def step(x, inplace):
        return perplexity(x * 2, target, options=Options(backend, inplace_backward=inplace))

    def whole(logits, inplace):
        return perplexity(logits, target, options=Options(backend, inplace_backward=inplace))

    x = make_logits((6, 11)).requires_grad_()
    (expected,) = torch.autograd.grad(step(x, False), x)
    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    assert_close(torch.autograd.grad(compiled(x, True), x)[0], expected, rtol=1e-6, atol=1e-6)
    # the logits as an input of the graph, which they are not in the first
    compiled = torch.compile(whole, backend=compiler, fullgraph=True)
    assert_close(torch.autograd.grad(compiled(x * 2, True), x)[0], expected, rtol=1e-6, atol=1e-6)


def test_double_backward_raises_when_compiled(options):
    x, target = make_logits((6, 11)).requires_grad_(), make_target((6,), 11)
    compiled = torch.compile(lambda x: perplexity(x * 2, target, options=options), backend="aot_eager", fullgraph=True)
    loss = compiled(x)
    with pytest.raises(RuntimeError, match=r"double backward|first derivatives only"):
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + g.pow(2).sum()).backward()


def test_bad_input_raises_when_compiled(options):
    compiled = torch.compile(lambda x, y: perplexity(x, y, options=options), backend="eager")
    with pytest.raises(Exception, match="target must have shape"):
        compiled(torch.zeros(4, 7), torch.zeros(3).long())
    if on_device.elsewhere():
        return  # a GPU makes NaN of a target out of range
    with pytest.raises(IndexError, match=r"\[0, 7\)"):
        compiled(torch.zeros(4, 7), torch.full((4,), 7))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_inductor_gives_the_numbers_of_eager(loss, options, every_option):
    x, target = make_logits((6, 11)), make_target((6,), 11, ignored=0.2)
    step, gradient = both(loss)
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    keywords = {**every_option(loss, 11, target), "options": options}
    for a, b in zip(*(gradient(f, x, target, **keywords) for f in (compiled, step)), strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-6)


SECOND_BACKWARD = """
import sys, torch
from fused_ppl import Options, perplexity
torch.manual_seed(0)
x, target = torch.randn(6, 11, requires_grad=True), torch.arange(6)
loss = torch.compile(lambda x: perplexity(x * 2, target, options=Options(backend=sys.argv[2])))(x)
if sys.argv[1] == "plain":
    loss.backward()
else:
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    try:
        (second,) = torch.autograd.grad(loss, x)
    except RuntimeError as error:
        print("donated" if "donated" in str(error) else error)
    else:
        print("same" if torch.equal(first, second) else f"different by {(first - second).abs().max()}")
"""


@pytest.mark.slow
@pytest.mark.cpu("its processes make tensors of their own")
def test_second_backward_from_a_shared_cache_is_the_same_or_an_error(tmp_path, backend):
    """The first process fills Inductor's cache with a plain backward, after which torch's own check is lost."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(engine.__file__).parents[2]),
    }
    for mode in ("plain", "twice"):
        run = subprocess.run(
            [sys.executable, "-c", SECOND_BACKWARD, mode, backend],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in ("same", "donated")


def op_samples(backend):
    """Arguments of the two ops, without those that require grad: opcheck's test of autograd is for ops that have it."""
    target = make_target((2, 3), 11, ignored=0.2)
    layouts = {
        "contiguous": make_logits((2, 3, 11)),
        "padded": make_logits((2, 3, 16))[..., :11],
        "transposed": make_logits((3, 2, 11)).transpose(0, 1),
        "classes first": make_logits((2, 11, 3)).movedim(1, -1),
        "expanded": make_logits((1, 1, 11)).expand(2, 3, 11),
        "offset": make_logits((2, 3, 12)).flatten()[6:].view(2, 3, 11),
        "no view": make_logits((3, 2, 2, 11))[..., 0, :].transpose(0, 1),
        "bfloat16": make_logits((2, 3, 11), torch.bfloat16),
        "empty": make_logits((2, 0, 11)),
    }
    specs = [
        LossSpec(),
        LossSpec("none", z_loss=0.1, stats=True),
        LossSpec("sequence", label_smoothing=0.1, softcap=3.0, max_nll=1.0),
        LossSpec("sum", ignore_index=None),
        LossSpec(softcap=IN_SCALARS, scalars=torch.tensor([3.0, 0.0], dtype=torch.float64)),
    ]
    for i, (name, x) in enumerate(layouts.items()):
        y = target[:, : x.shape[1]]
        spec = specs[1 if name == "empty" else i % len(specs)]  # opcheck takes NaN for a difference
        if spec.ignore_index is None:
            y = y.clamp(min=0)
        weight, token_weight = (torch.rand(11), torch.rand(y.shape)) if i % 2 else (None, None)
        num_items = torch.tensor(5.0) if i == 0 else None
        yield name, LogitsInputs(x, y, weight, token_weight, num_items), spec, Execution(backend, None)


@pytest.mark.parametrize("index", range(9))
def test_ops_keep_the_rules_of_torch_library(index, backend):
    name, inputs, *how = list(op_samples(backend))[index]
    out = checked_op("logits_forward", inputs, *how)
    one = torch.ones_like(out.loss)
    upstream = Upstream(out.loss_factor, out.perplexity_factor, one, None if index % 2 else one)
    x, *tokens, _ = inputs
    checked_op("logits_backward", engine.Saved(x, *tokens, out.lse, out.nll), upstream, *how)
    if name != "expanded":
        checked_op("logits_backward_", engine.Saved(x.clone(), *tokens, out.lse, out.nll), upstream, *how)


@pytest.mark.parametrize("index", range(9))
def test_fakes_have_the_shape_dtype_and_strides_of_the_results(index, backend):
    """Also where memory is long aligned and where it is not: opcheck compares one sample."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, tensors, *how = list(op_samples(backend))[index]
    real = engine.logits_forward(tensors, *how)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = engine.logits_forward(LogitsInputs(*(t if t is None else mode.from_tensor(t) for t in tensors)), *how)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.storage_offset()) == (b.shape, b.dtype, b.stride(), b.storage_offset())
    assert engine.empty_gradient(tensors[0]).stride() == engine.empty_gradient(mode.from_tensor(tensors[0])).stride()
