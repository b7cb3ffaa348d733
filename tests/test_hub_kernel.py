# SPDX-License-Identifier: Apache-2.0
"""The kernel for the Hugging Face Hub keeps the Hub's rules, and computes where fused_ppl is not installed."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_cases
import pytest
import torch
from hub_cases import CASES, NAMES, head, layer, load, value_and_gradients

import fused_ppl
from fused_ppl.testing import assert_as_good_as_eager

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cpu", "cuda", "metal", "rocm", "xpu")
LOADERS = ("path", "kernels")


def run(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "kernel"
    done = run(ROOT / "hub/build.py", "--out", out, "--repo-id", "someone/fused-ppl", cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def variant(built: Path) -> Path:
    return built / "build/torch-cpu"


@pytest.fixture(scope="module")
def kernel(variant: Path):
    """Beside the installed package, in this process."""
    return load(variant)


@pytest.fixture
def rewrite(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "hub")
    import rewrite

    return rewrite


def python_files(folder: Path) -> dict[str, ast.Module]:
    found = {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*.py")}
    return {name: ast.parse(text, filename=name, feature_version=(3, 9)) for name, text in found.items()}


def test_the_folder_is_a_kernel_repository(built: Path):
    files = "build.toml flake.nix CARD.md LICENSE example.py tests/test_fused_ppl.py benchmarks/benchmark.py"
    assert [f for f in files.split() if not (built / f).is_file()] == []
    assert sorted(p.name for p in (built / "build").iterdir()) == [f"torch-{b}" for b in BACKENDS]
    build_toml = (built / "build.toml").read_text()
    assert "edition = 5" in build_toml and "[torch-noarch]" in build_toml and 'repo-id = "someone/' in build_toml
    assert not [p for p in built.rglob("*") if p.is_file() and "@REPO_ID@" in p.read_text(encoding="utf-8")]
    source = {
        p.relative_to(built / "torch-ext/fused_ppl").as_posix() for p in built.glob("torch-ext/fused_ppl/**/*.py")
    }
    for backend in BACKENDS:
        folder = built / f"build/torch-{backend}"
        assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.py")} == source | {"fused_ppl/__init__.py"}


def test_imports_are_relative_or_of_torch_triton_and_the_standard_library(built: Path):
    for name, tree in python_files(built / "torch-ext/fused_ppl").items():
        for node in ast.walk(tree):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= name.count("/") + 1, f"{name}:{node.lineno} leaves the package"
                imported = [] if node.level else [node.module]
            foreign = {i.split(".")[0] for i in imported} - sys.stdlib_module_names - {"torch", "triton"}
            assert not foreign, f"{name}:{node.lineno}"


def test_no_code_names_another_copy(built: Path):
    for name, tree in python_files(built / "torch-ext/fused_ppl").items():
        for node in ast.walk(tree):
            assert "fused_ppl" not in (getattr(node, "id", None), getattr(node, "attr", None)), f"{name}:{node.lineno}"
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            assert text != "fused_ppl" and "fused_ppl::" not in text, f"{name}:{node.lineno}"


def test_command_line_and_evaluation_stay_behind(built: Path):
    folders = {p.name for p in (built / "torch-ext/fused_ppl").iterdir() if p.is_dir()}
    assert folders == {"backends", "engines", "integrations", "kernels"}
    assert sorted(p.name for p in built.glob("torch-ext/fused_ppl/integrations/*.py")) == ["__init__.py", "liger.py"]
    assert {p.name for p in built.glob("torch-ext/fused_ppl/kernels/*")} == {p.name for p in ROOT.glob("kernels/*.py")}


def test_metadata_names_each_variant_and_every_file(built: Path):
    ids = set()
    for backend in BACKENDS:
        folder = built / f"build/torch-{backend}"
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["name"] == "fused-ppl" and metadata["version"] == 0
        ids.add(metadata["id"])
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*.py")}
        digests = {n: base64.b64encode(hashlib.sha256(p.read_bytes()).digest()).decode() for n, p in files.items()}
        assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
    assert len(ids) == len(BACKENDS) and all(i.isidentifier() and i.startswith("_fused_ppl_") for i in ids)


def test_another_source_has_another_id(built: Path, tmp_path: Path):
    """From a copy of the repository without the symbolic link, as an unpacked archive."""
    for folder in ("fused_ppl", "kernels", "hub"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignored)
    (tmp_path / "fused_ppl/kernels").unlink()
    shutil.copy(ROOT / "LICENSE", tmp_path)
    ids = []
    for text in ("", "# changed\n"):
        (tmp_path / "fused_ppl/targets.py").write_text((ROOT / "fused_ppl/targets.py").read_text() + text)
        done = run(tmp_path / "hub/build.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        ids.append(json.loads((tmp_path / "runs/hub/build/torch-cpu/metadata.json").read_text())["id"])
    here = json.loads((built / "build/torch-cpu/metadata.json").read_text())["id"]
    assert ids[0] == here and ids[1] != here


def test_the_build_replaces_its_own_folder_and_no_other(tmp_path: Path):
    assert run(ROOT / "hub/build.py", "--out", tmp_path / "new", cwd=tmp_path).returncode == 0
    stale = tmp_path / "new/torch-ext/fused_ppl/stale.py"
    stale.touch()
    assert run(ROOT / "hub/build.py", "--out", tmp_path / "new", cwd=tmp_path).returncode == 0
    assert not stale.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    done = run(ROOT / "hub/build.py", "--out", tmp_path / "mine", cwd=tmp_path)
    assert done.returncode != 0 and "did not write" in done.stderr and (tmp_path / "mine/notes.txt").exists()


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("plan", "from fused_ppl import checks", "from . import checks"),
        ("plan", "from fused_ppl.spec import (\n    known,\n)", "from .spec import (\n    known,\n)"),
        ("engines.head", "def f():\n    from fused_ppl.plan import a as b", "def f():\n    from ..plan import a as b"),
        ("engines.head", "if TYPE_CHECKING:\n    from fused_ppl import x", "if TYPE_CHECKING:\n    from .. import x"),
        ("engines.head", "import torch\nfrom torch import Tensor", "import torch\nfrom torch import Tensor"),
    ],
)  # fmt: skip
def test_an_import_becomes_relative(rewrite, name: str, line: str, expected: str):
    assert rewrite.relative(rewrite.Module(name, False, line)).text == expected


def test_a_package_imports_from_itself(rewrite):
    package = rewrite.relative(rewrite.Module("backends", True, "from fused_ppl import checks"))
    assert package.text == "from .. import checks"
    top = rewrite.relative(rewrite.Module("", True, "from fused_ppl.spec import Options"))
    assert top.text == "from .spec import Options" and "spec" in set(rewrite.imported(top))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import fused_ppl.plan", "plan, line 1: `import fused_ppl.plan` has no relative form"),
        ("x = 1\nfrom fused_ppl \\\n    import checks", "plan, line 2: write the import as one line"),
        (
            "import importlib\nimportlib.import_module(name)",
            "plan, line 2: import_module must be given a relative name",
        ),
    ],
)
def test_what_cannot_be_rewritten_ends_the_build(rewrite, text: str, message: str):
    with pytest.raises(rewrite.CannotShip) as caught:
        list(rewrite.imported(rewrite.relative(rewrite.Module("plan", False, text))))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import numpy", "plan, line 1: a Hub kernel imports the standard library, torch, triton and itself, but not"),
        ("def f():\n    from fused_ppl.spec import x", "but not fused_ppl.spec"),
        ("from .. import x", "the import leaves the package"),
        ('L = torch.library.Library("fused_ppl", "DEF")', "'fused_ppl' names another copy"),
        ('f(f"fused_ppl::{name}")', "'fused_ppl::' names another copy"),
        ("torch.ops.fused_ppl.loss(x)", "fused_ppl is another copy"),
        ("match x:\n    case 1:\n        pass", "this is no syntax of Python 3.9"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_named(rewrite, text: str, message: str):
    assert [message in problem for problem in rewrite.broken_rules(rewrite.Module("plan", False, text))] == [True]


def test_prose_may_name_the_package(rewrite):
    text = '"""fused_ppl.plan"""\nraise ValueError("fused_ppl computes. fused_ppl/kernels is missing")'
    assert rewrite.broken_rules(rewrite.Module("plan", False, text)) == []


@pytest.fixture(scope="module")
def results(variant: Path, tmp_path_factory: pytest.TempPathFactory):
    """What another process found, by loader; each runs once."""
    found = {}

    def of(loader: str) -> dict[str, list[torch.Tensor]]:
        if loader == "kernels" and not importlib_has_kernels():
            pytest.skip("needs the package kernels (pip install kernels)")
        if loader not in found:
            out = tmp_path_factory.mktemp(loader) / "results.pt"
            done = run(hub_cases.__file__, loader, variant, out, cwd=out.parent)
            assert done.returncode == 0, done.stderr
            found[loader] = torch.load(out)
        return found[loader]

    return of


def importlib_has_kernels() -> bool:
    """Whether the package is installed; a bare import might find our folder of that name."""
    try:
        return bool(importlib.metadata.version("kernels"))
    except importlib.metadata.PackageNotFoundError:
        return False


def assert_as_in_plain_pytorch(found: list[torch.Tensor], name: str) -> None:
    plain = CASES[name][1]
    narrow, wide = head(), head(torch.float64)
    eager, truth = value_and_gradients(plain(narrow), narrow), value_and_gradients(plain(wide), wide)
    condition = float(truth[0].log()) if "perplexity" in name else 1.0
    for part, actual, close, true in zip(("value", *NAMES), found, eager, truth, strict=True):
        assert_as_good_as_eager(actual, close, true, f"{name}, {part}", condition=condition)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", CASES)
def test_where_fused_ppl_is_not_installed(results, name: str, loader: str):
    assert_as_in_plain_pytorch(results(loader)[name], name)


def test_kernels_puts_the_layer_into_a_model(results):
    """`kernels` compares the signatures, and refuses a layer that has state."""
    assert_as_in_plain_pytorch(results("kernels")["layer in a model"], "layer")


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("layer")])
def test_beside_the_installed_package_the_bits_are_the_same(kernel, name: str):
    found = []
    for package in (fused_ppl, kernel):
        h = head()
        found.append(value_and_gradients(CASES[name][0](package, h), h))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_every_public_name_is_there_and_is_another_object(kernel):
    assert set(kernel.__all__) == {*fused_ppl.__all__, "layers"}
    assert all(getattr(kernel, name) is not getattr(fused_ppl, name) for name in fused_ppl.__all__)


def test_two_versions_live_in_one_process(kernel, variant: Path):
    other = load(variant, "_fused_ppl_cpu_other")
    logits, target = head().logits().detach().flatten(0, 1), head().labels.flatten()
    with torch.profiler.profile() as profile:
        assert torch.equal(*[k.cross_entropy(logits, target) for k in (kernel, other)])
    ops = {event.name.split("::")[0] for event in profile.events()}
    assert {kernel.__name__, other.__name__} <= ops and "fused_ppl" not in ops


def test_an_older_kernels_finds_a_folder_of_the_kernels_name(variant: Path):
    found = load(variant / "fused_ppl", "fused_ppl_of_an_older_kernels")
    assert found.__all__ == load(variant, "_fused_ppl_cpu_flat").__all__
    assert found.cross_entropy.__module__ == "fused_ppl_of_an_older_kernels_flat.functional"


def test_the_layer_has_neither_state_nor_constructor(kernel):
    found = kernel.layers.LigerForCausalLMLoss
    assert set(dir(found)) - set(dir(torch.nn.Module)) <= {"has_backward", "can_torch_compile"}
    assert found.__init__ is torch.nn.Module.__init__ and found.has_backward and found.can_torch_compile
    assert kernel.layers.LigerForCausalLMLossLayer is found  # the name that transformers asks for


def test_the_layer_compiles_without_a_graph_break(kernel):
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, n: layer(kernel, h, num_items_in_batch=n), fullgraph=True, backend="eager")
    for count in (None, torch.tensor(31)):
        h, eager = head(), head()
        expected = value_and_gradients(layer(kernel, eager, num_items_in_batch=count), eager)
        found = value_and_gradients(compiled(h, count), h)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_mean_over_no_token_is_0_as_in_liger(kernel):
    h = head()
    loss, *gradients = value_and_gradients(layer(kernel, h._replace(labels=torch.full_like(h.labels, -100))), h)
    assert loss == 0 and not any(g.any() for g in gradients)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"hidden_states": None}, ValueError, "got no hidden_states"),
        ({"lm_head_weight": None}, ValueError, "got no lm_head_weight"),
        ({"hidden_size": None}, ValueError, "got no hidden_size"),
        ({"labels": None}, ValueError, "labels or shift_labels is required"),
        ({"return_token_accuracy": True}, NotImplementedError, "return_token_accuracy must be False"),
        ({"use_token_scaling": True}, NotImplementedError, "use_token_scaling must be False"),
    ],
)
def test_what_the_layer_refuses(kernel, keywords: dict, error: type[Exception], message: str):
    h = head()
    given = {"labels": h.labels, "hidden_states": h.hidden, "lm_head_weight": h.weight, "hidden_size": hub_cases.D}
    with pytest.raises(error, match=message):
        kernel.layers.LigerForCausalLMLoss()(logits=None, vocab_size=None, **{**given, **keywords})
