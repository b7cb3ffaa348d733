# SPDX-License-Identifier: Apache-2.0
"""Tiny models and tokenizers of transformers, and texts, for the tests of fused_ppl.evaluation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

for package in ("transformers", "jinja2"):  # a test module that imports this one is skipped without them
    pytest.importorskip(package, reason='the evaluation needs pip install -e ".[eval]"')

TEXT = (
    "The committee shall publish its report within thirty days of the meeting. Any member may add a dissenting view.\n"
    "Größe, naïve, 漢字かな交じり文、Привет! 😀👩‍👩‍👧 e\u0301\u0327"
    " \u202bשלום\u202c\n\n\tdef f(x):\n\t\treturn x**2  # ²\n"
) * 6
TRAINING = (TEXT, "the quick brown fox jumps over the lazy dog " * 8, "import os, sys\nclass A(object): pass\n" * 8)
WORDS = 400  # of each vocabulary
CTX, STRIDE = 32, 12


@functools.cache
def tokenizer(kind: str = "byte-level") -> Any:
    """A fast tokenizer: "byte-level" as GPT-2, "byte-fallback" as Llama, "bos" adds one, "words" drops spaces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>"] if kind != "words" else ["[UNK]"]
    if kind == "byte-fallback":
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token=None, fuse_unk=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        trainer: Any = trainers.BpeTrainer(
            vocab_size=WORDS, special_tokens=special + [f"<0x{b:02X}>" for b in range(256)], limit_alphabet=60
        )
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    elif kind == "words":
        backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=WORDS, special_tokens=special)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=WORDS, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    backend.train_from_iterator(TRAINING, trainer)
    if kind == "bos":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>"} if kind != "words" else {"unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


@functools.cache
def model(num_classes: int = 512, seed: int = 0) -> Any:
    """A Llama of two layers with random weights, whose predictions are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=num_classes,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(20)
    return made


def run(convention: str = "strided", texts: Any = (TEXT,), *, kind: str = "byte-level", **keywords: Any) -> Any:
    """`evaluate` of the tiny model in small windows."""
    from fused_ppl.evaluation import evaluate

    keywords = {"ctx": CTX, "stride": STRIDE, **keywords}
    return evaluate(model(), tokenizer(kind), texts, convention=convention, **keywords)
