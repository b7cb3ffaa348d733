# SPDX-License-Identifier: Apache-2.0
"""The loss and the gradients of one batch, from hidden states. It needs no GPU."""

import torch

from kernels import get_kernel

fused_ppl = get_kernel("@REPO_ID@", version=0, trust_remote_code=True)

device = "cuda" if torch.cuda.is_available() else "cpu"
hidden = torch.randn(128, 64, device=device, requires_grad=True)
weight = torch.nn.Linear(64, 1000, bias=False, device=device).weight
target = torch.randint(1000, (128,), device=device)
target[::4] = -100  # ignored

perplexity = fused_ppl.linear_perplexity(hidden, weight, target)
perplexity.backward()
print(f"perplexity {perplexity.item():.1f}, gradient of the head {weight.grad.norm().item():.4f}")
