# SPDX-License-Identifier: Apache-2.0
"""Runs of an evaluation: reading texts, the command line, a kill and its resumption."""

from __future__ import annotations

import copy
import io
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import evaluation_cases as cases
import pytest
import torch
from evaluation_cases import TEXT

from fused_ppl.cli import main
from fused_ppl.evaluation import Document, EvaluationError, HiddenModel, TokenFile, evaluate, read_texts

ROOT = Path(__file__).resolve().parent.parent


# --- texts -----------------------------------------------------------------------------------------------------------


def test_files_and_folders_are_read_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text("three")
    (tmp_path / "in" / "z.bin").write_bytes(b"\0")
    (tmp_path / "in" / "empty.txt").write_text("")
    found = list(read_texts([str(tmp_path / "b.txt"), str(tmp_path / "in")]))
    assert [d.text for d in found] == ["two", "three"]
    assert [Path(d.domain).name for d in found] == ["b.txt", "a.md"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_records_have_a_text_and_a_domain(suffix, tmp_path):
    records = [{"body": "one 😀", "source": "web"}, {"body": "two", "source": "code"}, {"body": "", "source": "web"}]
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    else:
        arrow = pytest.importorskip("pyarrow", reason="Parquet needs it")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(records), path)
    found = list(read_texts([str(path)], field="body", domain_field="source"))
    assert found == [Document(f"{path}:1", "one 😀", "web"), Document(f"{path}:2", "two", "code")]
    assert {d.domain for d in read_texts([str(path)], field="body")} == {str(path)}
    with pytest.raises(EvaluationError, match="must have a text in its field 'text'; it has body, source"):
        list(read_texts([str(path)]))
    with pytest.raises(EvaluationError, match="must have a field 'topic'"):
        list(read_texts([str(path)], field="body", domain_field="topic"))


