# SPDX-License-Identifier: Apache-2.0
"""The page of `fused-ppl eval --html`, read back by the parser of the standard library and, if it is here, Chromium."""

from __future__ import annotations

import copy
import html
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import evaluation_cases as cases
import numpy as np
import pytest
import torch
from evaluation_cases import TEXT

from fused_ppl.evaluation import CONVENTIONS, Document, EvaluationError, HiddenModel, evaluate
from fused_ppl.evaluation import report as module
from fused_ppl.evaluation.records import Tokens
from fused_ppl.evaluation.report import Report

pytest.importorskip("jinja2", reason="the page is one of its templates")

LN2 = math.log(2)
# all that could end a string, a script or a comment early, and what an HTML parser would change: CR, NUL, references
HOSTILE = (
    "</script><script>alert(1)</script><!-- <script> ' \" ` \\ \\u003c ${x} {{ x }} {% x %}\u2028\u2029\r\n\r\0 &amp; "
    '&#65; <img src=x onerror="alert(1)"> ]]> '
)
LONG = "x" * 300


class Page(HTMLParser):
    """The tags, attributes and texts of a page, as a browser without scripts would find them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.open, self.texts = [], [], [], []  # of texts: tag, id, text
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.data = json.loads(self.text("data"))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "link"):
            self.open.append((tag, dict(attrs).get("id") or ""))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, tag

    def handle_data(self, data):
        if self.open:
            self.texts.append((*self.open[-1], data))

    def text(self, name):
        return "".join(text for _, own, text in self.texts if own == name)

    def all(self, *tags):
        return [text for tag, _, text in self.texts if tag in tags]


def made(path, texts, *, tokenizer=None, model=None, most_bytes=65536, **keywords):
    """A page, and the evaluation and tokens that it is about."""
    tokenizer = tokenizer or cases.tokenizer()
    report, rows = Report(tokenizer, most_bytes), []

    def add(row):
        report.add(row)
        rows.append(row)

    keywords = {"ctx": 32, "alternatives": 5, **keywords}
    found = evaluate(model or cases.model(), tokenizer, texts, per_token=add, **keywords)
    report.write(path / "page.html", found, texts)
    return Page(path / "page.html"), found, rows


def joined(page):
    return ["".join(text["cells"]) for text in page.data["texts"]]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_bits_of_the_page_are_those_of_the_evaluation(name, tmp_path):
    page, found, rows = made(tmp_path, [TEXT, TEXT[:500]], convention=name)
    columns = page.data["texts"]
    bits = [b for text in columns for b in text["bits"] if b is not None]
    assert len(bits) == len(rows)
    assert sum(bits) == pytest.approx(sum(r.nll for r in rows) / LN2, abs=1e-4 * len(bits))
    if not CONVENTIONS[name].one_less:
        assert sum(bits) == pytest.approx(found.total.bits_per_token * found.total.tokens, rel=1e-4)
    for number, text in enumerate(columns):
        own = {r.position: r for r in rows if r.document == f"text {number}"}
        assert [i for i, b in enumerate(text["bits"]) if b is not None] == sorted(own)
        for i, row in own.items():
            assert page.data["ids"][text["word"][i]] == row.id
            assert text["entropy"][i] == pytest.approx(row.entropy / LN2, abs=1e-3) and text["rank"][i] == row.rank
            pairs = zip(text["likely"][i][::2], text["likely"][i][1::2], strict=True)
            assert [(page.data["ids"][w], p) for w, p in pairs] == [(t, round(10000 * p)) for t, p in row.alternatives]
    assert page.text("quote") == found.quote() and f"{CONVENTIONS[name].formula}." in page.all("p")
    assert page.text("number") == f"{found.headline[1]:,.4f}" and found.headline[0] in page.all("div")
    said = [text.strip() for text in page.all("div") if "95 % interval" in text]
    pair = {"bits per byte": found.total.bits_per_byte_interval, "perplexity": found.total.perplexity_interval}
    low, high = pair.get(found.headline[0], (None, None))
    assert said == ([] if low is None else [f"95 % interval: {low:,.4f} to {high:,.4f}"])
    assert [w for w in found.warnings if f" {w}" not in page.all("p")] == []


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "bos"])
def test_the_text_can_be_put_together_again(kind, tmp_path):
    texts, tokenizer = [TEXT, HOSTILE, "漢", "a" + LONG], cases.tokenizer(kind)
    page, _, _ = made(tmp_path, texts, tokenizer=tokenizer)
    assert joined(page) == texts
    for text, shown in zip(texts, page.data["texts"], strict=True):
        assert [page.data["ids"][w] for w in shown["word"]] == tokenizer(text, add_special_tokens=False)["input_ids"]
        parts = dict(shown["parts"])
        assert sum(parts.get(i, 1) for i in range(len(shown["cells"]))) == len(shown["word"])
        assert all(shown["cells"]) and all(count > 1 for count in parts.values())


def test_tokens_of_one_character_are_one_cell_with_its_bytes(tmp_path):
    data = made(tmp_path, ["a龍b"])[0].data
    (text,) = data["texts"]
    assert text["cells"] == ["a", "龍", "b"] and text["parts"] == [[1, 3]]
    assert bytes(b for w in text["word"][1:4] for b in data["words"][w]) == "龍".encode()
    data = made(tmp_path, ["ab龍b"], tokenizer=cases.tokenizer("byte-fallback"))[0].data
    (text,) = data["texts"]
    assert text["parts"] == [[len(text["cells"]) - 2, 3]]
    assert bytes(data["words"][w][0] for w in text["word"][-4:-1]) == "龍".encode()
    tokens = Tokens(*(np.asarray(column) for column in ([7, 8, 9, 10], [0, 3, 0, 1], [0, 0, 1, 1])))
    found = module.cells_of(Document("a", "龍b", "d"), tokens, 4)  # tokens without bytes go with their neighbours
    assert found.cells == ["龍", "b"] and found.counts == [3, 1]


def test_words_are_shown_as_the_tokenizer_means_them():
    assert module.word("▁the", "the") == " the" and module.word("the", "the") == "the"
    assert module.word("Ġthe", " the") == " the" and module.word("<s>", "<s>") == "<s>"
    assert module.word("æ¼", "\ufffd") == [0xE6, 0xBC] and module.word("<0xE6>", "\ufffd") == [0xE6]
    assert module.word("\ufffd", "\ufffd") == "\ufffd"  # a token for U+FFFD itself
    assert module.word(None, "") is None


def test_ids_beyond_the_tokenizer_have_no_word(tmp_path):
    page, _, rows = made(tmp_path, [TEXT])
    beyond = {t for row in rows for t, _ in row.alternatives if t >= len(cases.tokenizer())}
    words = dict(zip(page.data["ids"], page.data["words"], strict=True))
    assert beyond == {token for token, word in words.items() if word is None} != set()


def test_without_alternatives_the_most_likely_token_is_shown(tmp_path):
    page, _, rows = made(tmp_path, [TEXT], alternatives=0)
    (text,) = page.data["texts"]
    assert [page.data["ids"][w] for w, p in text["likely"][1:] if p is None] == [row.predicted for row in rows]
    assert set(text["rank"]) == {None}


# nothing fits; within, around the end of the first text, within the second
@pytest.mark.parametrize("most_bytes", [1, 700, 1475, 1476, 1477, 2000])
def test_a_long_text_is_cut_and_counted(most_bytes, tmp_path):
    assert (size := len(TEXT.encode())) == 1476, "the sizes above are about this text"
    page, found, rows = made(tmp_path, [TEXT, TEXT], most_bytes=most_bytes)
    shown = "".join(joined(page))
    assert (TEXT + TEXT).startswith(shown)
    assert most_bytes - 12 < len(shown.encode()) <= most_bytes  # no cell of this text is larger
    assert page.text("part") == f"Only the first {len(shown.encode()):,} of {2 * size:,} bytes are shown here."
    titles = [re.search(r": ([\d,]+) tokens", t) for t in page.all("title")]
    assert sum(int(t[1].replace(",", "")) for t in titles if t) == len(rows) == found.total.tokens


def test_no_more_tokens_are_kept_than_the_page_can_show():
    report = Report(cases.tokenizer(), most_bytes=700)
    evaluate(cases.model(), cases.tokenizer(), [TEXT] * 3 + ["ab"] * 50, ctx=32, per_token=report.add)
    assert sum(len(rows) for rows in report.kept) <= 700


@pytest.mark.parametrize(("max_tokens", "shown"), [(2, "ab"), (3, "ab龍"), (5, "ab龍"), (6, "ab龍龍"), (100, "ab龍龍")])
def test_max_tokens_end_the_text(max_tokens, shown, tmp_path):
    page, found, rows = made(tmp_path, ["ab龍龍"], max_tokens=max_tokens)  # each 龍 has three tokens
    (text,) = page.data["texts"]
    assert len(text["word"]) == found.total.total_tokens and sum(b is not None for b in text["bits"]) == len(rows)
    assert joined(page) == [shown] and page.text("part") == ""


def test_documents_without_scored_tokens_are_plain(tmp_path):
    """Two documents may also have one name: records of files of one name in two folders have."""
    texts = [Document("a", "T", "d"), Document("a", TEXT, "d"), Document("a", "T", "e"), Document("a", "The", "e")]
    page, found, _ = made(tmp_path, texts)
    assert joined(page) == [t.text for t in texts]
    scored = [sum(b is not None for b in text["bits"]) for text in page.data["texts"]]
    assert scored[0] == scored[2] == 0 and scored[1] + scored[3] == found.total.tokens and scored[3] > 0


def test_nothing_of_the_text_becomes_html(tmp_path):
    tokenizer = copy.deepcopy(cases.tokenizer())
    tokenizer.add_tokens(["</script><script>", "<img src=x onerror=alert(2)>"])
    model = HiddenModel(torch.nn.Embedding(512, 8), linear_weight=torch.randn(512, 8), name=HOSTILE)
    texts = [Document(HOSTILE, HOSTILE * 5, HOSTILE), Document("b", "<img src=x onerror=alert(2)>", "<b>")]
    page, _, _ = made(tmp_path, texts, tokenizer=tokenizer, model=model)
    assert joined(page) == [t.text for t in texts] and "</script><script>" in page.data["words"]
    assert page.data["texts"][0]["name"] == HOSTILE
    assert page.tags.count("script") == 2 and page.source.count("</script") == 2 and "<!--" not in page.source
    assert "img" not in page.tags and not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text("data").isascii() and "<" not in page.text("data")


def test_the_page_is_one_file(tmp_path):
    page, _, _ = made(tmp_path, [TEXT])
    assert [v for n, v in page.attributes if n in ("src", "href", "srcset", "action", "data")] == ["data:,"]
    own = page.source.replace(page.text("data"), "")
    assert not re.search(r"https?:|@import|url\(|\bimport\b|fetch\(|XMLHttp|innerHTML|document\.write|eval\(", own)
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:" in own


def test_the_table_has_every_domain_and_both_means(tmp_path):
    texts = [Document("a", TEXT, "prose"), Document("b", TEXT[:400], "code"), Document("c", "T", "empty")]
    page, found, _ = made(tmp_path, texts)
    cells = page.all("th", "td", "small")
    for row in (*found.rows[:2], found.total):
        assert f"{row.perplexity:,.4f}" in cells and f"{row.bits_per_byte:.4f}" in cells and f"{row.tokens:,}" in cells
        low, high = row.bits_per_byte_interval
        assert f"{low:.3f} to {high:.3f}" in cells
    assert f"{found.macro_perplexity:,.4f}" in cells and f"{found.macro_bits_per_byte:.4f}" in cells
    assert found.rows[2].tokens == 0 and cells.count("–") == 2 and not {"∞", "inf", "nan"} & set(cells)


def test_sentences_are_short(tmp_path):
    page, _, _ = made(tmp_path, [TEXT], most_bytes=700)
    said = " ".join(t for t in page.all("p", "figcaption", "span") if "nll;" not in t)
    sentences = re.split(r"(?<=\.) ", re.sub(r"\s+", " ", said))
    assert len(sentences) > 10
    assert [s for s in sentences if len(s.split()) > 25] == []


@pytest.mark.parametrize("count", [1, 2, 17, 511, 1024, 50_001])  # a few; around the number of points; thinned out
def test_the_running_line_ends_at_the_perplexity(count):
    running, nll = module.Running(), np.random.default_rng(0).gamma(1.0, 3.0, size=count)
    for value in nll.tolist():
        running.add(value)
    chart = running.chart()
    points = [tuple(map(float, p.split(","))) for p in chart["line"][1:].split("L")]
    assert len(points) <= 2 * module.POINTS and points[-1][0] == 1000
    assert running.sums == pytest.approx(np.cumsum(nll)[running.step - 1 :: running.step].tolist())
    assert all(0 <= t.at <= 100 for t in (*chart["x"], *chart["y"]))
    labels = [(t.at, math.log2(float(t.label.replace(",", "")))) for t in chart["y"]]
    assert len(labels) >= 2 or count < 17
    if len(labels) > 1:
        (a, p), (b, q) = labels[0], labels[-1]  # two places of a linear scale of bits
        bits = p + (q - p) * (points[-1][1] / 10 - a) / (b - a)
        assert bits == pytest.approx(nll.mean() / LN2, abs=0.02)


def test_ticks_are_round_numbers():
    assert module.even(0, 20000) == [0, 5000, 10000, 15000, 20000] and module.even(0, 3, smallest=1) == [0, 1, 2, 3]
    assert module.even(0, 1.05, smallest=1) == [0, 1]
    assert module.perplexities(math.log2(8), math.log2(150)) == [10, 20, 50, 100]
    assert module.perplexities(math.log2(8.01), math.log2(8.99)) == pytest.approx([8.2, 8.4, 8.6, 8.8])
    assert module.perplexities(0.5, 100) == [10.0**d for d in range(1, 31, 4)]


def test_the_histogram_has_every_token():
    counts = np.zeros(module.FINE * module.MOST_BITS, dtype=np.int64)
    counts[[0, 1, 30]] = 100, 50, 1  # a quarter of a bit each
    labels = [label for *_, label in module.histogram(counts)["bars"]]
    assert labels[:2] == ["0 to 0.25 bits: 100 tokens", "0.25 to 0.5 bits: 50 tokens"]
    counts[-1] = 100
    assert module.histogram(counts)["bars"][-1][3] == "62 or more bits: 100 tokens"


def linear(colour):
    c = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def oklab(colour):
    lms = [[0.412221, 0.536333, 0.051446], [0.211903, 0.6807, 0.107397], [0.088302, 0.281719, 0.62998]]
    lab = [[0.210454, 0.793618, -0.004072], [1.977998, -2.428592, 0.450594], [0.025904, 0.782772, -0.808676]]
    return lab @ np.cbrt(lms @ linear(colour))


def test_colours_are_even_and_every_text_on_them_is_readable(tmp_path):
    page, _, _ = made(tmp_path, [TEXT])
    parts = page.source.split("@media (prefers-color-scheme: dark)")
    for part, sign in zip(parts, (-1, 1), strict=True):
        theme = dict(re.findall(r"--([\w-]+): #([0-9a-f]{6});", part))
        scale = [theme[f"c{i}"] for i in range(module.COLOURS)]
        steps = [float(np.linalg.norm(oklab(a) - oklab(b))) for a, b in itertools.pairwise(scale)]
        assert max(steps) < 1.3 * min(steps), steps
        luminance = {name: linear(colour) @ [0.2126, 0.7152, 0.0722] for name, colour in theme.items()}
        # their order is what all kinds of colour vision share
        assert (sign * np.diff([luminance[f"c{i}"] for i in range(module.COLOURS)]) > 0).all()
        pairs = [("ink", f"c{i}") for i in range(module.COLOURS)]
        pairs += itertools.product(("ink", "muted", "accent"), ("page", "raised", "soft"))
        for low, high in (sorted(luminance[name] for name in pair) for pair in pairs):
            assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2, AA


def test_other_texts_or_tokens_are_refused(tmp_path):
    report = Report(cases.tokenizer())
    found = evaluate(cases.model(), cases.tokenizer(), [TEXT], ctx=32, per_token=report.add)
    with pytest.raises(EvaluationError, match="must be those of the evaluation; their hashes differ"):
        report.write(tmp_path / "page.html", found, [TEXT[:-1]])
    with pytest.raises(EvaluationError, match=rf"must have all {found.total.tokens} tokens .* it has 0"):
        Report(cases.tokenizer()).write(tmp_path / "page.html", found, [TEXT])
    assert not list(tmp_path.iterdir())


def test_without_jinja2_a_sentence_says_so_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(EvaluationError, match=r"needs Jinja2 \(pip install 'fused-ppl\[eval\]'\)"):
        Report(cases.tokenizer())


# --- in a browser ----------------------------------------------------------------------------------------------------

# in front of the page's own script, and after it
BEFORE = """<script>
window.listeners = 0;
const add = EventTarget.prototype.addEventListener;
EventTarget.prototype.addEventListener = function (...a) { window.listeners++; return add.apply(this, a); };
</script>"""
AFTER = """<script>
const seen = { listeners: window.listeners }, spans = [...document.querySelectorAll("#texts span")];
const at = spans[INDEX], next = spans[INDEX + 1], mouse = { pointerType: "mouse" };
const top_ = element => element.getClientRects()[0].top;
function send(name, to, Kind, type, more) {
  to.dispatchEvent(new Kind(type, { bubbles: true, cancelable: true, ...more }));
  seen[name] = [card.hidden, card.textContent, document.querySelector(".on")?.textContent];
}
seen.texts = [...document.querySelectorAll("#texts .text")].map(block => block.textContent);
seen.classes = spans.map(span => span.className);
send("hover", at, PointerEvent, "pointerover", mouse);
send("out", at, PointerEvent, "pointerout", { ...mouse, relatedTarget: document.body });
send("touch", at, PointerEvent, "pointerover", { pointerType: "touch" });
send("tap", at, MouseEvent, "click", { detail: 1 });
send("pinned", next, PointerEvent, "pointerover", mouse);
send("right", at, KeyboardEvent, "keydown", { key: "ArrowRight" });
send("down", document.activeElement, KeyboardEvent, "keydown", { key: "ArrowDown" });
seen.place = [spans.indexOf(document.activeElement), top_(document.activeElement) > top_(next)];
send("escape", document.activeElement, KeyboardEvent, "keydown", { key: "Escape" });
document.querySelector("details").open = true;
seen.widths = [document.documentElement.scrollWidth, document.documentElement.clientWidth];
const result = parent.document.createElement("p");
result.id = "result";
result.textContent = JSON.stringify(seen);
parent.document.body.append(result);
</script>"""


@pytest.fixture(scope="module")
def chromium():
    """Opens a page in a frame of some width; gives what AFTER has seen, and the lines of the console."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")

    def run(path, width):
        frame = path.with_name("frame.html")
        frame.write_text(f'<!doctype html><iframe src="{path.name}" width="{width}" height="800"></iframe>')
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent}/profile"]
        command += ["--enable-logging=stderr", "--allow-file-access-from-files", "--window-size=1400,1000"]
        command += ["--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        found = re.search(r'<p id="result">(.*?)</p>', done.stdout, re.DOTALL)
        assert found, done.stdout[-500:] + done.stderr[-2000:]
        return json.loads(html.unescape(found[1])), "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x)

    return run


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_works_in_a_browser(width, chromium, tmp_path):
    texts = [Document(LONG, TEXT, LONG), Document("b", HOSTILE + LONG, "c")]
    page, _, rows = made(tmp_path, texts, convention="llama.cpp")
    first = page.data["texts"][0]
    index = next(i for i, cell in enumerate(first["cells"]) if "漢" in cell)
    source = page.source.replace("<script", BEFORE + "<script", 1)
    source = source.replace("</body>", AFTER.replace("INDEX", str(index)) + "</body>")
    (tmp_path / "page.html").write_text(source, encoding="utf-8", newline="")
    seen, console = chromium(tmp_path / "page.html", width)
    assert console == ""
    assert seen["texts"] == [t.text for t in texts]
    assert seen["listeners"] < 12 < len(rows)
    assert {name.split()[0] for name in seen["classes"]} >= {"u", "c15"}
    assert seen["widths"][0] <= seen["widths"][1], "the page scrolls sideways"
    for name in ("out", "touch", "escape"):
        assert seen[name][0] and seen[name][2] is None, name
    for name in ("hover", "tap", "pinned"):
        hidden, text, on = seen[name]
        assert not hidden and on == first["cells"][index] and "tokens" in text and "E6 BC A2" in text, name
    assert not seen["right"][0] and seen["right"][2] == first["cells"][index + 1]
    assert not seen["down"][0] and seen["place"][0] > index + 1 and seen["place"][1]
