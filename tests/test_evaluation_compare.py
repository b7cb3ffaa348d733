# SPDX-License-Identifier: Apache-2.0
"""Two models on one text, beside full logits of both in float64."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import evaluation_cases as cases
import numpy as np
import pytest
import torch
from evaluation_cases import TEXT

from fused_ppl import Options
from fused_ppl.cli import main
from fused_ppl.evaluation import Comparison, EvaluationError, HiddenModel, compare, evaluate

CTX = 32


@pytest.fixture(scope="module")
def tuned() -> Any:
    """The tiny model with a changed head and a changed body."""
    made = copy.deepcopy(cases.model())
    torch.manual_seed(1)
    with torch.no_grad():
        made.lm_head.weight.add_(0.3 * torch.randn_like(made.lm_head.weight))
        made.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    return made


def of(model: Any, base: Any, texts: Any = (TEXT,), **keywords: Any) -> Comparison:
    return compare(model, base, cases.tokenizer(), texts, **{"ctx": CTX, "stride": CTX, **keywords})


@torch.no_grad()
def logits_of(model: Any, text: str = TEXT) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and targets of disjoint windows that share one token: stride = ctx without BOS."""
    ids = cases.tokenizer()(text, add_special_tokens=False)["input_ids"]
    wide, parts, targets = copy.deepcopy(model).double(), [], []
    first = 1
    while first < len(ids):
        stop = min(first + CTX, len(ids))
        window = ids[max(0, stop - 1 - CTX) : stop]
        logp = wide(torch.tensor([window[:-1]])).logits[0].log_softmax(-1)
        parts.append(logp[-(stop - first) :])
        targets += ids[first:stop]
        first = stop
    return torch.cat(parts), torch.tensor(targets)


def test_every_quantity_is_that_of_full_logits(tuned):
    found = of(tuned, cases.model())
    (logp, target), (logq, _) = logits_of(tuned), logits_of(cases.model())
    rows = torch.arange(len(target))
    kl = (logq.exp() * (logq - logp)).sum(1)
    p, q = logp[rows, target], logq[rows, target]
    change = p.exp() - q.exp()
    assert found.tokens == len(target)
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.perplexity == pytest.approx((-p.mean()).exp().item(), rel=1e-5)
    assert found.base_perplexity == pytest.approx((-q.mean()).exp().item(), rel=1e-5)
    assert found.log_ratio == pytest.approx((q - p).mean().item(), rel=1e-4, abs=1e-6)
    assert found.correlation == pytest.approx(np.corrcoef(p, q)[0, 1], rel=1e-5)
    assert found.same_top == pytest.approx((logp.argmax(1) == logq.argmax(1)).double().mean().item())
    assert found.change == pytest.approx(change.mean().item(), rel=1e-4, abs=1e-8)
    assert found.change_rms == pytest.approx(change.square().mean().sqrt().item(), rel=1e-4)
    for percent in (0, 5, 50, 99.9, 100):
        assert found.kl_percentiles[percent] == pytest.approx(np.percentile(kl, percent), rel=1e-4, abs=1e-6)
        assert found.change_percentiles[percent] == pytest.approx(np.percentile(change, percent), rel=1e-3, abs=1e-7)
    assert found.bits_per_byte == pytest.approx(-p.sum().item() / math.log(2) / found.num_bytes, rel=1e-5)
    assert found.kl_interval[0] < found.kl < found.kl_interval[1]
    assert found.log_ratio_interval[0] < found.log_ratio < found.log_ratio_interval[1]


def test_the_tokens_that_differ_most(tuned):
    found = of(tuned, cases.model(), most_different=7)
    (logp, target), (logq, _) = logits_of(tuned), logits_of(cases.model())
    kl = (logq.exp() * (logq - logp)).sum(1)
    top = kl.topk(7)
    assert [d.position - 1 for d in found.most_different] == top.indices.tolist()
    assert [d.kl for d in found.most_different] == pytest.approx(top.values.tolist(), rel=1e-4)
    for d in found.most_different:
        i = d.position - 1
        assert d.probability == pytest.approx(logp[i, target[i]].exp().item(), rel=1e-3)
        assert d.base_probability == pytest.approx(logq[i, target[i]].exp().item(), rel=1e-3)
        assert d.before in TEXT


def test_equal_models_do_not_differ_at_all():
    found = of(cases.model(), copy.deepcopy(cases.model()))
    assert (found.kl, found.log_ratio, found.change, found.same_top) == (0, 0, 0, 1)
    assert found.kl_interval == (0, 0) and found.bits_per_byte_difference == 0


