# SPDX-License-Identifier: Apache-2.0
"""What each rank of test_hf_distributed.py runs: `python hf_ranks.py RANK WORLD PORT FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from fused_ppl.integrations.huggingface import PerplexityTrainerMixin, patch

V, RATE = 98, 5e-4
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, V, (4, 9), generator=GENERATOR)
LABELS = IDS.clone()
LABELS[0, :6] = -100  # the ranks count different numbers of tokens
ITEMS = int(LABELS[:, 1:].ne(-100).sum())


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: Any, rows: slice, factor: float = 1.0) -> tuple[float, dict[str, Tensor]]:
    """This rank's part of the loss, and the gradients that all ranks have afterwards."""
    out = model(input_ids=IDS[rows], labels=LABELS[rows], num_items_in_batch=torch.tensor(ITEMS))
    (out.loss * factor).backward()
    inner = getattr(model, "module", model)
    return out.loss.item(), {n: whole(p.grad).clone() for n, p in inner.named_parameters()}


def compare(name: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys(), name
    return max(float((got[n] - want[n]).norm() / want[n].norm()) for n in want)


def shard_root(model: Any, mesh: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_head_alone(model: Any, mesh: Any) -> None:
    fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
    shard_root(model, mesh)


def shard_norm_and_head(model: Any, mesh: Any) -> None:
    fully_shard([model.model.norm, model.lm_head], mesh=mesh)
    shard_root(model, mesh)


def sharded(shard: Callable[[Any, Any], None], mesh: Any, patch_first: bool) -> Any:
    model = llama()
    if patch_first:
        patch(model)
    shard(model, mesh)
    return model if patch_first else patch(model)


def tensor_parallel(folder: Path, rank: int) -> Any:
    """The head's weight is a shard of the vocabulary, and its forward is replaced on the instance."""
    if rank == 0:
        llama().save_pretrained(folder / "saved")
    dist.barrier()
    config = DistributedConfig(tp_size=dist.get_world_size())
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "saved", distributed_config=config).train()
    assert "forward" in vars(model.lm_head) and hasattr(model.lm_head.weight, "placements")
    return patch(model)


class InOrder(PerplexityTrainerMixin, transformers.Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trained(folder: str) -> tuple[Tensor, list[float]]:
    """Two steps of two micro-batches on each of two ranks, on perplexity."""
    rows = [{"input_ids": i, "labels": y} for i, y in zip(IDS.repeat(2, 1), LABELS.repeat(2, 1), strict=True)]
    args = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2, optim="sgd",
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", ddp_backend="gloo",
    )  # fmt: skip
    trainer = InOrder(model=patch(llama(), "perplexity"), args=args, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return weights, [line["perplexity"] for line in trainer.state.log_history if "perplexity" in line]


def by_hand() -> tuple[Tensor, list[float]]:
    model, perplexities = llama(), []
    parameters = list(model.parameters())
    for _ in range(2):
        perplexity = model(input_ids=IDS, labels=LABELS).loss.exp()
        grads = torch.autograd.grad(perplexity, parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter -= RATE * grad
        perplexities.append(perplexity.item())
    return torch.cat([p.detach().flatten() for p in parameters]), perplexities


def main(rank: int, world: int, folder: Path) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (world,))
    rows = slice(rank * 4 // world, (rank + 1) * 4 // world)
    loss, want = gradients(llama(), slice(None))
    results = {}
    model = DistributedDataParallel(patch(llama()))
    part, got = gradients(model, rows, world)
    results["ddp"] = compare("ddp", got, want)
    total = torch.tensor(part)
    dist.all_reduce(total)
    results["sum of the losses"] = abs(total.item() - loss)
    for shard in (shard_root, shard_head_alone, shard_norm_and_head):
        for patch_first in (True, False):
            model = sharded(shard, mesh, patch_first)
            name = f"{shard.__name__}, patched {'before' if patch_first else 'after'}"
            assert model(input_ids=IDS[rows], labels=LABELS[rows]).logits is None
            model.zero_grad()
            results[name] = compare(name, gradients(model, rows, world)[1], want)
    model = tensor_parallel(folder, rank)
    assert model(input_ids=IDS, labels=LABELS).logits is None
    model.zero_grad()
    results["tensor parallel"] = compare("tensor parallel", gradients(model, slice(None))[1], want)
    weights, perplexities = trained(str(folder))
    want_weights, want_perplexities = by_hand()
    results["Trainer: weights"] = float((weights - want_weights).abs().max())
    results["Trainer: perplexity"] = max(abs(a / b - 1) for a, b in zip(perplexities, want_perplexities, strict=True))
    return results


if __name__ == "__main__":
    rank_, world_, port = (int(a) for a in sys.argv[1:4])
    os.environ |= {"RANK": str(rank_), "LOCAL_RANK": str(rank_), "WORLD_SIZE": str(world_)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = main(rank_, world_, Path(sys.argv[4]))
    if rank_ == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
