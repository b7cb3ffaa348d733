# SPDX-License-Identifier: Apache-2.0
"""The autograd of log_probs and linear_log_probs: the right gradient, or a sentence, under every transform of torch."""

from __future__ import annotations

import on_device
import pytest
import torch
from op_cases import checked_op
from token_cases import FIELDS, REFERENCE, SUBSETS, mixture, values_and_gradients
from torch.testing import assert_close

from fused_ppl import Options, linear_log_probs, log_probs
from fused_ppl.engines.linear_rows import linear_forward
from fused_ppl.engines.logits import Saved, logits_forward
from fused_ppl.records import (
    Execution,
    HeadExecution,
    HeadInputs,
    LogitsInputs,
    Shard,
    TokenStats,
    TokenUpstream,
)
from fused_ppl.spec import LossSpec
from fused_ppl.testing import make_logits, make_target

N, V, D = 6, 11, 5
TARGET = make_target((N,), V, ignored=0.2)
HIDDEN, WEIGHT = make_logits((N, D), seed=1) / 4, make_logits((V, D), seed=2) / 4
UPSTREAM = {name: g.float() for name, g in mixture((N,)).items()}


pytestmark = pytest.mark.usefixtures("nothing_compiled")


def of_logits(options, target=TARGET, **keywords):
    return lambda weight: log_probs(HIDDEN.to(weight) @ weight.T, target, options=options, **keywords)


def of_head(options, target=TARGET, **keywords):
    return lambda weight: linear_log_probs(HIDDEN.to(weight), weight, target, options=options, **keywords)


def total(out, upstream=UPSTREAM):
    """One number, in which each output of each token counts."""
    return sum((getattr(out, name) * g.to(out.lse)).sum() for name, g in upstream.items())


def truth(upstream=UPSTREAM):
    """The gradient of `total` in float64."""
    weight = WEIGHT.double().requires_grad_()
    (gradient,) = torch.autograd.grad(total(of_logits(REFERENCE)(weight), upstream), weight)
    return gradient.float()


FORMS = pytest.mark.parametrize("form", [of_logits, of_head])


@FORMS
@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0, "logit_scale": 0.7}])
def test_gradcheck(form, keywords, options, fits):
    fits(N, V, dtype=torch.float64)
    function = form(options, **keywords)
    assert torch.autograd.gradcheck(lambda w: tuple(function(w)), WEIGHT.double().requires_grad_())
    reference = form(REFERENCE, **keywords)
    assert torch.autograd.gradcheck(lambda w: tuple(reference(w)), WEIGHT.double().requires_grad_())


@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, True)], ids=str)
def test_gradcheck_of_hidden_states_weight_and_bias(needed, options, fits):
    fits(N, V, dtype=torch.float64)
    bias = torch.linspace(-1, 1, V)
    tensors = [t.double().clone().requires_grad_(n) for t, n in zip((HIDDEN, WEIGHT, bias), needed, strict=True)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: tuple(linear_log_probs(h, w, TARGET, linear_bias=b, options=options)), tensors
    )


