# SPDX-License-Identifier: Apache-2.0
"""Where the packages lie, and the license; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    license="Apache-2.0",  # setuptools before 77 refuses the name of a license in pyproject.toml
    # kernels/ is installed as fused_ppl.kernels. A checkout has a symlink there as well, for type checkers and for
    # running uninstalled; a source archive has none, and an installation depends on this mapping alone
    packages=sorted({*find_packages(include=["fused_ppl", "fused_ppl.*"]), "fused_ppl.kernels"}),
    package_dir={"fused_ppl.kernels": "kernels"},
)
