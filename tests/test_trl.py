# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of the adapter are those of TRL's own function, which runs on a CPU in plain PyTorch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fused_ppl.integrations import trl as adapter

N, V, D = 9, 131, 16
NAMES = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# temperature, softcap and logit_scale alone and together
TRANSFORMS = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.3, "logit_scale": 0.5},
    {"temperature": 0.7, "final_logit_softcapping": 3.0, "logit_scale": 2.0},
]


@pytest.fixture(scope="module")
def theirs() -> Any:
    reason = "needs the ChunkedLogProbFunction of TRL 1.16 (pip install trl)"
    function = getattr(pytest.importorskip("trl.kernels", reason=reason), "ChunkedLogProbFunction", None)
    if function is None or "outputs" not in inspect.signature(function.forward).parameters:
        pytest.skip(reason)
    return function


def make(bias: bool = True) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,))[: 2 + bias]
    # logits of about 1: TRL's entropy gradient loses digits where a prediction is certain
    tensors = [torch.randn(shape, generator=generator) / 2 for shape in shapes]
    target = torch.randint(V, (N,), generator=generator)
    with torch.no_grad():
        target[0] = (tensors[0] @ tensors[1].T + (tensors[2] if bias else 0))[0].argmax()  # one is top-1
    return [tensor.requires_grad_() for tensor in tensors], target


def call(function: Any, tensors: list[torch.Tensor], target: torch.Tensor, **keywords: Any) -> tuple[Any, ...]:
    """Pass everything by position, as an autograd function wants it. 50 columns make three tiles."""
    bias = tensors[2] if len(tensors) == 3 else None
    defaults = {"final_logit_softcapping": None, "logit_scale": 1.0, "outputs": NAMES[1:], **keywords}
    rest = (defaults[name] for name in ("final_logit_softcapping", "logit_scale", "outputs"))
    return function.apply(tensors[0], tensors[1], bias, target, keywords["temperature"], 50, *rest)


def test_the_arguments_are_those_of_trl(theirs):
    mine = inspect.signature(adapter.ChunkedLogProbFunction.apply).parameters.values()
    other = list(inspect.signature(theirs.forward).parameters.values())[1:]  # without ctx
    assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in other]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: ", ".join(f"{k}={v}" for k, v in t.items()))
def test_same_values_and_gradients(theirs, transform, bias, backend, monkeypatch):
    monkeypatch.setenv("FUSED_PPL_BACKEND", backend)
    capped = "final_logit_softcapping" in transform
    outputs = tuple(name for name in NAMES[1:] if not (capped and name == "mean_logits"))
    (ours, target), (other, _) = make(bias), make(bias)
    got = call(adapter.ChunkedLogProbFunction, ours, target, outputs=outputs, **transform)
    want = call(theirs, other, target, outputs=outputs, **transform)
    assert got[4][0] and len(got) == len(want) == 5
    for name, mine, theirs_value in zip(NAMES, got, want, strict=True):
        assert (mine is None) == (theirs_value is None), name
        if mine is not None:
            assert_close(mine, theirs_value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
            assert mine.requires_grad == theirs_value.requires_grad, name
    upstream = torch.linspace(-2, 3, N)
    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, -0.3)):
        loss, expected = (
            sum(w * (value * upstream).sum() for w, value in zip(weights, values[:2], strict=True))
            for values in (got, want)
        )
        for mine, theirs_value in zip(
            torch.autograd.grad(loss, ours, retain_graph=True),
            torch.autograd.grad(expected, other, retain_graph=True),
            strict=True,
        ):
            assert_close(mine, theirs_value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES[1:])
def test_only_what_is_asked_for_is_returned(theirs, name):
    tensors, target = make()
    got, want = (
        call(function, tensors, target, temperature=1.0, outputs=("log_probs", name))
        for function in (adapter.ChunkedLogProbFunction, theirs)
    )
    assert [value is None for value in got] == [value is None for value in want]


def test_no_token_gives_a_zero_with_a_gradient(theirs):
    tensors, target = make()
    for function in (adapter.ChunkedLogProbFunction, theirs):
        hidden = tensors[0].detach()[:0].requires_grad_()
        out = call(function, [hidden, *tensors[1:]], target[:0], temperature=1.0)
        grads = torch.autograd.grad(out[0].sum(), [hidden, *tensors[1:]])
        assert out[0].shape == (0,) and all((grad == 0).all() for grad in grads)


def test_a_head_in_half_precision_under_float32_states(theirs):
    """cast_lm_head_to_fp32 of TRL gives such inputs. The gradient of the weight is rounded once."""
    (hidden, weight), target = make(bias=False)
    half = weight.detach().bfloat16().requires_grad_()
    got, want = (
        call(function, [hidden, half], target, temperature=0.9) for function in (adapter.ChunkedLogProbFunction, theirs)
    )
    assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    mine, other = (torch.autograd.grad(out[0].sum(), (hidden, half)) for out in (got, want))
    assert_close(mine[0], other[0], rtol=1e-4, atol=1e-5)
    assert mine[1].dtype == torch.bfloat16
    assert_close(mine[1], other[1])


@pytest.mark.cpu("its models are loaded on a CPU")
def test_a_model_with_trl_s_fused_head_trains_the_same(theirs, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    utils = pytest.importorskip("trl.trainer.utils", reason="needs trl")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    utils.add_fused_lm_head(model, temperature=0.8, outputs=NAMES)
    labels = torch.randint(V, (2, 7))
    tokens, labels[:, :3] = labels.clone(), -100
    results = []
    for function in (theirs, adapter.ChunkedLogProbFunction):
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", function)
        model.zero_grad()
        out = model(tokens, labels=labels, fused_lm_head=True)
        (out.loss - 0.1 * out.entropy.mean()).backward()
        results.append((out, [p.grad.clone() for p in model.parameters()]))
    (want, other), (got, mine) = results
    for name in ("loss", *NAMES):
        assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5)
    assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"outputs": ("entropy", "perplexity")}, "outputs must be among .*; got perplexity"),
        ({"outputs": ("mean_logits",), "final_logit_softcapping": 3.0}, "mean_logits must not be among the outputs"),
    ],
)
def test_what_trl_has_and_we_have_not_raises(keywords, message):
    with pytest.raises((NotImplementedError, ValueError), match=message):
        call(adapter.ChunkedLogProbFunction, *make(), temperature=1.0, **keywords)


def test_a_weight_of_zero_3_is_refused():
    tensors, target = make()
    tensors[1].ds_id = 0
    with pytest.raises(NotImplementedError, match="must not be sharded by DeepSpeed's ZeRO-3"):
        call(adapter.ChunkedLogProbFunction, tensors, target, temperature=1.0)


def test_a_target_out_of_range_is_refused():
    if torch.get_default_device().type != "cpu":
        pytest.skip("on a GPU the values are NaN instead")
    tensors, target = make()
    target[0] = -100
    with pytest.raises(IndexError, match="-100"):
        call(adapter.ChunkedLogProbFunction, tensors, target, temperature=1.0)
