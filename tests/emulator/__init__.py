# SPDX-License-Identifier: Apache-2.0
"""An emulated GPU for tests: the kernels as Triton compiles them, launched by Triton, run on the CPU. See README.md."""

from emulator.device import Device, Fault, install, problem

__all__ = ["Device", "Fault", "install", "problem"]
