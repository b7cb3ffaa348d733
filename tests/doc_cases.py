# SPDX-License-Identifier: Apache-2.0
"""What ranks run in test_distributed_docs.py."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import assert_close_to


def run(group: dist.ProcessGroup, blocks: Sequence[str]) -> int:
    """Runs the blocks one after another; returns how many results were compared."""
    namespace: dict[str, Any] = {}
    exec(compile(blocks[0], "block 0", "exec"), namespace)
    model = copy.deepcopy(namespace["LanguageModel"]()).double()
    logits = model.head(model.hidden(namespace["tokens"])).flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, namespace["targets"].flatten()).exp()
    want.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = 0
    for i, block in enumerate(blocks[1:], 1):
        namespace.pop("ppl", None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(block, f"block {i}", "exec"), namespace)
        if "ppl" not in namespace:
            continue
        compared += 1
        assert_close_to(namespace["ppl"], want.detach(), f"block {i}: ppl")
        if "model = " in block and ".backward()" in block:
            for name, parameter in namespace["model"].named_parameters():
                name = name.removeprefix("module.").replace("head.linear.", "head.")
                assert_close_to(parameter.grad, gradients[name], f"block {i}: {name}", 2e-6)
    return compared
