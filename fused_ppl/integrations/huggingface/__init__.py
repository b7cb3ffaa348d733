# SPDX-License-Identifier: Apache-2.0
"""`patch(model)`: a causal language model of transformers computes its loss without making its logits.

The classes of the model and of its head are swapped for subclasses (`swap.py`). The model's forward hands the targets
to the head; the head computes the loss inside its own call, where FSDP, tensor parallelism and offloading have its
weight ready, and returns one number per token in the place of the logits; `model.loss_function` picks the loss up
(`calls.py`). All else stays the model's own code. What happens to the logits after the head is found by probing
(`tail.py`), and one batch is compared with the native loss before the patch says yes (`check.py`).
"""

from fused_ppl.integrations.huggingface.patching import patch, unpatch
from fused_ppl.integrations.huggingface.trainer import PerplexityTrainerMixin

__all__ = ["PerplexityTrainerMixin", "patch", "unpatch"]