def test_it_has_the_perplexities_of_evaluate_and_no_order_of_batches(tuned):
    texts = [TEXT[:300], "a", TEXT]
    found = of(tuned, cases.model(), texts, stride=12)
    alone = [evaluate(m, cases.tokenizer(), texts, ctx=CTX, stride=12) for m in (tuned, cases.model())]
    assert [found.perplexity, found.base_perplexity] == pytest.approx([e.total.perplexity for e in alone], rel=1e-5)
    assert [found.bits_per_byte, found.base_bits_per_byte] == pytest.approx(
        [e.total.bits_per_byte for e in alone], rel=1e-6
    )
    assert found.num_bytes == alone[0].total.num_bytes
    assert of(tuned, cases.model(), texts, stride=12, batch_size=1).kl == pytest.approx(found.kl, rel=1e-5)


def test_two_tokenizers_have_bits_per_byte_only(tuned):
    texts = [TEXT[:400], TEXT[100:700], TEXT]
    other = cases.tokenizer("byte-fallback")
    found = compare(tuned, cases.model(), cases.tokenizer(), texts, base_tokenizer=other, ctx=CTX)
    alone = [
        evaluate(tuned, cases.tokenizer(), texts, ctx=CTX).total.bits_per_byte,
        evaluate(cases.model(), other, texts, ctx=CTX).total.bits_per_byte,
    ]
    assert [found.bits_per_byte, found.base_bits_per_byte] == pytest.approx(alone, rel=1e-6)
    assert found.kl is None and len(found.lines()) == 3
    low, high = found.bits_per_byte_difference_interval
    assert low < found.bits_per_byte_difference < high


def test_the_interval_of_two_tokenizers_is_of_the_difference():
    """Texts that are all the same have an interval without width, also beside one that has no scored token."""
    others, texts = cases.tokenizer("byte-fallback"), ["committee", "x", *["committee"] * 20]
    found = compare(cases.model(), cases.model(600, 1), cases.tokenizer(), texts, base_tokenizer=others)
    assert found.bits_per_byte_difference_interval == pytest.approx([found.bits_per_byte_difference] * 2, rel=1e-6)


def test_two_tokenizers_are_paired_by_blocks_of_one_text(tuned):
    """One text is enough for an interval, which lies around the difference also where `max_tokens` cuts the text."""
    other = cases.tokenizer("byte-fallback")
    for keywords in ({}, {"max_tokens": 400}, {"bos": "yes"}):
        found = compare(tuned, cases.model(), cases.tokenizer(), [TEXT, "a"], base_tokenizer=other, ctx=CTX, **keywords)
        low, high = found.bits_per_byte_difference_interval
        assert low < found.bits_per_byte_difference < high
    cut = TEXT[: cases.tokenizer()(TEXT, return_offsets_mapping=True)["offset_mapping"][400][0]]
    found = compare(tuned, cases.model(), cases.tokenizer(), [TEXT], base_tokenizer=other, ctx=CTX, max_tokens=400)
    assert found.base_bits_per_byte == pytest.approx(
        evaluate(cases.model(), other, [cut], ctx=CTX).total.bits_per_byte, rel=1e-6
    )
    uniform = HiddenModel(lambda tokens: torch.zeros(*tokens.shape, 1), linear_weight=torch.zeros(512, 1))
    found = compare(uniform, uniform, cases.tokenizer(), [TEXT], base_tokenizer=other, ctx=CTX, bos="yes")
    counts = [len(t(TEXT, add_special_tokens=False)["input_ids"]) for t in (cases.tokenizer(), other)]
    expected = 9 * (counts[0] - counts[1]) / len(TEXT.encode())  # 512 classes are 9 bits
    assert found.bits_per_byte_difference == pytest.approx(expected, rel=1e-6)


def test_models_in_half_precision_are_compared_beyond_it():
    """KLD of two heads in bf16 that are nearly equal, and not of the roundings of their logits."""
    torch.manual_seed(0)
    table, weight = torch.randn(512, 64).bfloat16(), torch.randn(512, 64).bfloat16()
    changed = weight + 2e-3 * torch.randn(512, 64).bfloat16() * weight.abs()
    q, base = (HiddenModel(lambda tokens: table[tokens], linear_weight=w) for w in (changed, weight))
    found = of(q, base)
    ids = torch.tensor(cases.tokenizer()(TEXT, add_special_tokens=False)["input_ids"])
    logp, logq = ((table[ids[:-1]].double() @ w.double().t()).log_softmax(-1) for w in (changed, weight))
    assert found.kl == pytest.approx((logq.exp() * (logq - logp)).sum(1).mean().item(), rel=1e-3)
    assert found.log_ratio == pytest.approx((logq - logp).gather(1, ids[1:, None]).mean().item(), rel=1e-2)


