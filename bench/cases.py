# SPDX-License-Identifier: Apache-2.0
"""What is measured: frozen cases named after the heads of real models, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

OPS = ("logits", "linear")
OBJECTIVES = ("perplexity", "cross_entropy")
KINDS = ("random", "peaked")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """The last layer of a model, and how many tokens come to it."""

    name: str
    num_tokens: int  # N
    num_classes: int  # V
    hidden_size: int  # D; the logits op does not see it
    softcap: float | None = None


# a GPU is asked the real shapes; a CPU the real vocabulary and softcap with fewer tokens and a narrower hidden state
_ALL = (
    Case("gpt2", 8192, 50257, 768),
    Case("smollm2", 8192, 49152, 576),
    Case("llama3-8b", 8192, 128256, 4096),
    Case("qwen3-8b", 8192, 151936, 4096),
    Case("gemma2-2b", 8192, 256000, 2304, softcap=30.0),
    Case("gpt2-cpu", 1024, 50257, 256),
    Case("smollm2-cpu", 1024, 49152, 192),
    Case("llama3-8b-cpu", 512, 128256, 256),
    Case("qwen3-8b-cpu", 512, 151936, 256),
    Case("gemma2-2b-cpu", 256, 256000, 256, softcap=30.0),
    Case("smoke", 256, 8192, 64),
)
CASES = {case.name: case for case in _ALL}
CPU_CASES = tuple(name for name in CASES if name == "smoke" or name.endswith("-cpu"))
GPU_CASES = tuple(name for name in CASES if name not in CPU_CASES)


@dataclass(frozen=True)
class Setting:
    """One comparison: everything but the provider."""

    op: str
    case: Case
    dtype: str
    kind: str = "random"
    objective: str = "perplexity"
    device: str = "cpu"

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def gradient_bytes(self) -> int:
        """Of one copy of the gradients; the inputs that have them take as much."""
        n, v, d = self.case.num_tokens, self.case.num_classes, self.case.hidden_size
        return (n * v if self.op == "logits" else (n + v) * d) * self.itemsize


@dataclass(frozen=True)
class Inputs:
    tensors: tuple[Tensor, ...]  # (logits,) or (hidden, weight): what gets a gradient
    target: Tensor

    def copy(self) -> Inputs:
        return Inputs(tuple(t.detach().clone().requires_grad_() for t in self.tensors), self.target)

    def first_tokens(self, n: int) -> Inputs:
        first, *rest = self.tensors
        return Inputs((first.detach()[:n].requires_grad_(), *rest), self.target[:n])


def make_inputs(setting: Setting, seed: int = 0) -> Inputs:
    """The inputs of a setting; the values do not depend on its dtype but for rounding.

    "random": logits of deviation 2 and any targets, as before training. "peaked": the target's logit stands 4 to 18
    above the others, as in a trained model: most of the probability lies on a few classes, and some tokens surprise.
    """
    case, generator = setting.case, torch.Generator().manual_seed(seed)
    n, v, d = case.num_tokens, case.num_classes, case.hidden_size
    target = torch.randint(v, (n,), generator=generator)
    above = 4 + 14 * torch.rand(n, 1, generator=generator)
    if setting.op == "logits":
        logits = torch.randn(n, v, generator=generator).mul_(2)
        if setting.kind == "peaked":
            logits.scatter_add_(1, target.unsqueeze(1), above)
        tensors = (logits,)
    else:
        hidden = torch.randn(n, d, generator=generator)
        weight = torch.randn(v, d, generator=generator).mul_(2 / d**0.5)
        if setting.kind == "peaked":
            at_target = weight[target]
            hidden += above * at_target / at_target.square().sum(1, keepdim=True)
        tensors = (hidden, weight)
    dtype = DTYPES[setting.dtype]
    return Inputs(tuple(t.to(setting.device, dtype).requires_grad_() for t in tensors), target.to(setting.device))


def logits_of(op: str, softcap: float | None, tensors: tuple[Tensor, ...]) -> Tensor:
    """In eager PyTorch, in the dtype of the tensors."""
    logits = tensors[0] if op == "logits" else F.linear(*tensors)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
