# SPDX-License-Identifier: Apache-2.0
"""The rules of CONTRIBUTING.md that a parser can check: imports go downwards, a formula stands in its room, sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# a module of fused_ppl imports rooms of earlier lines, and its own
LAYERS = (
    {"kernels"},
    {"checks"},
    {"rank_checks", "token_checks", "transform_checks"},
    {"spec"},
    {"records"},
    {"groups", "plan", "reduction", "reference"},
    {"backends", "dtensors"},
    {"engines"},
    {"divergence_checks", "loss"},
    {"autograd"},
    {"divergence_autograd", "op_autograd", "token_autograd"},
    {"prepare"},
    {"divergences", "functional", "token_values"},
    {"accumulate", "metrics", "modules", "targets"},
    {"fused_ppl"},  # __init__.py, and `from fused_ppl import <a public name>`
    {"testing"},
    {"integrations"},
    {"evaluation"},
    {"cli"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# these take the arguments of other packages, in their order
PEERS_SIGNATURES = {f"fused_ppl/integrations/{name}.py" for name in ("cut_cross_entropy", "liger", "trl", "verl")}
TRITON_BACKEND = {f"fused_ppl/backends/triton_{name}.py" for name in ("rows", "compact", "divergence")}

# one of these outside its room is a second copy of the row formula, or an exp of a mean
FORMULA_NAMES = {"exp", "exp2", "expm1", "log_softmax", "logsumexp", "one_hot", "softmax"}
TORCH_ROOMS = {"fused_ppl/backends/torch_stats.py", "fused_ppl/backends/torch_rows.py"}  # l, and its gradient
DIVERGENCE_ROOMS = {"fused_ppl/backends/torch_divergence.py", "kernels/divergence_formula.py"}  # and its gradient
DIVERGENCE_ROOMS |= {"fused_ppl/backends/top_k.py"}
FORMULA_ROOMS = {"fused_ppl/reference.py", *TORCH_ROOMS, "kernels/row_formula.py", "kernels/elementary.py"}
FORMULA_ROOMS |= DIVERGENCE_ROOMS
MERGE_OF_SHARDS = {"fused_ppl/backends/shards.py": {"exp"}}  # sums of rows relative to a common maximum
# grid_reduction: inside the launch; compact: a geometric mean of sums
EXP_OF_A_MEAN = {
    "fused_ppl/reduction.py": {"exp"},
    "kernels/grid_reduction.py": {"exp"},
    "fused_ppl/engines/compact.py": {"exp"},
}
# these spell out eager PyTorch, which a user would have run in our place
FORMULA_EXEMPT = {"fused_ppl/testing.py", "fused_ppl/cli/numbers.py"}


def python_files(*folders: str) -> list[str]:
    """Paths relative to the root; kernels/ once, not through the symlink as well."""
    found = {p.relative_to(ROOT).as_posix() for folder in folders for p in (ROOT / folder).rglob("*.py")}
    return sorted(f for f in found if not f.startswith("fused_ppl/kernels/"))


PACKAGE = python_files("fused_ppl", "kernels")
EVERYTHING = [*python_files("fused_ppl", "kernels", "bench", "examples", "hub", "tests"), "setup.py"]


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), filename=file)


def room(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    if parts[0] == "kernels":
        return "kernels"
    return "fused_ppl" if parts[1] == "__init__" else parts[1]


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names of what a file imports, also inside functions; `from a import b` gives a.b where b is a room."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write absolute imports"
            for alias in node.names:
                is_room = node.module == "fused_ppl" and alias.name in LEVEL
                yield f"fused_ppl.{alias.name}" if is_room else str(node.module)


def rooms_imported(tree: ast.Module) -> set[str]:
    names = (name.split(".") for name in imports(tree))
    return {parts[1] if len(parts) > 1 else "fused_ppl" for parts in names if parts[0] == "fused_ppl"}


def upward_imports(own: str, tree: ast.Module) -> set[str]:
    return {other for other in rooms_imported(tree) if other != own and LEVEL[other] >= LEVEL[own]}


def formula_names(tree: ast.Module) -> set[str]:
    """Names of FORMULA_NAMES in use, whether as x.exp(), torch.exp(x), exp_(x) or tl.exp2(x)."""
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return {name.rstrip("_") for name in used} & FORMULA_NAMES


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the last line; a docstring is free."""
    first = node.body[0]
    doc = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
    return node.end_lineno - node.lineno + 1 - doc


@pytest.mark.parametrize("file", PACKAGE)
def test_imports_go_downwards(file: str) -> None:
    assert room(file) in LEVEL, f"{room(file)} is a new room: give it its line in LAYERS, here and in CONTRIBUTING.md"
    assert upward_imports(room(file), parse(file)) == set()


@pytest.mark.parametrize("file", PACKAGE)
def test_only_one_file_imports_the_kernels(file: str) -> None:
    if room(file) != "kernels" and file not in TRITON_BACKEND:
        assert "kernels" not in rooms_imported(parse(file))