@pytest.mark.parametrize("memory_budget", [1, 100_000])
def test_few_rows_of_logits_at_once_change_nothing(memory_budget, tuned):
    few = of(tuned, cases.model(), options=Options(memory_budget=memory_budget))
    assert few.kl == pytest.approx(of(tuned, cases.model()).kl, rel=1e-6)


def test_a_scale_and_a_softcap_of_each_model_are_used():
    """Two Hidden models that have the logits of another by a scale, and a cap that is worked out by hand."""
    torch.manual_seed(0)
    table, weight, bias = torch.randn(512, 8), torch.randn(512, 8), torch.randn(512)
    q = HiddenModel(lambda t: table[t], linear_weight=weight, linear_bias=bias, logit_scale=2.0, softcap=3.0)
    base = HiddenModel(lambda t: table[t], linear_weight=2 * weight, logit_scale=0.25, softcap=None)
    found = of(q, base)
    ids = torch.tensor(cases.tokenizer()(TEXT, add_special_tokens=False)["input_ids"])
    x = table[ids[:-1]].double() @ weight.double().t()
    logp = (3 * torch.tanh(2 * (x + bias.double()) / 3)).log_softmax(-1)
    logq = (x / 2).log_softmax(-1)
    assert found.kl == pytest.approx((logq.exp() * (logq - logp)).sum(1).mean().item(), rel=1e-5)
    assert found.perplexity == pytest.approx((-logp.gather(1, ids[1:, None]).mean()).exp().item(), rel=1e-5)
    assert found.base_perplexity == pytest.approx((-logq.gather(1, ids[1:, None]).mean()).exp().item(), rel=1e-5)


def test_the_interval_of_a_difference_is_paired(tuned):
    """The text varies much more than the models differ: the interval of the ratio is far narrower than either's."""
    found = of(tuned, cases.model())
    interval = evaluate(tuned, cases.tokenizer(), [TEXT], ctx=CTX, stride=CTX).total.perplexity_interval
    alone = math.log(interval[1] / interval[0])
    assert found.log_ratio_interval[1] - found.log_ratio_interval[0] < alone


def test_bad_input_is_a_sentence():
    with pytest.raises(EvaluationError, match=r"Both models must have as many classes; .* has 512 and .* has 600"):
        of(cases.model(), cases.model(600))
    for texts in ([], [""], ["a"]):
        with pytest.raises(EvaluationError, match="No token was scored"):
            of(cases.model(), cases.model(), texts)
    broken = HiddenModel(lambda t: torch.full((*t.shape, 4), torch.nan), linear_weight=torch.ones(512, 4))
    with pytest.raises(EvaluationError, match="must give finite logits"):
        of(cases.model(), broken)
    narrow = HiddenModel(lambda t: torch.ones(*t.shape, 3), linear_weight=torch.ones(512, 4))
    with pytest.raises(EvaluationError, match=r"must be \(B, T, 4\), because its head has the shape \(512, 4\)"):
        of(narrow, cases.model())
    elsewhere = HiddenModel(lambda t: t, linear_weight=torch.ones(512, 4, device="meta"))
    with pytest.raises(EvaluationError, match="Both models must be on one device; they are on meta and"):
        of(elsewhere, cases.model())
    other = cases.tokenizer("byte-fallback")
    with pytest.raises(EvaluationError, match="No token was scored by both models"):
        compare(cases.model(), cases.model(), cases.tokenizer(), ["a"], base_tokenizer=other, ctx=CTX)


def test_the_command(tuned, tmp_path, capsys):
    for name, model in (("base", cases.model()), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
        cases.tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "a.txt").write_text(TEXT)
    command = ["compare", str(tmp_path / "tuned"), str(tmp_path / "base"), "--text", str(tmp_path / "a.txt")]
    command += ["--ctx", "32", "--stride", "32"]
    capsys.readouterr()  # what libraries printed so far
    assert main([*command, "--json"]) == 0
    said, expected = json.loads(capsys.readouterr().out), of(tuned, cases.model())
    assert said["kl"] == pytest.approx(expected.kl, rel=1e-5)
    assert main(command) == 0
    shown = capsys.readouterr().out
    for part in ("Mean KLD", "99.9% KLD", "Same top p", "Mean Δp", "Cor(ln(PPL(Q)), ln(PPL(base)))", "differ most"):
        assert part in shown
    assert main([*command[:2], "/nowhere", *command[3:]]) == 2
