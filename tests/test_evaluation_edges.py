# SPDX-License-Identifier: Apache-2.0
"""Bytes of tokens, intervals, and what an evaluation refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import evaluation_cases as cases
import pytest
import torch
from evaluation_cases import CTX, TEXT, run

from fused_ppl.evaluation import CONVENTIONS, Document, EvaluationError, HiddenModel, TokenRow, evaluate, load
from fused_ppl.evaluation.tokens import tokenize

LN2 = math.log(2)

# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "bos"])
@pytest.mark.parametrize(
    "text",
    [TEXT, "a", "😀", "é", "e\u0301\u0327", "漢", " x ", "\n\n\t", "\u2028\ufeff", "<s>a</s>", "a\u0000b"],
    ids=lambda value: repr(value[:12]),
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
        ({"ctx": 129}, "as many tokens as the model takes, 128; .* it has 129"),
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
    with pytest.raises(EvaluationError, match=r"as many tokens as the model takes, 64; .* it has 80"):
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


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "name", "gguf", "message"),
    [
        ("a.gguf", "a.gguf", None, r"this is a file\. Give --model .* --gguf a\.gguf\."),
        ("a.txt", "a.txt", None, r"this is a file\. Give the folder of a model\."),
        ("a.gguf", "", None, r"has no config\.json\. It holds a\.gguf: add --gguf a\.gguf\."),
        ("a.gguf", "", "b.gguf", r"holds no GGUF file 'b\.gguf'\. It holds a\.gguf\."),
        ("a.txt", "", None, r"has no config\.json\. Give the folder"),
    ],
)
def test_a_path_without_a_model_is_told_the_way(held, name, gguf, message, tmp_path):
    pytest.importorskip("transformers", reason="models are loaded by transformers")
    (tmp_path / held).write_text("?")
    with pytest.raises(EvaluationError, match=message):
        load(str(tmp_path / name), gguf=gguf)
