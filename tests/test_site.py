# SPDX-License-Identifier: Apache-2.0
"""The documentation site, built strictly and read as a browser would: links, anchors, pictures, other hosts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import fused_ppl

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("latex2mathml", "material", "mkdocs", "mkdocstrings")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the extra `site` is not installed: {', '.join(MISSING)}")

# what a browser fetches by itself, and what it goes to when somebody asks
LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data")}
LOADED |= {("embed", "src"), ("video", "src"), ("audio", "src"), ("img", "srcset"), ("source", "srcset")}
REPO_URL = "https://code.invalid/somebody/fused_ppl"


@dataclass
class Html(HTMLParser):
    """The links, anchors and headings of a page."""

    loaded: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    count: dict[str, int] = field(default_factory=dict)
    components: set[str] = field(default_factory=set)
    text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.count[tag] = self.count.get(tag, 0) + 1
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.components |= {given.get("data-md-component", ""), *given.get("class", "").split()}
        is_address = tag == "link" and given.get("rel") in ("canonical", "prev", "next")
        for name, value in given.items():
            if (tag, name) in LOADED and not is_address:
                self.loaded.append(value)
            elif name == "href":
                self.links.append(value)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@dataclass(frozen=True)
class Site:
    folder: Path
    output: str
    pages: dict[str, Html]  # by the path of their file

    def file_of(self, page: str, link: str) -> Path:
        path = unquote(urlsplit(link).path)
        file = self.folder / path.lstrip("/") if path.startswith("/") else (self.folder / page).parent / path
        file = Path(os.path.normpath(file)) if path else self.folder / page
        return file / "index.html" if file.is_dir() else file


def parse(file: Path) -> Html:
    page = Html()
    page.feed(file.read_text(encoding="utf-8"))
    return page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    # the variable silences a note about the future of the theme, which is no warning about our pages
    env = {**os.environ, "REPO_URL": REPO_URL, "SITE_URL": "", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {file.relative_to(folder).as_posix(): parse(file) for file in sorted(folder.rglob("*.html"))}
    return Site(folder, done.stdout + done.stderr, pages)


def module(name: str) -> ModuleType:
    """A file of docs/_site, which is no package."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "_site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def elsewhere(link: str) -> bool:
    return bool(urlsplit(link).netloc)


def test_a_strict_build_prints_no_warning(site: Site) -> None:
    assert not re.findall(r"^(?:WARNING|ERROR).*", site.output, re.MULTILINE)


def test_every_public_name_has_its_place_in_the_reference(site: Site) -> None:
    reference = {anchor for page, html in site.pages.items() if "reference/" in page for anchor in html.anchors}
    from fused_ppl import evaluation

    names = [f"fused_ppl.{name}" for name in fused_ppl.__all__]
    names += [f"fused_ppl.evaluation.{name}" for name in evaluation.__all__]
    assert [name for name in names if name not in reference] == []


def test_every_link_anchor_and_picture_exists(site: Site) -> None:
    broken, checked = [], 0
    for page, html in site.pages.items():
        for link in (*html.links, *html.loaded):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            checked += 1
            file = site.file_of(page, link)
            anchors = site.pages[file.relative_to(site.folder).as_posix()].anchors if file.suffix == ".html" else set()
            if not file.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken.append(f"{page}: {link}")
    assert broken == []
    assert checked > 1000


def test_nothing_is_loaded_from_another_host(site: Site) -> None:
    assert [f"{page}: {link}" for page, html in site.pages.items() for link in html.loaded if elsewhere(link)] == []
    for sheet in site.folder.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")) == [], sheet
    # the theme's script would load Mermaid for one class, and the number of stars for the other
    for page, html in site.pages.items():
        assert not html.components & {"mermaid", "source", "arithmatex"}, page


def test_the_code_host_is_one_setting(site: Site) -> None:
    assert REPO_URL in site.pages["index.html"].links


def test_every_page_has_one_heading(site: Site) -> None:
    assert {page: html.count.get("h1") for page, html in site.pages.items() if html.count.get("h1") != 1} == {}


def test_every_block_of_code_is_shown_as_one(site: Site) -> None:
    for source in sorted((ROOT / "docs").rglob("*.md")):
        blocks = re.findall(r"^```(\w*).*?^```$", source.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        shown = [language for language in blocks if language not in ("math", "mermaid")]
        uri = source.relative_to(ROOT / "docs").with_suffix("").as_posix()
        page = "index.html" if uri == "index" else re.sub(r"/(?:README|index)$", "", uri) + "/index.html"
        assert site.pages[page].count.get("pre", 0) >= len(shown), page
    assert [page for page, html in site.pages.items() if re.search("^```", "".join(html.text), re.MULTILINE)] == []


def test_formulas_and_diagrams_are_drawn_without_a_script(site: Site) -> None:
    source = (ROOT / "docs" / "perplexity.md").read_text(encoding="utf-8")
    assert site.pages["perplexity/index.html"].count["math"] == source.count("```math") > 0
    diagram = parse(site.folder / "repository" / "ARCHITECTURE" / "index.html")
    assert "flowchart" in diagram.components
    assert "kernels/" in "".join(diagram.text)


def test_the_search_finds_every_public_name(site: Site) -> None:
    entries = json.loads((site.folder / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    found = {entry["location"].partition("#")[2] for entry in entries}
    assert [name for name in fused_ppl.__all__ if f"fused_ppl.{name}" not in found] == []


def test_the_reference_shows_types_defaults_and_fields(site: Site) -> None:
    words = " ".join("".join(site.pages["reference/token_values/index.html"].text).split())
    assert "reduction str" in words  # a row of the table
    assert "logit_scale float | Tensor as in log_probs" in words  # one of several that a line describes
    assert "entropy Tensor -sum_v p[v] log p[v]" in words  # a field, from the comment beside it
    assert ">>> values = fused_ppl.log_probs" in words


def test_a_diagram_that_cannot_be_drawn_raises() -> None:
    flowchart = module("flowchart")
    drawn = flowchart.draw('flowchart TD\n  A["one<br>two"]\n  B["<three>"]\n  A --> B\n')
    assert drawn.count("<rect") == 2 and drawn.count('class="edge"') == 1
    assert "<three>" not in drawn
    with pytest.raises(ValueError, match="boxes and chains only"):
        flowchart.draw("flowchart TD\n  A -.-> B\n")
