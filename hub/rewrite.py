# SPDX-License-Identifier: Apache-2.0
"""The text of a module of fused_ppl as a Hub kernel may hold it, and the rules that every shipped module keeps.

`kernels` loads a copy under a name of its own, so that several versions live in one process. An import of the package
by its name would find another copy or none. So `relative` rewrites each of them, and `broken_rules` looks for what
it did not see.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

PACKAGE = "fused_ppl"
ALLOWED = {"torch", "triton"}  # beside the standard library
OLDEST_SYNTAX = (3, 9)

# a string that is the name of a module, of an op or of a key, and no sentence
_NAMES_PACKAGE = re.compile(rf"{PACKAGE}(\.\w+)*|{PACKAGE}(::|/)\S*")


class CannotShip(Exception):
    """A module holds what no Hub kernel may hold, and what this build cannot rewrite."""


class Module(NamedTuple):
    """A module of the package."""

    name: str  # dotted, inside the package: "engines.ops", and "" for the package itself
    is_package: bool
    text: str

    @property
    def folder(self) -> list[str]:
        """The parts of the package that its relative imports start from."""
        parts = self.name.split(".") if self.name else []
        return parts if self.is_package else parts[:-1]

    def place(self, node: ast.AST) -> str:
        return f"{self.name or '__init__'}, line {getattr(node, 'lineno', 0)}"


def relative(module: Module) -> Module:
    """The module with every import of the package made relative; the rest is the same, byte for byte.

    Raises:
        CannotShip: there is an import that has no relative form.
    """
    lines = module.text.split("\n")
    for node in ast.walk(ast.parse(module.text)):
        if isinstance(node, ast.Import) and any(_top(alias.name) == PACKAGE for alias in node.names):
            raise CannotShip(
                f"{module.place(node)}: `{ast.unparse(node)}` has no relative form. Write `from {PACKAGE} import ...`."
            )
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _top(str(node.module)) == PACKAGE:
            line, source = lines[node.lineno - 1], str(node.module)
            found = re.search(rf"from\s+{re.escape(source)}\s+import\b", line)
            if found is None:
                raise CannotShip(f"{module.place(node)}: write the import as one line up to the word `import`.")
            dots, rest = "." * (len(module.folder) + 1), source[len(PACKAGE) + 1 :]
            lines[node.lineno - 1] = f"{line[: found.start()]}from {dots}{rest} import{line[found.end() :]}"
    return module._replace(text="\n".join(lines))


def imported(module: Module) -> Iterator[str]:
    """Names inside the package that a module with relative imports may mean: of modules, and of what is in them.

    A call importlib.import_module("..kernels.probe", __package__) counts as an import.
    """
    for node in ast.walk(ast.parse(module.text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            source = _absolute(module, node.level, node.module or "")
            yield source
            yield from (f"{source}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if not (isinstance(name, str) and name.startswith(".")):
                raise CannotShip(f"{module.place(node)}: import_module must be given a relative name, as a literal.")
            yield _absolute(module, len(name) - len(name.lstrip(".")), name.lstrip("."))


def broken_rules(module: Module) -> list[str]:
    """Sentences, one for each place where a shipped module breaks a rule of Hub kernels."""
    try:
        tree = ast.parse(module.text, feature_version=OLDEST_SYNTAX)
    except SyntaxError as error:
        oldest = ".".join(map(str, OLDEST_SYNTAX))
        return [f"{module.name}, line {error.lineno}: this is no syntax of Python {oldest}: {error.msg}."]
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        f"{module.place(node)}: {why}."
        for node in ast.walk(tree)
        if id(node) not in documents
        for why in [*_foreign_imports(module, node), *_own_name(node)]
    ]


def _foreign_imports(module: Module, node: ast.AST) -> Iterator[str]:
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [str(node.module)]
    elif isinstance(node, ast.ImportFrom) and node.level > len(module.folder) + 1:
        yield "the import leaves the package"
    for name in names:
        if _top(name) not in sys.stdlib_module_names | ALLOWED:
            yield f"a Hub kernel imports the standard library, {', '.join(sorted(ALLOWED))} and itself, but not {name}"


def _own_name(node: ast.AST) -> Iterator[str]:
    if PACKAGE in (getattr(node, "id", None), getattr(node, "attr", None)):  # of ast.Name, of ast.Attribute
        yield f"{PACKAGE} is another copy of the package"
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and _NAMES_PACKAGE.fullmatch(node.value):
        yield f"the string {node.value!r} names another copy of the package. Derive it from __name__"


def _absolute(module: Module, level: int, name: str) -> str:
    return ".".join([*module.folder[: len(module.folder) - level + 1], *([name] if name else [])])


def _top(name: str) -> str:
    return name.partition(".")[0]
