# SPDX-License-Identifier: Apache-2.0
"""Losses of the Hub kernel beside plain PyTorch, and the program that computes them where fused_ppl is not installed.

python hub_cases.py path|kernels VARIANT RESULTS
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, V, D = 2, 9, 37, 16
NAMES = ("hidden", "weight", "bias")


class Head(NamedTuple):
    """Hidden states and the head over them; tokens 3 and 7 of each text are not counted."""

    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)
    labels: Tensor  # (B, T)
    class_weight: Tensor  # (V,)

    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T

    def shifted(self) -> Tensor:
        return F.pad(self.labels, (0, 1), value=-100)[:, 1:]


def head(dtype: torch.dtype = torch.float32) -> Head:
    generator = torch.Generator().manual_seed(3)
    floats = [torch.randn(shape, generator=generator).to(dtype) for shape in ((B, T, D), (V, D), (V,))]
    labels = torch.randint(V, (B, T), generator=generator)
    labels[:, 3] = labels[:, 7] = -100
    class_weight = torch.rand(V, generator=generator).to(dtype)
    return Head(*[f.requires_grad_() for f in floats], labels, class_weight)


def layer(kernel: ModuleType, h: Head, **keywords: Any) -> Tensor:
    return kernel.layers.LigerForCausalLMLoss()(
        None, h.labels, V, hidden_states=h.hidden, lm_head_weight=h.weight, hidden_size=D, **keywords
    )


def next_token_loss(h: Head, logits: Tensor, **keywords: Any) -> Tensor:
    """Token t predicts token t + 1, by slicing: the layer pads."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), h.labels[:, 1:].flatten(), **keywords)


# name -> (with the kernel, in plain PyTorch from full logits)
CASES: dict[str, tuple[Callable[[ModuleType, Head], Tensor], Callable[[Head], Tensor]]] = {
    "cross_entropy": (
        lambda k, h: k.cross_entropy(h.logits().flatten(0, 1), h.labels.flatten()),
        lambda h: F.cross_entropy(h.logits().flatten(0, 1), h.labels.flatten()),
    ),
    "cross_entropy, softcap and num_items": (
        lambda k, h: k.cross_entropy(h.logits().flatten(0, 1), h.labels.flatten(), softcap=3.0, num_items=40),
        lambda h: F.cross_entropy(3 * (h.logits().flatten(0, 1) / 3).tanh(), h.labels.flatten(), reduction="sum") / 40,
    ),
    "perplexity": (
        lambda k, h: k.perplexity(h.logits().flatten(0, 1), h.labels.flatten()),
        lambda h: F.cross_entropy(h.logits().flatten(0, 1), h.labels.flatten()).exp(),
    ),
    "linear_perplexity": (
        lambda k, h: k.linear_perplexity(h.hidden, h.weight, h.labels, linear_bias=h.bias),
        lambda h: F.cross_entropy((h.logits() + h.bias).flatten(0, 1), h.labels.flatten()).exp(),
    ),
    "layer": (layer, lambda h: next_token_loss(h, h.logits())),
    "layer, softcap and num_items": (
        lambda k, h: layer(k, h, num_items_in_batch=torch.tensor(31), final_logit_softcapping=3.0),
        lambda h: next_token_loss(h, 3 * (h.logits() / 3).tanh(), reduction="sum") / 31,
    ),
    "layer, shifted labels and options": (
        lambda k, h: layer(
            k, h._replace(labels=None), shift_labels=h.shifted(), bias=h.bias, ce_weight=h.class_weight,
            label_smoothing=0.1, num_items_in_batch=31, cu_seq_lens_q=None,
        ),
        lambda h: next_token_loss(
            h, h.logits() + h.bias, weight=h.class_weight, label_smoothing=0.1, reduction="sum"
        ) / 31,
    ),
}  # fmt: skip


def value_and_gradients(loss: Tensor, h: Head) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, (h.hidden, h.weight, h.bias), allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients]


def load(folder: Path, name: str | None = None) -> ModuleType:
    """Import a variant as `kernels` does, under the id that it has in metadata.json or under another name."""
    name = name or json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_a_model(folder: Path, h: Head) -> Tensor:
    """The loss of a model whose own layer `kernels` has replaced."""
    import kernels

    @kernels.use_kernel_forward_from_hub("ForCausalLMLoss")
    class OwnLoss(nn.Module):
        def forward(
            self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None,
            hidden_states=None, lm_head_weight=None, **kwargs,
        ):  # fmt: skip
            raise AssertionError("the layer was not replaced")

    model = nn.ModuleList([OwnLoss()])
    layers = kernels.LocalLayerRepository(folder, layer_name="LigerForCausalLMLossLayer")
    with kernels.use_kernel_mapping({"ForCausalLMLoss": {"cpu": layers}}):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        model = kernels.kernelize(model, mode=mode, device="cpu", use_fallback=kernels.KernelizeFallback.NONE)
    return model[0](None, h.labels, V, hidden_states=h.hidden, lm_head_weight=h.weight, hidden_size=D)


def main(how: str, variant: str, results: str) -> None:
    sys.modules["fused_ppl"] = None  # whoever imports it fails, also where it is installed
    folder, found = Path(variant), {}
    if how == "kernels":
        from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

        import kernels

        Build.open(folder.parent.parent)
        digest = Metadata.read_from_file(folder / "metadata.json").digest
        digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
        kernel = kernels.get_local_kernel(folder.parent.parent)
        h = head()
        found["layer in a model"] = value_and_gradients(in_a_model(folder.parent.parent, h), h)
    else:
        kernel = load(folder)
    for name, (ours, _) in CASES.items():
        h = head()
        found[name] = value_and_gradients(ours(kernel, h), h)
    torch.save(found, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
