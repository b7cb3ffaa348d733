# SPDX-License-Identifier: Apache-2.0
"""Workloads for `kernels benchmark`: the loss and its gradients, against PyTorch from full logits."""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class LinearCrossEntropyBenchmark(Benchmark):
    """Forward and backward; `out` is the gradient of the hidden states."""

    seed = 0

    def _setup(self, n, v, d):
        on_gpu = torch.device(self.device).type != "cpu"
        like = {"device": self.device, "dtype": torch.bfloat16 if on_gpu else torch.float32}
        self.hidden = torch.randn(n, d, **like).requires_grad_()
        self.weight = (torch.randn(v, d, **like) / d**0.5).requires_grad_()
        self.target = torch.randint(v, (n,), device=self.device)

    def _run(self):
        loss = self.kernel.linear_cross_entropy(self.hidden, self.weight, self.target, reduction="sum")
        self.out, _ = torch.autograd.grad(loss, (self.hidden, self.weight))

    def _reference(self):
        loss = F.cross_entropy((self.hidden @ self.weight.T).float(), self.target, reduction="sum")
        return torch.autograd.grad(loss, (self.hidden, self.weight))[0]

    def setup_small(self):
        self._setup(256, 4096, 256)

    def benchmark_small(self):
        self._run()

    def verify_small(self):
        return self._reference()

    def setup_large(self):
        self._setup(4096, 32768, 1024)

    def benchmark_large(self):
        self._run()

    def verify_large(self):
        return self._reference()