@FORMS
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_a_second_derivative_raises_a_sentence(form, names, options):
    weight = WEIGHT.clone().requires_grad_()
    out = form(options)(weight)
    upstream = {name: UPSTREAM[name] for name in names}
    (gradient,) = torch.autograd.grad(total(out, upstream), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.pow(2).sum().backward()


@FORMS
def test_a_second_backward_over_a_kept_graph_has_the_same_bits(form, options):
    weight = WEIGHT.clone().requires_grad_()
    value = total(form(options)(weight))
    (first,) = torch.autograd.grad(value, weight, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, weight)
    assert torch.equal(kept, second) and torch.equal(kept, first)
    assert_close(first, truth(), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@FORMS
def test_an_output_that_is_used_twice_adds_its_gradients(form, options):
    weight = WEIGHT.clone().requires_grad_()
    out = form(options)(weight)
    double = {"log_prob": 2 * UPSTREAM["log_prob"], "entropy": 3 * UPSTREAM["entropy"]}
    twice = total(out, {"log_prob": UPSTREAM["log_prob"], "entropy": 3 * UPSTREAM["entropy"]})
    (got,) = torch.autograd.grad(twice + total(out, {"log_prob": UPSTREAM["log_prob"]}), weight)
    assert_close(got, truth(double), rtol=1e-5, atol=1e-6)


@FORMS
def test_a_function_of_several_outputs(form, options):
    """As PPO with an entropy bonus: a derivative by an output depends on the other outputs."""

    def loss(out):
        return ((out.log_prob + 1).exp().clamp(0.5, 2) * out.lse.cos() - 0.1 * out.entropy**2).mean()

    gradients = []
    for weight, how in ((WEIGHT.clone(), options), (WEIGHT.double(), REFERENCE)):
        gradients.append(torch.autograd.grad(loss(form(how)(weight.requires_grad_())), weight)[0].float())
    assert_close(*gradients, rtol=1e-5, atol=1e-6)


@FORMS
def test_an_output_that_is_written_to_before_backward_is_found(form, options):
    """The entropy is kept for backward. Another number in its place would give a wrong gradient."""
    weight = WEIGHT.clone().requires_grad_()
    out = form(options)(weight)
    with torch.no_grad():
        out.entropy.mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        total(out).backward()
    out = form(options)(weight)
    with torch.no_grad():
        out.log_prob.zero_(), out.lse.zero_()  # which nothing is computed from
    (got,) = torch.autograd.grad(out, weight, list(UPSTREAM.values()))
    assert_close(got, truth(), rtol=1e-5, atol=1e-6)


@FORMS
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_batched_gradients_are_the_gradients_one_by_one(form, names, options):
    weight = WEIGHT.clone().requires_grad_()
    out = form(options)(weight)
    outputs = [getattr(out, name) for name in names]
    batches = [torch.randn(4, N) for _ in names]
    each = [torch.autograd.grad(outputs, weight, list(g), retain_graph=True)[0] for g in zip(*batches, strict=True)]
    try:
        (got,) = torch.autograd.grad(outputs, weight, batches, is_grads_batched=True)
    except NotImplementedError as error:
        assert "fused_ppl" in str(error)
    else:
        assert_close(got, torch.stack(each), rtol=1e-5, atol=1e-6)


@FORMS
def test_func_grad_vjp_and_jacrev(form, options):
    assert_close(torch.func.grad(lambda w: total(form(options)(w)))(WEIGHT), truth(), rtol=1e-5, atol=1e-6)
    _, pull = torch.func.vjp(lambda w: form(options)(w).entropy, WEIGHT)
    assert_close(pull(UPSTREAM["entropy"])[0], truth({"entropy": UPSTREAM["entropy"]}), rtol=1e-5, atol=1e-6)
    rows = torch.func.jacrev(lambda w: form(options)(w).entropy)(WEIGHT)
    expected = torch.func.jacrev(lambda w: form(REFERENCE)(w).entropy)(WEIGHT)
    assert_close(rows, expected, rtol=1e-5, atol=1e-6)


@FORMS
def test_func_grad_twice_raises_a_sentence(form, options):
    def once(w):
        return torch.func.grad(lambda w: total(form(options)(w)))(w).pow(2).sum()

    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(once)(WEIGHT)


@FORMS
def test_forward_mode_and_vmap_raise_sentences(form, options):
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .*backend='reference'"):
        torch.func.jvp(lambda w: form(options)(w).entropy, (WEIGHT,), (WEIGHT,))
    with pytest.raises(NotImplementedError, match=r"torch.vmap.*backend='reference'"):
        torch.vmap(lambda w: form(options)(w).entropy)(torch.stack([WEIGHT, WEIGHT]))


@FORMS
def test_no_grad_and_inputs_without_gradient(form, options):
    weight = WEIGHT.clone().requires_grad_()
    with_graph = form(options)(weight)
    with torch.no_grad():
        without = form(options)(weight)
    detached = form(options)(WEIGHT)
    with torch.inference_mode():
        inferred = form(options)(weight)
    for graph, *others in zip(with_graph, without, detached, inferred, strict=True):
        assert graph.requires_grad and graph.grad_fn is not None
        assert all(torch.equal(t, graph) and not t.requires_grad for t in others)


NO_GRAPH = r"has no gradient in torch.export and in a transform of torch.func under torch.compile"


@FORMS
@pytest.mark.parametrize("names", [("log_prob",), FIELDS], ids="+".join)
def test_compiled_func_grad_raises_a_sentence_and_is_never_zero(form, names, options):
    function = torch.func.grad(lambda w: total(form(options)(w), {name: UPSTREAM[name] for name in names}))
    with pytest.raises(Exception, match=NO_GRAPH):
        torch.compile(function, backend="aot_eager", fullgraph=True)(WEIGHT)
    if on_device.interpreted():
        return  # without fullgraph Dynamo goes on inside of Triton's interpreter, which it cannot trace
    try:
        got = torch.compile(function, backend="aot_eager")(WEIGHT)
    except Exception as error:
        assert "has no gradient in torch.export" in str(error)
    else:
        assert_close(got, function(WEIGHT), rtol=1e-5, atol=1e-6)


class Model(torch.nn.Module):
    def __init__(self, options, fused):
        super().__init__()
        self.head, self.options, self.fused = torch.nn.Linear(D, V), options, fused

    def forward(self, hidden, target):
        if self.fused:
            return linear_log_probs(hidden, self.head.weight, target, linear_bias=self.head.bias, options=self.options)
        return log_probs(self.head(hidden), target, options=self.options)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_export_raises_a_sentence_or_exports_values(fused, strict, options):
    model = Model(options, fused)
    with pytest.raises(Exception, match=NO_GRAPH):
        torch.export.export(model, (HIDDEN, TARGET), strict=strict)
    with torch.no_grad():
        exported = torch.export.export(model, (HIDDEN, TARGET), strict=strict).module()
        for got, want in zip(exported(HIDDEN, TARGET), model(HIDDEN, TARGET), strict=True):
            assert torch.equal(got, want)


@FORMS
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_with_the_same_values_and_gradients(form, compiler, options):
    function = form(options)
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    want = values_and_gradients(function, [WEIGHT], UPSTREAM)
    got = values_and_gradients(compiled, [WEIGHT], UPSTREAM)
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("names", [("entropy",), FIELDS], ids="+".join)
@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_step_is_one_graph_for_any_number_of_tokens(fused, names, options):
    torch._dynamo.utils.counters.clear()
    weight = WEIGHT.clone().requires_grad_()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def values(hidden, weight, target):
        if fused:
            return linear_log_probs(hidden, weight, target, options=options, softcap=5.0)
        return log_probs(hidden @ weight.T, target, options=options, softcap=5.0)

    for n in (7, 9, 14):  # not D, which would be the same symbol
        hidden, target, upstream = make_logits((n, D)).requires_grad_(), make_target((n,), V), mixture((n,), names)
        got = torch.autograd.grad(total(values(hidden, weight, target), upstream), (hidden, weight))
        wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        reference = log_probs(wide[0] @ wide[1].T, target, options=REFERENCE, softcap=5.0)
        for a, b in zip(got, torch.autograd.grad(total(reference, upstream), wide), strict=True):
            assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_opcheck(names, backend):
    """The schema, the fake and the autograd of both ops, with each upstream gradient there or not."""
    logits, bias, spec = HIDDEN @ WEIGHT.T, torch.linspace(-1, 1, V), LossSpec.of(reduction="none", stats=True)
    upstream = TokenUpstream(*(UPSTREAM[name] if name in names else None for name in FIELDS))
    losses = logits_forward(LogitsInputs(logits, TARGET, None, None, None), spec, Execution(backend, None))
    saved, shard = Saved(logits, TARGET, None, None, losses.lse, losses.nll), Shard(0, V)
    execution = Execution(backend, None)
    checked_op("token_backward", saved, upstream, spec, execution, entropy=losses.entropy, shard=shard)
    inputs = HeadInputs(HIDDEN, WEIGHT, bias, TARGET, None, None, None)
    for grads in ((True, True, True), (True, False, False)):
        head = HeadExecution(backend, None, torch.float32, grads)
        losses = linear_forward(inputs, spec, HeadExecution(backend, None, torch.float32, (False,) * 3)).losses
        stats = TokenStats(losses.nll, losses.lse, losses.entropy)
        checked_op("linear_token_backward", inputs, upstream, spec, head, stats=stats, shard=shard)


@FORMS
def test_checkpointing_gives_the_same_gradient(form, options):
    weight = WEIGHT.clone().requires_grad_()
    value = torch.utils.checkpoint.checkpoint(lambda w: total(form(options)(w)), weight, use_reentrant=False)
    assert_close(torch.autograd.grad(value, weight)[0], truth(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_products_and_not_the_values(dtype, options):
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    with torch.autocast(HIDDEN.device.type, dtype):
        out = linear_log_probs(hidden, weight, TARGET, options=options)
    assert all(t.dtype == torch.float32 for t in out)
    got = torch.autograd.grad(total(out), (hidden, weight))
    assert all(g.dtype == torch.float32 for g in got)
    assert_close(got[1], truth(), rtol=0, atol=4 * torch.finfo(dtype).eps * truth().abs().max().item() * V)


def test_the_reference_backend_takes_a_second_derivative():
    weight = WEIGHT.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda w: tuple(of_logits(Options("reference"))(w)), weight)
