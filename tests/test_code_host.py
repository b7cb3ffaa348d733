# SPDX-License-Identifier: Apache-2.0
"""The files that a code host reads: workflows, templates of issues, the citation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
yaml = pytest.importorskip("yaml")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def of(folder: list[Path]) -> Any:
    return pytest.mark.parametrize("file", folder, ids=[file.name for file in folder])


@of(WORKFLOWS)
def test_a_workflow_has_no_right_that_it_does_not_need(file: Path) -> None:
    workflow = read(file)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        writes = {right for right, level in job.get("permissions", {}).items() if level == "write"}
        assert writes == ({"pages", "id-token"} if name == "publish" else set()), name
        assert job["timeout-minutes"] > 0


@of(WORKFLOWS)
def test_actions_are_pinned_by_their_major_version(file: Path) -> None:
    used = re.findall(r"uses: (\S+)", file.read_text(encoding="utf-8"))
    assert used and [action for action in used if not re.fullmatch(r"actions/[\w-]+@v\d+", action)] == []


def test_the_commands_of_ci_exist() -> None:
    steps = [step for file in WORKFLOWS for job in read(file)["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert ".ci/run" in commands and "mkdocs build --strict" in commands and "fused-ppl doctor" in commands
    assert (ROOT / ".ci" / "run").is_file()


def test_the_wheel_is_tried_from_the_oldest_python_on() -> None:
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    matrix = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["doctor"]["strategy"]["matrix"]["python"]
    assert oldest is not None and matrix[0] == oldest[1]


@of([file for file in TEMPLATES if file.name != "config.yml"])
def test_a_template_asks_for_something(file: Path) -> None:
    template = read(file)
    assert {"name", "description", "body"} <= template.keys()
    asked = [entry for entry in template["body"] if entry["type"] != "markdown"]
    assert asked and all(entry["validations"]["required"] for entry in asked)
    assert len({entry["id"] for entry in asked}) == len(asked)


def test_a_bug_report_has_the_output_of_doctor() -> None:
    for name in ("bug.yml", "wrong_number.yml"):
        assert (
            "fused-ppl doctor"
            in read(ROOT / ".github" / "ISSUE_TEMPLATE" / name)["body"][name != "bug.yml"]["attributes"]["label"]
        )


def test_the_citation_has_what_its_format_requires() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == "Apache-2.0"
