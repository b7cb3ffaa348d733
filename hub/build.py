# SPDX-License-Identifier: Apache-2.0
"""Builds the Hub kernel from the package's own source: python hub/build.py

The folder it writes is a source repository for kernel-builder and, in build/, what `kernels` loads:

    import kernels
    fused_ppl = kernels.get_local_kernel(pathlib.Path("runs/hub"))

It takes the modules that the public names and the layers need, and makes their imports relative. It writes nothing if a
module breaks a rule of Hub kernels.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from rewrite import PACKAGE, CannotShip, Module, broken_rules, imported, relative

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "hub" / "template"
COMPAT = TEMPLATE / "compat.py"  # for the versions of `kernels` that look for a folder in the variant
MARK = ".built-by-hub"  # a folder that this program may replace


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the Hub kernel from the package's own source.")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "hub", help="the folder to write (runs/hub)")
    parser.add_argument("--repo-id", default="fused-ppl/fused-ppl", help="where it will be published: OWNER/NAME")
    args = parser.parse_args()
    try:
        modules = shipped()
        replace_folder(args.out)
        write(modules, args.out, args.repo_id)
    except CannotShip as error:
        sys.exit(str(error))
    print(f"{args.out}: {len(modules)} modules, {identity(modules)}")


def shipped() -> list[Module]:
    """The modules of the kernel, ordered by name: the package itself, and whatever it imports.

    Raises:
        CannotShip: a module breaks a rule; every broken rule has its line.
    """
    available = sources()
    found: dict[str, Module] = {}
    wanted = [""]
    while wanted:
        name = wanted.pop()
        if name in found or name not in available:  # what is in no file is a name inside a module
            continue
        found[name] = relative(available[name])
        parents = name.split(".")[:-1]
        wanted += [".".join(parents[: i + 1]) for i in range(len(parents))]
        wanted += imported(found[name])
    problems = [problem for module in found.values() for problem in broken_rules(module)]
    if problems:
        raise CannotShip("\n".join(problems))
    return [found[name] for name in sorted(found)]


def sources() -> dict[str, Module]:
    """Every module that could be shipped, by name, before it is rewritten."""
    modules = {}
    for folder, prefix in ((ROOT / PACKAGE, ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            modules[name] = Module(name, is_package, path.read_text(encoding="utf-8"))
    modules["layers"] = Module("layers", False, (TEMPLATE / "layers.py").read_text(encoding="utf-8"))
    modules[""] = with_layers(modules[""])
    return modules


def with_layers(package: Module) -> Module:
    """The package's __init__, which also imports `layers` and names it in __all__."""
    tree = ast.parse(package.text)
    (public,) = (n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    last_import = max(n.end_lineno or 0 for n in tree.body if isinstance(n, ast.ImportFrom))
    names = sorted([*ast.literal_eval(public.value), "layers"])
    lines = package.text.splitlines()
    lines[public.lineno - 1 : public.end_lineno] = ["__all__ = [", *(f'    "{name}",' for name in names), "]"]
    lines.insert(last_import, f"from {PACKAGE} import layers")
    return package._replace(text="\n".join(lines) + "\n")


def identity(modules: list[Module]) -> str:
    """A name for exactly these sources. Two builds that differ may be loaded in one process."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(f"{module.name}\0{module.is_package}\0{module.text}\0".encode())
    return digest.hexdigest()[:10]


def replace_folder(out: Path) -> None:
    """An empty folder, marked as ours. What somebody else put there stays.

    Raises:
        CannotShip: the folder holds something that this program did not write.
    """
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise CannotShip(f"{out} holds files that this program did not write. Choose another --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def write(modules: list[Module], out: Path, repo_id: str) -> None:
    """The source repository, and one variant for each backend of build.toml."""
    for path in sorted(p for p in TEMPLATE.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        if path not in (COMPAT, TEMPLATE / "layers.py"):
            text = path.read_text(encoding="utf-8").replace("@REPO_ID@", repo_id)
            write_text(out / path.relative_to(TEMPLATE), text)
    shutil.copy(ROOT / "LICENSE", out)
    general = read_general(out / "build.toml")
    write_modules(modules, out / "torch-ext" / PACKAGE)
    for backend in general["backends"]:
        variant = out / "build" / f"torch-{backend}"
        write_modules(modules, variant)
        write_text(variant / PACKAGE / "__init__.py", COMPAT.read_text(encoding="utf-8"))
        metadata = {
            "name": general["name"],
            "id": f"_{PACKAGE}_{backend}_{identity(modules)}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": file_digests(variant)},
        }
        write_text(variant / "metadata.json", json.dumps(metadata, indent=2) + "\n")


def read_general(build_toml: Path) -> dict[str, Any]:
    """The values of [general]. Python 3.10 has no parser of TOML, and these are literals of Python as well."""
    section = re.search(r"^\[general\]\n(.*?)(?=^\[)", build_toml.read_text(encoding="utf-8"), re.M | re.S)
    assert section is not None
    return {key: ast.literal_eval(value) for key, value in re.findall(r"^([\w-]+) = (.*)$", section[1], re.M)}


def write_modules(modules: list[Module], folder: Path) -> None:
    for module in modules:
        path = folder.joinpath(*module.name.split(".")) if module.name else folder
        write_text(path / "__init__.py" if module.is_package else path.with_suffix(".py"), module.text)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def file_digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file, in base64, by its path in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(p.read_bytes()).digest()).decode()
        for p in files
    }


if __name__ == "__main__":
    main()
