# SPDX-License-Identifier: Apache-2.0
"""The losses that gpu_acceptance.py times beside ours: name, package, and how each is called."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_device import Skipped
from gpu_truth import TRITON, head_options
from torch import Tensor

import fused_ppl

Loss = Callable[..., Tensor]  # of the logits, or of hidden states and weight; then the target


@dataclass(frozen=True)
class Peer:
    """A cross-entropy of somebody; `package` has to be installed for it."""

    name: str
    loss: Callable[[], Loss]
    package: str | None = None  # the module and, after a space, what pip installs
    perplexity: Callable[[], Loss] | None = None  # where there is one; else exp of the cross-entropy
    seconds: float = 2.0

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("fused_ppl")

    def missing(self) -> str | None:
        if self.package is None or importlib.util.find_spec(self.package.split()[0]) is not None:
            return None
        return f"not installed (pip install {self.package.split()[1]})"

    def make(self, objective: str) -> Loss:
        if objective == "perplexity" and self.perplexity is not None:
            return self.perplexity()
        loss = self.loss()
        return loss if objective == "cross_entropy" else lambda *args: loss(*args).exp()

    @property
    def is_near(self) -> bool:
        """Whether its cross-entropy is timed beside its perplexity: ours, and that of the nearest peer."""
        return self.is_ours or self.name == "Liger"

    @property
    def compiles(self) -> bool:
        return self.name.startswith("torch.compile")

    def group(self, kind: str) -> str:
        """Those that compile for long are timed last."""
        return f"{kind}, compiled" if self.compiles else kind


def _eager(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x.float(), target)


def _eager_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def _named(module: str, name: str) -> Callable[[], Loss]:
    return lambda: getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _torch_chunked() -> Loss:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Skipped(f"torch has it from 2.13 on; this is {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options)


def logits_peers() -> list[Peer]:
    liger = ("liger_kernel.transformers.functional", "liger_cross_entropy")
    return [
        Peer(
            "fused_ppl",
            lambda: functools.partial(fused_ppl.cross_entropy, options=TRITON),
            perplexity=lambda: functools.partial(fused_ppl.perplexity, options=TRITON),
        ),
        # writes its gradient over the logits, so that the second call sees others, which take it as long
        Peer("Liger", _named(*liger), "liger_kernel liger-kernel"),
        Peer("quack", _named("quack.cross_entropy", "cross_entropy"), "quack quack-kernels", seconds=8),
        Peer("torch eager", lambda: _eager),
        Peer("torch.compile", lambda: torch.compile(_eager), seconds=15),
    ]


def head_peers() -> list[Peer]:
    liger = ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return [
        Peer(
            "fused_ppl",
            lambda: functools.partial(fused_ppl.linear_cross_entropy, options=head_options()),
            perplexity=lambda: functools.partial(fused_ppl.linear_perplexity, options=head_options()),
            seconds=3,
        ),
        Peer("Liger", _named(*liger), "liger_kernel liger-kernel", seconds=3),
        Peer(
            "cut-cross-entropy",
            _named("cut_cross_entropy", "linear_cross_entropy"),
            "cut_cross_entropy cut-cross-entropy",
            seconds=15,  # it tunes itself
        ),
        Peer(
            "quack",
            _named("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
            "quack quack-kernels",
            seconds=8,
        ),
        Peer("torch eager", lambda: _eager_head, seconds=3),
        Peer("F.linear_cross_entropy, chunked", _torch_chunked, seconds=3),
        Peer("torch.compile", lambda: torch.compile(_eager_head), seconds=20),
    ]
