"""Data sets of the command line: a local JSONL file in one of TRL's formats, or a name on the hub."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = ({"messages"}, {"prompt", "completion"}, {"text"})


def load_dataset(name: str, config: str | None = None, split: str = "train") -> "Dataset":
    """
    Load a data set for supervised fine-tuning.

    Args:
        name: A path that ends in `.jsonl` or `.json` (one JSON object a line), or the name of a data set on the hub.
        config: The configuration of a data set on the hub.
        split: The split of a data set on the hub.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, a line is not a JSON object, or the columns are not in a format of TRL.
    """
    import datasets

    path = Path(name)
    if path.suffix in (".jsonl", ".json") or path.is_file():
        dataset = datasets.Dataset.from_list(_read_jsonl(path))
    else:
        dataset = datasets.load_dataset(name, name=config, split=split)
    columns = set(dataset.column_names)
    if not any(needed <= columns for needed in _FORMATS):
        raise ValueError(
            f"{name} has the columns {sorted(columns)}; expected `messages`, `prompt` and `completion`, or `text` "
            "(https://huggingface.co/docs/trl/dataset_formats)."
        )
    return dataset


def _read_jsonl(path: Path) -> list[dict]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object but {type(row).__name__}.")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no examples.")
    return rows
