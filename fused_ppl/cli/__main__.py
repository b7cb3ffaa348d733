# SPDX-License-Identifier: Apache-2.0
"""Runs the command line as `python -m fused_ppl.cli`."""

import sys

from fused_ppl.cli import main

if __name__ == "__main__":
    sys.exit(main())
