"""
Docstrings in Hugging Face's style, as they are here, in that of Google, which mkdocstrings reads.

Types lose their marks, and [`Name`] becomes a link if a page of `docs/reference` shows the name, else plain code.
Called by griffe, see `mkdocs.yml`.
"""

import re
from pathlib import Path
from typing import Any

import griffe

REFERENCE = Path(__file__).parents[1] / "reference"
SHOWN = re.findall(
    r"^::: (\S+)", "\n".join(page.read_text(encoding="utf-8") for page in sorted(REFERENCE.glob("*.md"))), flags=re.M
)


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites each docstring of the package before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring:
            text = an_entry_for_each(obj.docstring.value)
            text = re.sub(r"(?m)^( +\**\w+) \((.+?)\):", lambda found: f"{found[1]} ({plain(found[2])}):", text)
            text = re.sub(r"(?m)^( +)(\[?`[^`\n]+`\]?): ", lambda found: f"{found[1]}{plain(found[2])}: ", text)
            obj.docstring.value = re.sub(r"\[`~?([\w.]+)`\]", lambda found: reference(found[1], obj), text)


def an_entry_for_each(text: str) -> str:
    """`top_p, top_k: ...` as an entry for each of them."""

    def entries(found: re.Match[str]) -> str:
        return "\n".join(f"{found[1]}{name}:{found[3]}" for name in found[2].split(", "))

    return re.sub(r"^( +)(\w+(?:, \w+)+):(.*(?:\n\1 +\S.*)*)", entries, text, flags=re.M)


def plain(annotation: str) -> str:
    """[`~peft.LoraConfig`], *optional* → peft.LoraConfig, optional."""
    return re.sub(r"\[`~?(.+?)`\]", r"\1", annotation).replace("`", "").replace("*", "").replace(" or ", " | ")


def reference(name: str, obj: griffe.Object) -> str:
    """A link to what is shown under that name, as seen from an object."""
    scope = obj if obj.is_class else obj.parent
    own = f"{scope.name}.{name}" if scope and scope.is_class and name in scope.members else name
    for shown in SHOWN:
        parent = own.rpartition(".")[0]
        if f".{shown}".endswith(f".{own}"):
            return f"[`{name}`][{shown}]"
        if parent and f".{shown}".endswith(f".{parent}"):
            return f"[`{name}`][{shown}.{own.rpartition('.')[2]}]"
    return f"`{name}`"