@pytest.mark.parametrize("file", [f for f in PACKAGE if room(f) != "kernels"])
def test_only_the_kernels_import_triton(file: str) -> None:
    assert "triton" not in {name.split(".")[0] for name in imports(parse(file))}


def test_the_docstring_of_kernels_is_all_there_is() -> None:
    # transformers probes for the package `kernels` by importing whatever folder has that name
    tree = parse("kernels/__init__.py")
    assert ast.get_docstring(tree) and len(tree.body) == 1


@pytest.mark.parametrize("file", python_files("fused_ppl", "kernels", "bench", "examples"))
def test_nothing_imports_tests_bench_or_examples(file: str) -> None:
    tops = {name.split(".")[0] for name in imports(parse(file))}
    assert not tops & {"tests", "examples", "bench"}


@pytest.mark.parametrize("file", python_files("examples"))
def test_examples_use_public_names(file: str) -> None:
    assert rooms_imported(parse(file)) <= {"fused_ppl", "integrations"}


@pytest.mark.parametrize("file", PACKAGE)
def test_a_formula_stands_in_its_room(file: str) -> None:
    if file not in FORMULA_ROOMS | FORMULA_EXEMPT:
        allowed = {**EXP_OF_A_MEAN, **MERGE_OF_SHARDS}.get(file, set())
        assert formula_names(parse(file)) - allowed == set()


@pytest.mark.parametrize("file", EVERYTHING)
def test_a_file_can_be_held_in_the_head(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (250 if file.startswith("kernels/") else 400)
    functions = [n for n in ast.walk(parse(file)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert {f.name: function_lines(f) for f in functions if function_lines(f) > 80} == {}


def sliced_varargs(tree: ast.Module) -> list[int]:
    """Lines where a function takes its `*args` apart by position."""
    lines = []
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) and function.args.vararg is not None:
            name = function.args.vararg.arg
            lines += [
                node.lineno
                for node in ast.walk(function)
                if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == name
            ]
    return lines


def long_signatures(tree: ast.Module) -> list[str]:
    """Functions that run on the host and take more than four arguments by position, `self` apart."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    on_host = [f for f in functions if not any("jit" in ast.unparse(d) for d in f.decorator_list)]
    taken = {f.name: [a.arg for a in f.args.posonlyargs + f.args.args if a.arg not in ("self", "cls")] for f in on_host}
    return [name for name, arguments in taken.items() if len(arguments) > 4]


@pytest.mark.parametrize("file", [f for f in PACKAGE if f not in PEERS_SIGNATURES])
def test_no_function_takes_more_than_four_arguments_by_position(file: str) -> None:
    assert long_signatures(parse(file)) == []


@pytest.mark.parametrize("file", [f for f in PACKAGE if room(f) != "kernels"])
def test_arguments_are_typed_and_passed_by_name(file: str) -> None:
    assert sliced_varargs(parse(file)) == []
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        assert "no-untyped-def" not in line
        assert "type: ignore" not in line or "]  # " in line, f"say why: {line.strip()}"


def test_an_argument_tuple_that_is_sliced_would_be_seen() -> None:
    assert sliced_varargs(ast.parse("def f(*args):\n    return args[6:14]")) == [2]
    assert long_signatures(ast.parse("def f(a, b, c, d, e): ...")) == ["f"]


@pytest.mark.parametrize("file", EVERYTHING)
def test_the_licence_is_the_first_line(file: str) -> None:
    assert (ROOT / file).read_text(encoding="utf-8").splitlines()[:1] == ["# SPDX-License-Identifier: Apache-2.0"]


@pytest.mark.parametrize("folder", ["bench", "tests"])
def test_no_folder_is_called_kernels(folder: str) -> None:
    # its parent would lie on sys.path, and hide the package of that name
    assert [p for p in (ROOT / folder).rglob("kernels") if p.is_dir()] == []


def test_the_files_are_found() -> None:
    assert {"fused_ppl/__init__.py", "fused_ppl/cli/doctor.py", "kernels/__init__.py"} <= set(PACKAGE)


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ("plan", "from fused_ppl import backends"),
        ("reference", "def f():\n    import fused_ppl.plan"),  # one line of LAYERS: siblings do not know each other
        ("engines", "import fused_ppl"),
        ("kernels", "from fused_ppl.spec import LossSpec"),
    ],
)
def test_an_upward_import_would_be_seen(own: str, line: str) -> None:
    assert upward_imports(own, ast.parse(line)) != set()


@pytest.mark.parametrize(
    "line",
    [
        "g = torch.softmax(z, -1) - onehot",
        "g = (z - lse).exp_()",
        "g = F.log_softmax(z, -1)",
        "p = tl.exp2(z * LOG2E)",
        "p = exp(z)",
    ],
)
def test_a_formula_would_be_seen(line: str) -> None:
    assert formula_names(ast.parse(line)) != set()
