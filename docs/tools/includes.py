"""
Parts of the files beside `docs/` in pages: `<!-- include README.md: The idea -->` is the text under that heading.

Links are made those of the page, which the snippets of pymdownx do not do. Called by MkDocs, see `mkdocs.yml`.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Put in what a page includes."""

    def text(found: re.Match[str]) -> str:
        return relinked(section(found[1], found[2]), (DOCS / page.file.src_uri).parent)

    return re.sub(r"^<!-- include ([\w.]+)(?:: (.+?))? -->$", text, markdown, flags=re.M)


def section(file: str, heading: str | None) -> str:
    """What stands under a heading of a file up to the next one of the second level, or all of the file."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if heading is None:
        return text
    found = re.search(rf"^##? {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    if not found:
        raise PluginError(f"{file} has no heading {heading!r}, which a page of docs/ includes.")
    return found[1].strip()


def relinked(text: str, directory: Path) -> str:
    """The links of a file beside `docs/`, from a directory inside of it; `SECURITY.md` is the page `security.md`."""

    def link(found: re.Match[str]) -> str:
        page = DOCS / found[1].lower()
        target = page if page.exists() else ROOT / found[1]
        return f"]({os.path.relpath(target, directory)}"

    return re.sub(r"\]\(([^)#:]+)(?=[)#])", link, text)
