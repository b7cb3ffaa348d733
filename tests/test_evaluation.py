# SPDX-License-Identifier: Apache-2.0
"""Perplexity under every convention, beside slow code that computes full logits in float64, one window at a time."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import evaluation_cases as cases
import pytest
import torch
from evaluation_cases import TEXT

from fused_ppl.evaluation import CONVENTIONS, Document, EvaluationError, HiddenModel, TokenRow, evaluate
from fused_ppl.evaluation.tokens import tokenize

CTX, STRIDE = 32, 12
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


def run(convention: str = "strided", texts: Any = (TEXT,), *, kind: str = "byte-level", **keywords: Any) -> Any:
    keywords = {"ctx": CTX, "stride": STRIDE, **keywords}
    return evaluate(cases.model(), cases.tokenizer(kind), texts, convention=convention, **keywords)


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


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "bos"])
@pytest.mark.parametrize(
    "text",
    [TEXT, "a", "😀", "é", "e\u0301\u0327", "漢", " x ", "\n\n\t", "\u2028\ufeff", "<s>a</s>", "a\u0000b"],
    ids=repr,
)
def test_the_bytes_of_tokens_add_up_to_the_text(text, kind):
    found = tokenize(cases.tokenizer(kind), text)
    assert found.num_bytes.sum() == len(text.encode())
    assert (found.num_bytes >= 0).all()


def test_byte_level_tokens_have_exactly_their_bytes():
    """By decoding each token to bytes through the tokenizer's own decoder, on a text of single bytes."""
    tokenizer = cases.tokenizer()
    found = tokenize(tokenizer, TEXT)
    at, data = 0, TEXT.encode()
    for i, size in zip(found.ids.tolist(), found.num_bytes.tolist(), strict=True):
        piece = data[at : at + size]
        at += size
        decoded = tokenizer.decode([i])
        assert decoded == piece.decode(errors="replace")


def with_normalizer(normalizer: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(cases.tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def test_what_a_tokenizer_changes_is_said():
    from tokenizers import normalizers

    composed = tokenize(with_normalizer(normalizers.NFC()), "cafe\u0301 x")
    assert composed.num_bytes.sum() == len("cafe\u0301 x".encode())
    assert "changes the text" in composed.warning
    for normalizer in (normalizers.Lowercase(), normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])):
        assert "changes the text" in tokenize(with_normalizer(normalizer), "Größe ABC").warning
    found = run(texts=["Größe ABC"] * 2)
    assert not any("changes" in w for w in found.warnings)
    unknown = tokenize(cases.tokenizer("words"), "漢字")
    assert "stands for any text" in unknown.warning


def test_the_hash_of_a_tokenizer_does_not_depend_on_its_use():
    from fused_ppl.evaluation.tokens import tokenizer_hash

    used = copy.deepcopy(cases.tokenizer())
    used.pad_token = "<s>"
    before = tokenizer_hash(used)
    used(["a", "bb cc dd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(used) == before != tokenizer_hash(cases.tokenizer("bos"))


def test_max_tokens_within_a_character():
    found = run("lm-eval", ["ab龍龍" * 9], max_tokens=4).total
    assert found.num_bytes == found.total_bytes


def test_a_tokenizer_that_drops_characters_is_refused_at_the_first_of_them():
    with pytest.raises(EvaluationError, match=r"after token 0 \('The'\) the tokenizer drops ' ' at byte 3"):
        tokenize(cases.tokenizer("words"), TEXT)
    with pytest.raises(EvaluationError, match="at its start the tokenizer drops '  ' at byte 0"):
        tokenize(cases.tokenizer("words"), "  The")


# --- intervals -------------------------------------------------------------------------------------------------------


def test_the_interval_is_wide_where_neighbours_are_alike():
    """Blocks of 64 tokens that are equal within: the interval is that of 40 numbers and not of 2560."""
    import numpy as np

    from fused_ppl.evaluation import statistics
    from fused_ppl.evaluation.records import Blocks

    generator = np.random.default_rng(1)
    values = generator.normal(3.0, 1.0, 40)
    blocks = Blocks()
    for value in values:
        blocks.add(np.full(64, value), np.ones(64, dtype=np.int32))
    low, high = statistics.bootstrap(blocks, blocks.tokens)
    expected = 1.96 * values.std(ddof=1) / 40**0.5 / LN2
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
    assert low < values.mean() / LN2 < high


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"convention": "best"}, "convention must be one of strided, .*; got 'best'"),
        ({"ctx": 1}, "ctx must be at least 2, .*; got 1"),
        ({"ctx": 129}, "at most what the model takes, 128; got 129"),
        ({"stride": 33}, "stride must be between 1 and the context, 32; got 33"),
        ({"stride": 0}, "stride must be between 1 and the context, 32; got 0"),
        ({"min_context": 3}, "say the same"),
        ({"bos": "perhaps"}, "bos must be one of auto, yes, no; got 'perhaps'"),
        ({"max_tokens": 1}, "max_tokens must be at least 2; got 1"),
        ({"texts": TEXT}, "texts must be several texts"),
        ({"texts": [3]}, "texts must be strings or Documents; text 0 is a int"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"texts": []}, "at least one text that is not empty"),
        ({"texts": [""]}, "at least one text that is not empty"),
        ({"texts": ["a"]}, "No token was scored: the texts have 1 tokens"),
        ({"convention": "llama.cpp", "texts": ["a b"]}, "needs at least 64 tokens for a context of 32"),
        ({"kind": "words", "bos": "yes"}, "needs a BOS token, and the tokenizer has none"),
        ({"kind": "words", "convention": "lm-eval"}, "convention lm-eval needs a BOS token"),
    ],
    ids=str,
)
def test_bad_input_is_a_sentence(keywords, message):
    with pytest.raises(EvaluationError, match=message):
        run(**{"convention": "strided", **keywords})


