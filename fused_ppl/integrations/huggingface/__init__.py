# SPDX-License-Identifier: Apache-2.0
"""`patch(model)` lets a causal language model of transformers compute its loss without storing its logits.

`patch` replaces the classes of the model and of its head by subclasses (`swap.py`). The forward of the model passes the
targets to the head, and the head computes the loss in its own forward. FSDP, tensor parallelism and offloading have the
weight of the head ready there. The head returns the loss, expanded to one number per token, instead of the logits, and
`model.loss_function` takes the loss from there (`head_calls.py`). All other code of the model runs unchanged.

`patch` measures what the model does to its logits after the head (`logit_transform.py`). It then compares the fused
loss with the native loss on one batch, and refuses the model if they differ (`check.py`).
"""

from fused_ppl.integrations.huggingface.patching import patch, unpatch
from fused_ppl.integrations.huggingface.trainer import PerplexityTrainerMixin

__all__ = ["PerplexityTrainerMixin", "patch", "unpatch"]
