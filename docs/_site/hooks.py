# SPDX-License-Identifier: Apache-2.0
"""What mkdocs does for the site beyond its plugins: files outside docs/, links to public names, formulas, diagrams.

The pages are written for a reader of the repository, and their links lead to files of the repository. Every linked file
outside docs/ becomes a file of the site under repository/: Markdown and Python as pages, a folder as a list, and all
others as they are.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from flowchart import draw
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs/"
OUTSIDE = "repository/"
LINK = re.compile(r"(\]\()([^)\s#]*)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"<(a|h\d|pre)\b.*?</\1>|<code>([\w.]+)</code>", re.DOTALL)
DOCS_PAGE = re.compile(r"<(a|pre)\b.*?</\1>|docs/([\w/]+\.md)", re.DOTALL)
# Python-Markdown wants four spaces in the place of three, and an empty line before a list
INDENT, LIST = re.compile(r"^ {3}(?=[^ ])", re.MULTILINE), re.compile(r":\n(?=- )")
SHORT = re.compile(r"<td>(?=[^<]{1,28}</td>)")
DIRECTIVE = re.compile(r"^::: (fused_ppl\S*)", re.MULTILINE)

pages_of_names: dict[str, str] = {}  # "fused_ppl.perplexity": "reference/losses.md"
pages_of_files: dict[str, str] = {}  # "kernels/README.md": "repository/kernels/README.md"


def linked(path: str, text: str) -> set[str]:
    """The files of the repository that a page links to."""
    links = (match[2] for match in LINK.finditer(FENCE.sub("", text)))
    found = {posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in links if is_path(link)}
    return {file for file in found if (ROOT / file).exists()}


def is_path(link: str) -> bool:
    return bool(link) and "://" not in link and not link.startswith(("mailto:", "/"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file outside docs/ that a page of the site links to, and what those link to."""
    pages_of_names.clear()
    pages_of_files.clear()
    waiting = set(re.findall(rf"{OUTSIDE}([^'\"]+)", str(config.nav)))
    for file in files.documentation_pages():
        text = file.content_string
        waiting |= linked(DOCS + file.src_uri, text)
        pages_of_names.update({name: file.src_uri for name in DIRECTIVE.findall(text)})
    while waiting:
        path = waiting.pop()
        if path.startswith(DOCS) or path in pages_of_files:
            continue
        source, uri = ROOT / path, OUTSIDE + path
        if source.is_dir():
            names = sorted(file.name for file in source.iterdir() if file.is_file())
            waiting |= {f"{path}/{name}" for name in names}
            uri += "/index.md"
            lines = "\n".join(f"- [{name}]({name})" for name in names)
            files.append(File.generated(config, uri, content=f"# {path}\n\n{lines}\n"))
        elif source.suffix == ".md":
            waiting |= linked(path, source.read_text(encoding="utf-8"))
            files.append(File.generated(config, uri, abs_src_path=str(source)))
        elif source.suffix == ".py":
            uri += ".md"
            files.append(File.generated(config, uri, content=as_page(path, source.read_text(encoding="utf-8"))))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(source)))
        pages_of_files[path] = uri
    return files


def as_page(path: str, source: str) -> str:
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n~~~~~~python\n{source}~~~~~~\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links to the files of the site, and draw formulas and diagrams."""
    uri = page.file.src_uri
    path = next((file for file, made in pages_of_files.items() if made == uri), DOCS + uri)
    folder = path if (ROOT / path).is_dir() else posixpath.dirname(path)

    def prose(text: str) -> str:
        return LINK.sub(lead, LIST.sub(":\n\n", INDENT.sub("    ", text)))

    def lead(match: re.Match[str]) -> str:
        if not is_path(match[2]):
            return match[0]
        file = posixpath.normpath(posixpath.join(folder, match[2]))
        target = file.removeprefix(DOCS) if file.startswith(DOCS) else pages_of_files.get(file, OUTSIDE + file)
        return match[1] + posixpath.relpath(target, posixpath.dirname(uri)) + match[3]

    if path.endswith(".py"):
        return markdown
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [prose(markdown[end : fence.start()]), block(fence[1], fence[3])]
        end = fence.end()
    return "".join([*parts, prose(markdown[end:])])


def block(language: str, text: str) -> str:
    """A fenced block. The words after the language are for the tests."""
    if language == "math":
        return f'<div class="formula">{convert(" ".join(text.split()), display="block")}</div>\n'
    if language == "mermaid":
        return f'<div class="flowchart">{draw(text)}</div>\n'
    return f"```{language or 'text'}\n{text}```"


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the public names to the reference, and the pages that docstrings name to these pages; mark short cells."""
    about_evaluation = posixpath.basename(page.file.src_uri) == "evaluation.md"

    def name(match: re.Match[str]) -> str:
        prefixes = ("", "fused_ppl.", *(["fused_ppl.evaluation."] if about_evaluation else []))
        names = (prefix + (match[2] or "") for prefix in prefixes)
        full = next((n for n in names if n in pages_of_names), None)
        if full is None or (full != match[2] and page.file.src_uri == "reference/integrations.md"):
            return match[0]
        return f'<a href="{url(pages_of_names[full])}#{full}">{match[0]}</a>'

    def docs_page(match: re.Match[str]) -> str:
        if match[2] is None or files.get_file_from_path(match[2]) is None:
            return match[0]
        return f'<a href="{url(match[2])}">{html.escape(match[0])}</a>'

    def url(uri: str) -> str:
        file = files.get_file_from_path(uri)
        assert file is not None, uri
        return file.url_relative_to(page.file)

    content = SHORT.sub('<td class="short">', NAME.sub(name, content))
    return DOCS_PAGE.sub(docs_page, content) if page.file.src_uri.startswith("reference/") else content
