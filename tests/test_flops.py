# SPDX-License-Identifier: Apache-2.0
"""torch.utils.flop_counter sees the products of the fused head."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_ppl import Options, linear_cross_entropy, linear_log_probs, linear_token_loss, plan

N, V, D = 6, 11, 5
PRODUCT = 2 * N * V * D


def head(requires_grad=True):
    hidden, weight = (torch.randn(n, D, requires_grad=requires_grad) for n in (N, V))
    return hidden, weight, torch.arange(N)


def count(step, *args):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("reduction", "requires_grad", "products"), [("mean", False, 1), ("mean", True, 3), ("none", True, 4)]
)
def test_the_counter_sees_each_product(reduction, requires_grad, products, options):
    """It saw none."""

    def step(hidden, weight, target):
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, options=options)
        if requires_grad:
            loss.sum().backward()

    assert count(step, *head(requires_grad)) == products * PRODUCT


def test_log_probabilities_take_four_products(options):
    def log_probs(hidden, weight, target):
        values = linear_log_probs(hidden, weight, target, options=options)
        (values.log_prob + values.entropy).sum().backward()

    assert count(log_probs, *head()) == 4 * PRODUCT


@pytest.mark.parametrize("budget", [None, 2 * V * 4], ids=["one chunk", "chunks"])
def test_a_loss_of_tokens_takes_three(budget, backend):
    """It is no op: torch's counter sees its products one by one."""

    def token_loss(hidden, weight, target):
        how = Options(backend, memory_budget=budget)
        linear_token_loss(hidden, weight, target, lambda log_prob, entropy: entropy - log_prob, options=how).backward()

    assert count(token_loss, *head()) == 3 * PRODUCT


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_counter_sees_forward_and_backward_each_by_itself(reduction, options):
    loss = linear_cross_entropy(*head(), reduction=reduction, options=options).sum()
    assert count(loss.backward) == (0 if reduction == "mean" else 3) * PRODUCT


def test_a_frozen_head_makes_one_product_less(options):
    hidden, weight, target = head()
    weight.requires_grad_(False)
    assert count(lambda: linear_cross_entropy(hidden, weight, target, options=options).backward()) == 2 * PRODUCT


@pytest.mark.parametrize("screen", [None, "bf16"])
def test_the_compact_plan_counts_what_it_says(screen, backend):
    asked = {"gradient_columns": 4, "screen": screen}
    hidden, weight, target = head()
    counted = count(lambda: linear_cross_entropy(hidden, weight, target, options=Options(backend, **asked)).backward())
    case = plan.LinearCase(N, V, D, 4, "cpu", (True, True, False), None, plan.Compact(None, 4, screen))
    made = plan.linear_plan(case, "compact")
    assert counted == made.flops + made.cheap_flops > 0


def test_a_compiled_step_and_fake_tensors_count_as_well(options):
    torch._dynamo.reset()
    step = torch.compile(lambda *args: linear_cross_entropy(*args, options=options), backend="aot_eager")
    step(*head())
    assert count(lambda: step(*head()).backward()) == 3 * PRODUCT
    with FakeTensorMode():
        assert count(lambda *args: linear_cross_entropy(*args, options=options).backward(), *head()) == 3 * PRODUCT


SCRIPT = """
import fused_ppl, sys, torch
hidden, weight, target = torch.randn(6, 5), torch.randn(11, 5), torch.arange(6)
loss, options = fused_ppl.linear_cross_entropy, fused_ppl.Options("torch")
{before}
from torch.utils.flop_counter import FlopCounterMode
counter = FlopCounterMode(display=False)
with {mode}, counter:
    loss(hidden, weight, target, options=options)
print(counter.get_total_flops())
"""


COMPILE = "loss = torch.compile(loss, backend='aot_eager'); loss(hidden, weight, target, options=options)"


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("before", ["assert 'torch.utils.flop_counter' not in sys.modules", COMPILE])
def test_the_counter_may_be_imported_later_and_the_package_does_not_import_it(before, mode):
    """It imports triton."""
    script = SCRIPT.format(before=before, mode=f"torch.{mode}()")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, str(PRODUCT)), run.stderr
