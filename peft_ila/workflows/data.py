"""Load data sets by name: a local JSONL file, or a name on the hub. The trainer checks their content."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def load_dataset(name: str, config: str | None = None, split: str = "train") -> "Dataset":
    """Load a file of JSON, which is its own train split, or a configuration and a split of a data set on the hub."""
    import datasets

    file = is_file(name)
    try:
        if file:
            return datasets.load_dataset("json", data_files=name, split=split)
        return datasets.load_dataset(name, name=config, split=split)
    except (OSError, ImportError):
        raise
    except Exception as error:  # builders may raise anything, for an empty file a bare StopIteration
        reason = str(error.__cause__ or error) or "it holds no examples"
        hint = " A file needs one JSON object per line." if file else ""
        raise ValueError(f"{name} cannot be read as a data set: {reason}.{hint}") from error


def is_file(name: str) -> bool:
    """Whether a name is a file, not a directory or a data set on the hub."""
    return name.endswith((".jsonl", ".json")) or Path(name).is_file()
