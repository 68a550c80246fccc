"""Data sets of the command line: a local JSONL file in one of TRL's formats, or a name on the hub."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = (("messages",), ("prompt", "completion"), ("text",))
_EXPECTED = (
    "Expected `messages`, `prompt` and `completion`, or `text`: https://huggingface.co/docs/trl/dataset_formats"
)


def load_dataset(name: str, config: str | None = None, split: str = "train") -> "Dataset":
    """
    Load a data set for supervised fine-tuning.

    Args:
        name: A path that ends in `.jsonl` or `.json` (one JSON object a line), or the name of a data set on the hub.
        config: The configuration of a data set on the hub.
        split: The split of a data set on the hub; a file is its train split.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file was asked for another split, the file is empty, a line is not a JSON object, or the columns
            are not in a format of TRL.
    """
    import datasets

    path = Path(name)
    if path.suffix in (".jsonl", ".json") or path.is_file():
        if split != "train":
            raise ValueError(
                f"{name} is a file without a split {split!r}. Train on it by `--dataset_train_split train`, without "
                "evaluation (`--eval_strategy no`)."
            )
        dataset = datasets.Dataset.from_list(_read_jsonl(path))
    else:
        dataset = datasets.load_dataset(name, name=config, split=split)
        if not any(set(needed) <= set(dataset.column_names) for needed in _FORMATS):
            raise ValueError(f"{name} has the columns {sorted(dataset.column_names)}. {_EXPECTED}")
    return dataset


def _problem(row: dict) -> str | None:
    """What is wrong with an example, if anything."""
    needed = next((keys for keys in _FORMATS if keys[0] in row), None)
    if needed is None:
        return f"the example has the keys {sorted(row)}"
    for key in needed:
        value = row.get(key)
        if value and isinstance(value, list) and key != "text":
            if wrong := [message for message in value if not _is_message(message)]:
                return f"`{key}` holds {wrong[0]!r}, which is not a message with `role` and `content`"
        elif not value or not isinstance(value, str) or key == "messages":
            return f"`{key}` is {value!r}"
    return None


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


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
            if problem := _problem(row):
                raise ValueError(f"{path}, line {number}: {problem}. {_EXPECTED}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no examples.")
    return rows
