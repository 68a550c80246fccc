"""The ranking in an adapter's model card."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from .files import whole_file

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from peft import PeftModel

    from .importance import LayerImportance

_HEADING = "## Layer importance"
TOP_ROWS = 40  # of a longer ranking, the card and the terminal show these
_TAGS = ("peft-ila", "arxiv:2410.17875")


def save_card(importance: "LayerImportance", directory: str | os.PathLike[str]) -> None:
    """See [`LayerImportance.save_card`]."""
    directory = Path(directory)
    file = directory / "README.md"
    card = ModelCard(file.read_text(encoding="utf-8")) if file.exists() else ModelCard.from_template(ModelCardData())
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *_TAGS})
    before, _, after = card.text.partition(f"\n{_HEADING}\n")
    _, heading, after = after.partition("\n## ")  # what follows the section of an earlier ranking
    card.text = f"{before.rstrip()}\n\n{_section(importance)}{heading}{after}"
    importance.save(directory / "importance.json")
    importance.plot(directory / "importance.png")
    with whole_file(file) as temporary:
        temporary.write_text(str(card), encoding="utf-8")


def _section(importance: "LayerImportance") -> str:
    rows = importance.ranking()[:TOP_ROWS]
    gates = dict(zip(importance.units, importance.gates))
    lines = [
        _HEADING,
        "",
        f"The {len(importance.units)} units that were fine-tuned, ranked by one learned gate each with "
        "[ILA](https://huggingface.co/papers/2410.17875) (peft-ila; all scores and settings: `importance.json`).",
        "",
        "![Gates of the layers](importance.png)",
        "",
        "| rank | unit | gate |",
        "|---|---|---|",
        *(f"| {rank} | `{unit}` | {gates[unit]:.3f} |" for rank, unit in enumerate(rows, start=1)),
    ]
    if more := len(importance.units) - len(rows):
        lines.append(f"\n… and {more} more.")
    return "\n".join(lines) + "\n"


def push_to_hub(importance: "LayerImportance", model: "PeftModel", repo_id: str, **kwargs: Any) -> "CommitInfo":
    """See [`LayerImportance.push_to_hub`]."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        save_card(importance, directory)
        return upload(directory, repo_id, **kwargs)


def upload(
    directory: str | Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    **kwargs: Any,
) -> "CommitInfo":
    """Upload a directory to a repository, which is created if it does not exist."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo_id, folder_path=directory, **kwargs)