def test_bytes_that_are_not_utf_8_are_refused_or_counted(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("na\u00efve caf\u00e9 \ufffd".encode("utf-8").replace("ï".encode(), b"\xef"))
    with pytest.raises(EvaluationError, match=r"must be UTF-8; byte 2 \(0xef\) is not"):
        list(read_texts([str(path)]))
    (found,) = read_texts([str(path)], errors="replace")
    assert found.text == "na\ufffdve café \ufffd" and found.replaced == 1
    result = evaluate(cases.model(), cases.tokenizer(), [found], ctx=32)
    assert result.replaced == 1 and "1 characters are U+FFFD" in result.warnings[-1]
    assert result.total.total_bytes == len(found.text.encode())


def test_records_with_bytes_or_surrogates_that_are_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "na\xefve"}\n{"text": "the \\ud83d committee"}\n')
    for at, message in ((0, "line 1, must be UTF-8"), (1, "Record 2 of .* is half of a surrogate pair")):
        lines = path.read_bytes().splitlines(keepends=True)
        (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n' * at + lines[at])
        with pytest.raises(EvaluationError, match=message):
            list(read_texts([str(tmp_path / "b.jsonl")]))
    found = list(read_texts([str(path)], errors="replace"))
    assert [(d.text, d.replaced) for d in found] == [("na\ufffdve", 1), ("the \ufffd committee", 1)]
    with pytest.raises(EvaluationError, match="text 0 must be text; its character 0 is half of a surrogate pair"):
        evaluate(cases.model(), cases.tokenizer(), ["\ud83d"], ctx=32)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"a\0b", "zero byte"),
        ("a.jsonl", b"{", "line 1, must be JSON"),
        ("a.jsonl", b'{"text": 3}', "must have a text in its field"),
        ("a.jsonl", b"[1]", "it has list"),
    ],
)
def test_files_that_are_no_texts_are_refused(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(EvaluationError, match=message):
        list(read_texts([str(tmp_path / name)]))


def test_paths_that_do_not_exist_are_refused(tmp_path):
    for paths, message in (
        ([], "at least one text"),
        ([str(tmp_path / "none")], "it does not exist"),
        ([str(tmp_path)], "it holds none"),
    ):
        with pytest.raises(EvaluationError, match=message):
            list(read_texts(paths))


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    cases.model().save_pretrained(path)
    cases.tokenizer("bos").save_pretrained(path)
    (path / "a.txt").write_text(TEXT)
    (path / "b.txt").write_text(TEXT[:500])
    return path


def command(folder: Path, *more: str, text: str = "a.txt") -> list[str]:
    return ["eval", "--model", str(folder), "--text", str(folder / text), "--ctx", "32", *more]


def test_eval_prints_the_number_of_the_function(folder, capsys):
    assert main(command(folder, "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    expected = evaluate(cases.model(), cases.tokenizer("bos"), [TEXT], ctx=32)
    assert said["total"]["perplexity"] == pytest.approx(expected.total.perplexity, rel=1e-6)
    assert said["total"]["bits_per_byte"] == pytest.approx(expected.total.bits_per_byte, rel=1e-6)
    assert said["quote"].startswith(f"perplexity {expected.total.perplexity:.2f}"[:-1])
    assert main(command(folder)) == 0
    shown = capsys.readouterr().out
    for part in ("To quote: perplexity", "bits a byte", "tokens a second", "peak memory", "formula: exp(mean nll)"):
        assert part in shown


def test_eval_shows_every_domain_and_the_mean(folder, capsys):
    assert main(["eval", "--model", str(folder), "--text", str(folder / "a.txt"), str(folder / "b.txt")]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [r for r in rows if r.endswith(".txt") or r in ("all", "mean")][-2:] == ["all", "mean"]


def test_eval_under_all_conventions(folder, capsys):
    assert main(command(folder, "--convention", "all")) == 0
    shown = capsys.readouterr().out
    from fused_ppl.evaluation import CONVENTIONS

    for name, convention in CONVENTIONS.items():
        assert f"{name}: {convention.formula}" in shown
    assert main(command(folder, "--convention", "all", "--max-tokens", "40", text="b.txt")) == 0
    assert "llama.cpp: not measured. convention llama.cpp needs at least 64 tokens" in capsys.readouterr().out


def test_eval_reads_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert main(["eval", "--model", str(folder), "--text", "-", "--ctx", "32", "--convention", "all", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["conventions"]) == 9 and not said["refused"]
    assert {c["text_hash"] for c in said["conventions"]} == {
        evaluate(cases.model(), cases.tokenizer("bos"), [TEXT], ctx=32).text_hash
    }


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_eval_writes_every_token(suffix, folder, tmp_path, capsys):
    path = tmp_path / f"tokens.{suffix}"
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs it")
    assert main(command(folder, "--json", "--per-token", str(path))) == 0
    said = json.loads(capsys.readouterr().out)
    if suffix == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    assert len(rows) == said["total"]["tokens"]
    assert sum(r["nll"] for r in rows) / len(rows) == pytest.approx(said["total"]["nll"], rel=1e-12)
    assert sum(r["num_bytes"] for r in rows) == len(TEXT.encode())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ctx", "0"], "ctx must be at least 2"),
        (["--stride", "40"], "stride must be between"),
        (["--convention", "mine"], "convention must be one of"),
        (["--bos", "maybe"], "bos must be one of"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--device", "cuda:77"], "cannot be loaded to cuda:77"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--text", "/nowhere.txt"], "does not exist"),
        (["--text", sys.executable], "zero byte"),
        (["--model", "/nowhere"], "must be a folder, or a name of the Hub"),
        (["--convention", "all", "--resume", "x"], "need one convention"),
        (["--html", "x", "--resume", "y"], "cannot go on"),
        (["--per-token", "x.csv"], "must end in .jsonl or .parquet"),
        (["--html", "/nowhere/x.html"], "must be in a folder that exists"),
    ],
    ids=str,
)
def test_bad_input_is_a_sentence_and_exit_code_2(more, message, folder, capsys):
    assert main(command(folder, *more)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_model_that_is_none_is_a_sentence(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["eval", "--model", str(tmp_path), "--text", str(folder / "a.txt")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


# --- a kill ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, time
import evaluation_cases as cases
from fused_ppl.evaluation import TokenFile, evaluate
from fused_ppl.evaluation import state as state_file
state_file.SAVE_EVERY = state_file.SHARE = 0
state, tokens, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
progress = lambda n: time.sleep(pause)
texts = [cases.TEXT, cases.TEXT[:300], cases.TEXT[100:]]
with TokenFile(tokens) as file:
    found = evaluate(cases.model(), cases.tokenizer(), texts, ctx=32, batch_size=2, state=state, per_token=file,
                     progress=progress)
print(json.dumps([found.total.nll, found.total.perplexity_interval, found.text_hash, found.total.tokens]))
"""


def start(state: Path, tokens: Path, pause: float) -> subprocess.Popen[str]:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", SCRIPT, str(state), str(tokens), str(pause)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def result(process: subprocess.Popen[str]) -> Any:
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_run_goes_on_to_the_same_number(tmp_path):
    whole = result(start(tmp_path / "whole.json", tmp_path / "whole.jsonl", 0.0))
    state, tokens = tmp_path / "state.json", tmp_path / "tokens.jsonl"
    generator, kills = random.Random(), 0
    for _ in range(3):
        process = start(state, tokens, 0.05)
        before = state.read_text() if state.exists() else None
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not state.exists() or state.read_text() == before):
            time.sleep(0.01)
        time.sleep(generator.random() * 0.5)
        kills += process.poll() is None
        process.kill()
        process.wait()
        assert state.exists()
    assert kills
    assert result(start(state, tokens, 0.0)) == whole
    assert tokens.read_text() == (tmp_path / "whole.jsonl").read_text()


def kept(path: Path, **keywords: Any) -> Any:
    keywords = {"texts": [TEXT, TEXT[:99]], "ctx": 32, "state": path, **keywords}
    return evaluate(cases.model(), cases.tokenizer(), keywords.pop("texts"), **keywords)


def test_a_state_that_does_not_fit_is_refused_and_stays(tmp_path):
    path = tmp_path / "state.json"
    first = kept(path)
    assert kept(path).total == first.total
    good = path.read_text()
    for changed, message in (
        ({"ctx": 16}, "ctx was 32 and is 16"),
        ({"convention": "disjoint"}, "convention was 'strided' and is 'disjoint'"),
        ({"batch_size": 3}, "batch_size was 4 and is 3"),
        ({"texts": [TEXT[:-1], TEXT[:99]]}, "text 0 is not the text that the state file"),
        ({"texts": [TEXT]}, "knows 2 texts; only 1 were given"),
    ):
        with pytest.raises(EvaluationError, match=message):
            kept(path, **changed)
        assert path.read_text() == good
    for damaged in (good[: len(good) // 2], good.replace('"tokens": ', '"tokens": 1', 1), "[]", ""):
        path.write_text(damaged)
        with pytest.raises(EvaluationError, match=r"(not a whole state file|damaged).* Delete .*state\.json"):
            kept(path)
        assert path.read_text() == damaged


class Stop(Exception):
    pass


def stopped(path: Path, **keywords: Any) -> None:
    """A run that is stopped in the middle of its first text, with its state saved."""
    calls = iter(range(100))

    def progress(_: int) -> None:
        if next(calls) == 6:
            raise Stop

    with pytest.raises(Stop):
        kept(path, progress=progress, batch_size=2, **keywords)


@pytest.fixture
def saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_ppl.evaluation import state

    monkeypatch.setattr(state, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(state, "SHARE", 0)


@pytest.mark.usefixtures("saved_at_once")
def test_the_text_at_work_and_its_domain_belong_to_the_state(tmp_path):
    stopped(tmp_path / "s")
    for texts in ([TEXT[::-1]], [TEXT[:30]], [Document("text 0", TEXT, "other")]):
        with pytest.raises(EvaluationError, match="text 0 is not the text that the state file"):
            kept(tmp_path / "s", texts=texts, batch_size=2)
    assert kept(tmp_path / "s", batch_size=2).total == kept(tmp_path / "other", batch_size=2).total


@pytest.mark.usefixtures("saved_at_once")
def test_another_body_scale_or_receiver_is_another_evaluation(tmp_path):
    stopped(tmp_path / "s")
    body = copy.deepcopy(cases.model())
    with torch.no_grad():
        body.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(EvaluationError, match="head was "):
        evaluate(body, cases.tokenizer(), [TEXT], ctx=32, batch_size=2, state=tmp_path / "s")
    with pytest.raises(EvaluationError, match="per_token was False and is True"):
        kept(tmp_path / "s", batch_size=2, per_token=print)
    table = torch.randn(512, 8)
    for scale, name in ((1.0, "a"), (0.5, "a")):
        found = HiddenModel(lambda t: table[t], linear_weight=table, logit_scale=scale, name=name)
        if scale == 1.0:
            evaluate(found, cases.tokenizer(), [TEXT], ctx=32, state=tmp_path / "h")
        else:
            with pytest.raises(EvaluationError, match="head was "):
                evaluate(found, cases.tokenizer(), [TEXT], ctx=32, state=tmp_path / "h")


@pytest.mark.usefixtures("saved_at_once")
def test_tokens_are_not_handed_over_twice(tmp_path):
    seen: list[Any] = []
    stopped(tmp_path / "s", per_token=seen.append)
    assert seen
    with pytest.raises(EvaluationError, match=r"needs a method keep\(n\)"):
        kept(tmp_path / "s", batch_size=2, per_token=seen.append)


def test_a_finished_run_with_parquet_can_be_run_again(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs it")
    counts = []
    for _ in range(2):
        with TokenFile(tmp_path / "t.parquet") as file:
            kept(tmp_path / "s", per_token=file)
        counts.append(pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "t.parquet").num_rows)
        assert not (tmp_path / "t.parquet.lines").exists()
    assert counts[0] == counts[1] > 0


def test_a_file_of_tokens_that_lost_lines_is_refused(tmp_path):
    with TokenFile(tmp_path / "t.jsonl") as file:
        kept(tmp_path / "state.json", per_token=file)
    lines = (tmp_path / "t.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "t.jsonl").write_text("".join(lines[:-1]))
    with TokenFile(tmp_path / "t.jsonl") as file, pytest.raises(EvaluationError, match=r"must have the \d+ tokens"):
        kept(tmp_path / "state.json", per_token=file)


def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    blocks = re.findall(r"^```python needs=transformers\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3 and "```python\n" not in page
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"evaluation.md, block {i}", "exec"), namespace)
