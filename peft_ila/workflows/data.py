"""Load data sets by name: a local JSONL file, or a name on the hub. The trainer checks their content."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import short

if TYPE_CHECKING:
    from datasets import Dataset

_LINES = (
    " Expected one JSON object per line. `datasets.Dataset.from_csv(FILE).to_json('data.jsonl')`, or `from_parquet`, "
    "makes such a file."
)


def load_dataset(name: str, config: str | None = None, split: str = "train") -> "Dataset":
    """
    Load a data set by the library `datasets`.

    Args:
        name: A path that ends in `.jsonl` or `.json` (one JSON object per line), or the name of a data set on the hub.
        config: The configuration of a data set on the hub.
        split: The split of a data set on the hub. A file is its own train split.
    """
    import datasets

    path, file = os.path.expanduser(name), is_file(name)
    if file and not os.path.isfile(path):
        raise FileNotFoundError(f"There is no data file {path}.")
    if file and not split.startswith("train"):
        raise ValueError(
            f"{name} is a file without a split {split!r}. To train on it, pass `--dataset_train_split train`. To "
            "evaluate, pass `--eval_dataset_name FILE`; otherwise pass `--eval_strategy no`."
        )
    try:
        if file:
            return datasets.load_dataset("json", data_files=path, split=split)
        return datasets.load_dataset(path, name=config, split=split)
    except (OSError, ImportError):
        raise
    except Exception as error:  # builders may raise anything, for an empty file a bare StopIteration
        reason = str(error.__cause__ or error) or "it holds no examples"
        raise ValueError(f"{name} cannot be read as a data set: {reason}.{_LINES if file else ''}") from error


def is_file(name: str) -> bool:
    """Whether a name is a file, not a directory or a data set on the hub."""
    path = Path(name).expanduser()
    return path.suffix in (".jsonl", ".json") or path.is_file()


def described(data: "dict[str, Dataset]") -> str:
    """The columns of data that the trainer refuses, and the formats that it takes, for a message."""
    parts = []
    for name, dataset in data.items():
        missing = [column for column in dataset.column_names if dataset.data.column(column).null_count]
        parts.append(f"{name} has the columns {short(sorted(dataset.column_names))}")
        parts += [f"with missing values in {short(sorted(missing))}"] * bool(missing)
    return (
        f"{', '.join(parts)}. TRL takes `messages`, `prompt` and `completion`, or `text` (`--dataset_text_field` "
        "names another column): https://huggingface.co/docs/trl/dataset_formats"
    )
