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
        if isinstance(value, list) and key != "text":
            for message in value:
                if (
                    not isinstance(message, dict)
                    or not isinstance(message.get("role"), str)
                    or "content" not in message
                ):
                    return f"`{key}` holds {message!r}, which is not a message with `role` and `content`"
            if value:
                continue
        if not isinstance(value, str) or not value or key == "messages":
            return f"`{key}` is {value!r}"
    return None


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
