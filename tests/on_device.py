# SPDX-License-Identifier: Apache-2.0
"""`pytest --device cuda tests`: the same tests with their tensors on a GPU, over both backends, the kernels compiled.

The tests say nothing of a device. torch's default device is the one asked for, from before the first test module is
imported, so that the constants of modules are there too; random numbers are drawn on the CPU and moved, so that a test
has the same input everywhere. `--device elsewhere` is a device for machines that have no other: tests/stand_in.py.

That fused_ppl itself does not rely on a default device is for tests/test_defaults.py to see.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import emulator
import pytest
import stand_in
import torch
from torch import Tensor

from fused_ppl.testing import make_logits, make_target

# what does not run there: modules by the beginning of their names, each with its reason
ON_THE_CPU = {
    "test_acceptance": "bench/gpu_acceptance.py is run by itself",
    "test_aot": "machine code is compiled without a GPU",
    "test_backends": "the choice of a backend is tested with devices that are not there",
    "test_bench": "the benchmarks choose their device themselves",
    "test_cli": "`fused-ppl doctor` chooses its device itself",
    "test_code_host": "it reads files of the repository",
    "test_compact_ranks": "its processes talk over gloo",
    "test_docs": "the examples show tensors of a CPU",
    "test_errors": "bad input is found before any device is asked",
    "test_examples": "the examples choose their device themselves",
    "test_finetune_hf": "the examples choose their device themselves",
    "test_hf_": "Trainer chooses its device itself",
    "test_hub_kernel": "the variant for a CPU is loaded",
    "test_huggingface": "models are loaded and patched on a CPU; bench/gpu_acceptance.py trains one",
    "test_integrations_docs": "the recipes show tensors of a CPU",
    "test_launch": "the choice of a launch needs no device",
    "test_layout": "it reads source code",
    "test_memory": "the buffers of a CPU",
    "test_on_device": "it starts processes on devices of their own",
    "test_packaging": "it builds archives",
    "test_plan": "a plan needs no device, and its bytes are measured by the profiler of the CPU",
    "test_real_model": "models are loaded and patched on a CPU; bench/gpu_acceptance.py trains one",
    "test_sanitize": "it watches Triton's interpreter",
    "test_site": "it builds pages",
    "test_studies": "the studies run on a CPU",
    "test_torchtitan": "its trainer chooses its device itself",
    "test_versions": "it compiles without a GPU",
}
RANDOM = ("rand", "randn", "randint", "randperm")

device = torch.device("cpu")
emulated: emulator.Device | None = None  # under --emulate


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors, from the start of this process."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def elsewhere() -> bool:
    """Whether the tensors are not on the CPU."""
    return device.type != "cpu"


def backends() -> list[str]:
    """Those that every test of this process runs over."""
    if interpreted() or emulated is not None:
        return ["triton"]
    return ["torch"] if device.type in ("cpu", stand_in.NAME) else ["torch", "triton"]


def emulate(asked: str) -> None:
    """From here on the kernels are compiled for a GPU that tests/emulator is: `sm_90`, or `sm_90,resident=8,seed=2`."""
    global emulated
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise pytest.UsageError("--emulate runs compiled kernels; unset TRITON_INTERPRET, which interprets them.")
    if (problem := emulator.problem()) is not None:
        pytest.exit(f"--emulate: no emulated GPU here: {problem}", returncode=0)
    target, *settings = asked.split(",")
    emulated = emulator.install(int(target.removeprefix("sm_")))
    for name, _, value in (setting.partition("=") for setting in settings):
        if not hasattr(emulated.settings, name):
            raise pytest.UsageError(f"--emulate: no setting {name}; tests/emulator/README.md lists them.")
        setattr(emulated.settings, name, int(value))
    from fused_ppl import backends
    from fused_ppl.kernels import launch

    if "sms=" in asked:
        sms = emulated.settings.sms
        launch.device_size = lambda where: launch.Device(sms)
    refusal = backends.refusal

    def refusal_but_for_the_cpu(name: str, where: torch.device, dtype: torch.dtype) -> str | None:
        runs = name == "triton" and where.type == "cpu" and dtype != torch.float64
        return None if runs else refusal(name, where, dtype)

    backends.refusal = refusal_but_for_the_cpu


def place(name: str, collect_only: bool) -> None:
    """From here on tensors are made on this device. It need not be there for tests to be collected."""
    global device
    if name == stand_in.NAME:
        stand_in.install()
    device = torch.device(name)
    if not elsewhere():
        return
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise pytest.UsageError(
            f"--device {name} runs compiled kernels; unset TRITON_INTERPRET, which interprets them."
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        if collect_only:
            return
        raise pytest.UsageError(f"--device {name}: torch {torch.__version__} sees no such device on this machine.")
    torch.set_default_device(device)
    torch.empty(0)  # torch remembers its factories at the first call, before a fixture replaces some
    for factory in RANDOM:
        setattr(torch, factory, _drawn_on_the_cpu(getattr(torch, factory)))
    for make in (make_logits, make_target):
        make.__kwdefaults__["device"] = device


def _drawn_on_the_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def draw(*args: object, requires_grad: bool = False, **keywords: object) -> Tensor:
        if keywords.get("device") is not None or keywords.get("out") is not None:
            return factory(*args, requires_grad=requires_grad, **keywords)
        drawn = factory(*args, device="cpu", **keywords)
        return drawn.to(torch.get_default_device()).requires_grad_(requires_grad)

    return draw


def leave_out(items: list[pytest.Item]) -> None:
    """Mark what has no business on the device as skipped, with the reason."""
    for item in items:
        module = item.path.stem
        reasons = [reason for prefix, reason in ON_THE_CPU.items() if module.startswith(prefix)]
        marked = item.get_closest_marker("cpu")
        if marked is not None:
            reasons.append(marked.args[0])
        if reasons:
            item.add_marker(pytest.mark.skip(reason=f"{reasons[0]}: run it without --device"))


def only_on_the_cpu(reason: str) -> None:
    """For fixtures."""
    if elsewhere():
        pytest.skip(f"{reason}: run it without --device")
