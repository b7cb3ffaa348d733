# SPDX-License-Identifier: Apache-2.0
"""The runner of examples/studies: points run once, a killed study goes on, quick results never replace full ones."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

for needed in ("matplotlib", "sklearn"):
    pytest.importorskip(needed, reason='the studies need pip install -e ".[studies]"')
STUDIES = Path(__file__).parents[1] / "examples" / "studies"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    names = {path.stem for path in STUDIES.glob("*.py")}
    for name in names:  # bench/ has a module `run` as well, and another test may have imported it
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(STUDIES))
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def made(module: Any, ran: list[int], stop_at: int | None = None) -> Any:
    from matplotlib.figure import Figure

    def run(point: dict[str, Any]) -> dict[str, Any]:
        if point["seed"] == stop_at:
            raise KeyboardInterrupt
        ran.append(point["seed"])
        return {"value": math.inf if point["seed"] == 1 else 0.5}

    return module("study").Study(
        "fake",
        "?",
        lambda quick: [{"seed": i} for i in range(2 if quick else 4)],
        run,
        lambda done: ",".join(str(p["value"]) for p in done),
        lambda done: Figure(),
    )


def test_a_killed_study_goes_on(module, tmp_path):
    ran: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        made(module, ran, stop_at=2).finish(tmp_path, quick=False)
    assert made(module, ran).finish(tmp_path, quick=False).count(",") == 3
    assert ran == [0, 1, 2, 3]
    record = json.loads((tmp_path / "fake.json").read_text())
    assert [p["value"] for p in record["points"]] == [0.5, "inf", 0.5, 0.5]
    assert (tmp_path / "fake.png").exists() and not record["quick"]


def test_quick_results_do_not_replace_full_ones(module, tmp_path):
    made(module, []).finish(tmp_path, quick=False)
    with pytest.raises(SystemExit, match="holds a full run"):
        made(module, []).finish(tmp_path, quick=True)


def test_an_interval_is_student_s(module):
    mean, half = module("study").interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.303 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-3)


SHARED = {"run", "study", "text_model"}
NAMES = sorted({path.stem for path in STUDIES.glob("*.py")} - SHARED)


@pytest.mark.parametrize("name", NAMES)
def test_one_small_point_of_each_study(name, module):
    study = module(name).STUDY
    assert len(study.points(False)) > len(study.points(True))
    point = {**study.points(True)[0], "steps": 2}
    for few in {"tuned", "draws", "rounds"} & set(point):
        point[few] = 2
    found = study.run(point)
    assert found and all(isinstance(v, (float, int, list)) for v in found.values())


def test_the_runner_names_every_study(module):
    assert sorted(module("run").NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_tables_of_the_full_records(name, module):
    record = json.loads((STUDIES / "results" / f"{name}.json").read_text())
    study, page = module(name).STUDY, (STUDIES.parents[1] / "docs" / "studies.md").read_text()
    assert not record["quick"] and record["question"] == study.question
    asked = study.points(False)
    assert (
        len(asked) == len(record["points"]) == sum(any(p.items() <= d.items() for d in record["points"]) for p in asked)
    )
    assert module("run").with_table(page, name, study.table(record["points"])) == page
    assert f"../examples/studies/results/{name}.png" in page
