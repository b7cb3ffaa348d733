# SPDX-License-Identifier: Apache-2.0
"""A small GPT. Most of its time and memory go into the head over the vocabulary, which is what fused_ppl computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a two-layer perceptron, each with a residual connection and pre-norm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.project = nn.Linear(dim, dim, bias=False)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self,
        x: Tensor,  # (B, T, D)
    ) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """Decoder-only transformer with learned positions. The head shares its weight with the embedding (tied weights)."""

    def __init__(self, vocab_size: int, *, context: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.apply(_initialise)

    def forward(
        self,
        tokens: Tensor,  # (B, T)
        targets: Tensor,  # (B, T)
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return the loss. It is computed inside forward, because DDP and FSDP prepare the weights there."""
        return loss(self.hidden(tokens), self.embedding.weight, targets)

    def hidden(
        self,
        tokens: Tensor,  # (B, T)
    ) -> Tensor:
        """Return the hidden states, (B, T, D). Entry t depends on tokens 0 to t and predicts token t + 1."""
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        # the head needs small weights, but the blocks need inputs of unit size; without the factor, learning is slower
        embedded = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        return self.norm(self.blocks(embedded + self.position(positions)))


def _initialise(module: nn.Module) -> None:
    """Set small weights, so that the first prediction is nearly uniform and the first perplexity is about V."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
