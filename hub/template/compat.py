# SPDX-License-Identifier: Apache-2.0
"""The kernel in the folder above, for the versions of `kernels` that look for a folder of the kernel's name."""

import importlib.util
import sys
from pathlib import Path

# not resolved: in the cache of the Hub a file is a link to a place without its neighbours
_spec = importlib.util.spec_from_file_location(f"{__name__}_flat", Path(__file__).parent.parent / "__init__.py")
_kernel = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _kernel
_spec.loader.exec_module(_kernel)

__all__ = list(_kernel.__all__)
globals().update({name: getattr(_kernel, name) for name in __all__})
