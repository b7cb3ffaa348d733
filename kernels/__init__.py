# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of fused_ppl, installed as `fused_ppl.kernels`. Start with README.md beside this file."""
