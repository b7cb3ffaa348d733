# SPDX-License-Identifier: Apache-2.0
"""Everybody who computes this loss: ours, PyTorch's own ways, and the packages that are installed.

A provider makes a function of (*tensors, target) that returns the loss. One that cannot run says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import Setting, logits_of
from torch import Tensor

import fused_ppl
from fused_ppl import Options

Loss = Callable[..., Tensor]
TIGHT = 32 * 2**20  # bytes: no gradient of the weight in fp32 fits, so the head walks over the vocabulary


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Setting], Loss]
    ops: tuple[str, ...] = ("logits", "linear")
    ours: bool = False
    in_place: bool = False  # the gradient is written over the logits, which must not be a leaf
    compiled: bool = False
    half_only: bool = False  # in fp32 it is its neighbour
    devices: tuple[str, ...] = ("cpu", "cuda")
    softcap: bool = True  # knows it
    package: str | None = None  # "module distribution"

    def refusal(self, setting: Setting) -> str | None:
        """Why it has no place in a table, or None where it runs."""
        if self.package is not None and importlib.util.find_spec(self.package.split()[0]) is None:
            return f"not installed (pip install {self.package.split()[1]})"
        if setting.device not in self.devices:
            return "needs a GPU" if "cuda" in self.devices else "is for a CPU"
        if setting.case.softcap is not None and not self.softcap:
            return "has no softcap"
        return None

    def belongs(self, setting: Setting) -> bool:
        return setting.op in self.ops and not (self.half_only and setting.dtype == "fp32")


def _ours(setting: Setting, options: Options | None = None) -> Loss:
    prefix = "linear_" if setting.op == "linear" else ""
    loss = getattr(fused_ppl, prefix + setting.objective)
    return functools.partial(loss, softcap=setting.case.softcap, options=options)


def _finish(loss: Tensor, objective: str) -> Tensor:
    return loss.exp() if objective == "perplexity" else loss


def eager(setting: Setting, upcast: bool = False) -> Loss:
    op, softcap, objective = setting.op, setting.case.softcap, setting.objective

    def loss(*args: Tensor) -> Tensor:
        logits = logits_of(op, None, args[:-1])
        logits = logits_of("logits", softcap, (logits.float() if upcast else logits,))
        return _finish(F.cross_entropy(logits, args[-1]), objective)

    return loss


def _compiled(setting: Setting, upcast: bool = False) -> Loss:
    return torch.compile(eager(setting, upcast), dynamic=False)


def _torch_chunked(setting: Setting) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, t: _finish(F.linear_cross_entropy(h, w, t, options=options), setting.objective)


def _liger(setting: Setting) -> Loss:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    name = "liger_cross_entropy" if setting.op == "logits" else "liger_fused_linear_cross_entropy"
    loss, softcap = getattr(functional, name), setting.case.softcap
    return lambda *args: _finish(loss(*args, softcap=softcap), setting.objective)


def _cut(setting: Setting, impl: str) -> Loss:
    loss, softcap = importlib.import_module("cut_cross_entropy").linear_cross_entropy, setting.case.softcap
    return lambda h, w, t: _finish(loss(h, w, t, softcap=softcap, impl=impl), setting.objective)


def _quack(setting: Setting) -> Loss:
    if setting.op == "logits":
        loss = importlib.import_module("quack.cross_entropy").cross_entropy
    else:
        loss = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda *args: _finish(loss(*args), setting.objective)


def all_providers() -> list[Provider]:
    option = functools.partial
    found = [
        Provider("fused_ppl", _ours, ours=True),
        Provider(
            "fused_ppl, in place",
            option(_ours, options=Options(inplace_backward=True)),
            ("logits",),
            ours=True,
            in_place=True,
        ),
        Provider(
            f"fused_ppl, {TIGHT >> 20} MiB", option(_ours, options=Options(memory_budget=TIGHT)), ("linear",), ours=True
        ),
        Provider(
            "fused_ppl, backend torch", option(_ours, options=Options(backend="torch")), ours=True, devices=("cuda",)
        ),
        Provider("eager", eager),
        Provider("eager, fp32 logits", option(eager, upcast=True), half_only=True),
        Provider("torch.compile", _compiled, compiled=True),
        Provider("torch.compile, fp32 logits", option(_compiled, upcast=True), compiled=True, half_only=True),
        Provider("Liger", _liger, devices=("cuda",), package="liger_kernel liger-kernel"),
        Provider(
            "cut-cross-entropy",
            option(_cut, impl="cce"),
            ("linear",),
            devices=("cuda",),
            package="cut_cross_entropy cut-cross-entropy",
        ),
        Provider(
            "cut-cross-entropy, torch_compile",
            option(_cut, impl="torch_compile"),
            ("linear",),
            compiled=True,
            package="cut_cross_entropy cut-cross-entropy",
        ),
        Provider("quack", _quack, devices=("cuda",), softcap=False, package="quack quack-kernels"),
    ]
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        found.insert(8, Provider("F.linear_cross_entropy, chunked", _torch_chunked, ("linear",), softcap=False))
    return found
