# SPDX-License-Identifier: Apache-2.0
"""What is installed, and what importing it brings along."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import fused_ppl

ROOT = Path(__file__).resolve().parent.parent

# prints the top-level names that importing argv[1] adds to what torch and numpy have imported
NEW_MODULES = """
import sys, numpy, torch
before = set(sys.modules)
__import__(sys.argv[1])
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def run_python(*args: str, cwd: Path, path: Path | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def foreign_modules(module: str, cwd: Path, path: Path | None = None) -> set[str]:
    """What `import module` adds beyond itself, torch, numpy and the standard library."""
    new = set(run_python("-c", NEW_MODULES, module, cwd=cwd, path=path).split())
    return new - {module, "torch", "numpy"} - sys.stdlib_module_names


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that no stale build/ takes part."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, source)
    for folder in ("fused_ppl", "kernels", "tests", "bench", "docs", "examples"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="module")
def archive(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source archive."""
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    # -I: Hugging Face's package `kernels` has a hook in setuptools, and our folder of that name must not hide it
    run_python("-I", "-c", code, str(out), cwd=checkout)
    (packed,) = out.glob("*.tar.gz")
    with tarfile.open(packed) as files:
        assert not any(member.issym() for member in files)
        files.extractall(out, filter="data")
    (unpacked,) = (path for path in out.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module", params=["checkout", "archive"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = request.getfixturevalue(request.param), tmp_path_factory.mktemp("wheel")
    run_python(
        *("-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", str(out), str(source)),
        cwd=source,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """A folder with the unpacked wheel, which Python finds before an editable installation."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    return tmp_path / "site"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = [p for p in (ROOT / "fused_ppl").rglob("*.py") if (ROOT / "fused_ppl/kernels") not in p.parents]
    expected = {p.relative_to(ROOT).as_posix() for p in package}
    expected |= {f"fused_ppl/kernels/{p.relative_to(ROOT / 'kernels').as_posix()}" for p in ROOT.glob("kernels/*.py")}
    documents = {"fused_ppl/kernels/README.md"} if (ROOT / "kernels/README.md").exists() else set()
    assert inside == expected | documents | {"fused_ppl/py.typed", "fused_ppl/evaluation/report.html.j2"}
    assert "fused_ppl/kernels/__init__.py" in inside


def test_the_archive_has_what_its_tests_and_pages_need(archive: Path) -> None:
    for name in ("tests/conftest.py", "tests/pool.py", "bench/compare.py", "examples/lm_model.py", "docs/numerics.md"):
        assert (archive / name).exists(), name
    assert {p.name for p in archive.glob("kernels/*.py")} == {p.name for p in ROOT.glob("kernels/*.py")}


def test_the_wheel_states_one_version_and_two_requirements(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == fused_ppl.__version__
    core = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert sorted(re.match(r"\w+", r)[0] for r in core) == ["numpy", "torch"]


def test_the_wheel_works_from_anywhere(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, fused_ppl, fused_ppl.kernels as k, torch;"
        "print(fused_ppl.__file__); print(k.__file__); print(u.find_spec('kernels'));"
        "print(fused_ppl.perplexity(torch.zeros(2, 7), torch.tensor([0, 6])).item())"
    )
    package, kernels, bare, value = run_python("-c", code, cwd=tmp_path, path=installed).splitlines()
    assert Path(package) == installed / "fused_ppl" / "__init__.py"
    assert Path(kernels) == installed / "fused_ppl" / "kernels" / "__init__.py"
    # the name belongs to another package, which may be installed here
    assert bare == "None" or str(ROOT) not in bare
    assert float(value) == pytest.approx(7)


def test_the_checkout_is_importable_without_its_root_on_the_path(tmp_path: Path) -> None:
    found = run_python("-c", "import fused_ppl.kernels as k; print(k.__doc__)", cwd=tmp_path)
    assert "Triton" in found


def test_a_checkout_without_symlinks_says_so(tmp_path: Path) -> None:
    """git writes the target of a link into a file where the file system has no links, as on Windows."""
    shutil.copytree(
        ROOT / "fused_ppl",
        tmp_path / "fused_ppl",
        ignore=lambda folder, names: [n for n in names if n == "__pycache__" or Path(folder, n).is_symlink()],
    )
    (tmp_path / "fused_ppl" / "kernels").write_text("../kernels")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fused_ppl, torch; print(fused_ppl.__file__)\n"
        "x, y = torch.zeros(2, 7), torch.tensor([0, 6]); print(fused_ppl.perplexity(x, y).item())\n"
        "try: fused_ppl.perplexity(x, y, options=fused_ppl.Options(backend='triton'))\n"
        "except Exception as error: print(error)"
    )
    # -S: without the finder of an editable installation, which finds the kernels
    done = [sys.executable, "-S", "-c", code, str(tmp_path)]
    packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    ran = subprocess.run(done, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": packages}, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    package, value, message = ran.stdout.splitlines()
    assert package.startswith(str(tmp_path)) and float(value) == pytest.approx(7)
    assert "it is a symbolic link" in message and "pip install -e ." in message


def test_importing_needs_torch_and_numpy_only(tmp_path: Path) -> None:
    assert foreign_modules("fused_ppl", tmp_path) == set()


def test_a_further_requirement_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text("import pytest\n")
    assert "pytest" in foreign_modules("greedy", tmp_path, path=tmp_path)
