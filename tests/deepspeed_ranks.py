# SPDX-License-Identifier: Apache-2.0
"""Two ranks of test_deepspeed.py: a few steps of a Llama under ZeRO-3, native or patched. Prints the losses."""

from __future__ import annotations

import os
import sys

import deepspeed
import torch
import transformers

from fused_ppl.integrations.huggingface import patch

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    # 0: every parameter is sharded, also the small ones of this model
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def losses(patched: bool, tied: bool) -> list[float]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))
    if patched:
        patch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG, dist_init_required=False)
    generator = torch.Generator().manual_seed(10 + int(os.environ["RANK"]))
    found = []
    for _ in range(3):
        ids = torch.randint(0, 101, (2, 16), generator=generator)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    found = losses(patched=sys.argv[1] == "patched", tied=sys.argv[2] == "tied")
    if os.environ["RANK"] == "0":
        print("losses", *found)