def test_a_model_that_sees_later_tokens_is_refused():
    from transformers import RobertaConfig, RobertaForCausalLM

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = RobertaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    with pytest.raises(EvaluationError, match="sees the tokens after a position"):
        evaluate(model, cases.tokenizer(), [TEXT], ctx=CTX)


def test_windows_do_not_exceed_what_the_model_takes():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=1, n_head=2)).eval()
    for convention in CONVENTIONS:
        assert evaluate(model, cases.tokenizer(), [TEXT], convention=convention).total.tokens
    with pytest.raises(EvaluationError, match=r"at most what the model takes, 64; ctx \+ stride / 2 is 80"):
        evaluate(model, cases.tokenizer(), [TEXT], convention="llama.cpp-strided", ctx=64)


def test_numbers_that_do_not_exist_are_not_invented():
    import json

    found = run("strided", [Document("a", "a", "short"), Document("b", TEXT, "long")], bos="no")
    assert math.isnan(found.rows[0].perplexity)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"][0]["perplexity"] is None


def test_alternatives_of_a_head_in_another_dtype_are_probabilities():
    torch.manual_seed(0)
    table, seen = torch.randn(512, 8), list[TokenRow]()
    model = HiddenModel(lambda t: table[t], linear_weight=4 * torch.randn(512, 8).bfloat16())
    evaluate(model, cases.tokenizer(), [TEXT], ctx=CTX, per_token=seen.append, alternatives=4)
    for row in seen:
        assert sum(p for _, p in row.alternatives) < 1.01
        assert row.predicted == row.alternatives[0][0] or row.alternatives[0][1] < 1.02 * row.alternatives[1][1]


def test_models_that_do_not_fit_are_refused():
    tokenizer = cases.tokenizer()
    with pytest.raises(EvaluationError, match="The model has 100 classes, and the tokenizer gives"):
        evaluate(cases.model(100), tokenizer, [TEXT], ctx=CTX)
    with pytest.raises(EvaluationError, match="must be a model of transformers, or a HiddenModel"):
        evaluate(lambda x: x, tokenizer, [TEXT])
    with pytest.raises(EvaluationError, match="tokenizer must be a fast one"):
        evaluate(cases.model(), object(), [TEXT])
    broken = copy.deepcopy(cases.model())
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(EvaluationError, match="must give finite logits; the nll of token 1 "):
        evaluate(
            HiddenModel(lambda t: torch.ones(*t.shape, 32), linear_weight=broken.lm_head.weight), tokenizer, [TEXT]
        )
    with pytest.raises(EvaluationError, match=r"hidden_states must be \(B, T, D\)"):
        evaluate(HiddenModel(lambda t: torch.ones(1, 32), linear_weight=torch.ones(512, 32)), tokenizer, [TEXT])
