"""The ranking in an adapter's model card."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData

from ..files import whole_file

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_PICTURE = "importance.png"
TOP_ROWS = 40  # the most that the card and the terminal show
_TAGS = ("peft-ila", "arxiv:2410.17875")


def write_card(directory: str | os.PathLike[str], ranking: Sequence[tuple[str, float]]) -> None:
    """Add a section with the units and their gates, most important first, to the model card in a directory."""
    picture = (Path(directory) / _PICTURE).exists()
    lines = [
        f"The {len(ranking)} units of this adapter, ranked by [ILA](https://huggingface.co/papers/2410.17875) with "
        "peft-ila, which also prunes adapters. All scores and settings are in `importance.json`.",
        "",
        *([f"![Importance of the layers]({_PICTURE})", ""] if picture else []),
        "| rank | unit | gate |",
        "|---|---|---|",
        *(f"| {rank} | {_code(unit)} | {gate:.3f} |" for rank, (unit, gate) in enumerate(ranking[:TOP_ROWS], start=1)),
    ]
    if len(ranking) > TOP_ROWS:
        lines.append(f"\n… and {len(ranking) - TOP_ROWS} more.")
    add_section(directory, "Layer importance", "\n".join(lines) + "\n")


def add_section(directory: str | os.PathLike[str], title: str, text: str) -> None:
    """Add a section to the model card in a directory, or replace the one with this title. Create a missing card."""
    heading = f"## {title}"
    file = Path(directory) / "README.md"
    try:
        card = (
            ModelCard(file.read_text(encoding="utf-8")) if file.exists() else ModelCard.from_template(ModelCardData())
        )
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is not a valid model card; fix or delete it: {error}") from error
    tags = card.data.get("tags")
    known = tags if isinstance(tags, list) else [tags] if tags else []
    card.data["tags"] = sorted({*(tag for tag in known if isinstance(tag, str)), *_TAGS})
    before, _, after = f"\n{card.text}".partition(f"\n{heading}\n")
    _, following, after = after.partition("\n## ")
    card.text = f"{before.strip()}\n\n{heading}\n\n{text}{following}{after}"
    with whole_file(file) as temporary:
        temporary.write_text(str(card), encoding="utf-8")


def _code(name: str) -> str:
    # A ranking from elsewhere may have names with any printable characters.
    if re.fullmatch(r"[\w.-]+", name):
        return f"`{name}`"
    return "<code>" + re.sub(r"[^\w. -]", lambda match: f"&#{ord(match[0])};", name) + "</code>"


def upload(
    directory: str | Path, repo_id: str, token: str | None = None, private: bool | None = None, **kwargs: Any
) -> "CommitInfo":
    """Upload a directory to a repository, which is created if missing."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo_id, folder_path=directory, **kwargs)
