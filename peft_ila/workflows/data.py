"""Data sets of the command line: a local JSONL file in one of TRL's formats, or a name on the hub."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import short

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = (("messages",), ("prompt", "completion"), ("text",))
_EXPECTED = (
    "Expected `messages`, `prompt` and `completion`, or `text`: https://huggingface.co/docs/trl/dataset_formats"
)
_LINES = (
    "Expected one JSON object a line; `datasets.Dataset.from_csv(FILE).to_json('data.jsonl')`, or `from_json`, makes "
    "such a file."
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
        ValueError: A file was asked for another split, the file is empty, a line is not a JSON object in UTF-8, or the
            columns are not in a format of TRL, or not the same in all lines.
    """
    import datasets

    path = Path(name).expanduser()
    if _is_file(path):
        if split != "train":
            raise ValueError(
                f"{name} is a file without a split {split!r}. Train on it by `--dataset_train_split train`, and "
                "evaluate on held-out data by `--eval_dataset_name FILE`, or not at all (`--eval_strategy no`)."
            )
        rows = _read_jsonl(path)
        try:
            return datasets.Dataset.from_list(rows)
        except Exception as error:  # pyarrow's, of values in values
            raise ValueError(f"The examples of {name} have values of different kinds: {error}") from error
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"{name} is an empty directory. Pass a `.jsonl` file, or the name of a data set on the hub.")
    try:
        dataset = datasets.load_dataset(os.path.expanduser(name), name=config, split=split)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # whatever is in a file makes a builder raise
        raise ValueError(f"{name} cannot be read as a data set: {error}") from error
    if _format(dataset.column_names) is None:
        raise ValueError(f"{name} has the columns {short(sorted(dataset.column_names))}. {_EXPECTED}")
    return dataset


def load_held_out(name: str, train: "Dataset", config: str | None, split: str) -> "Dataset":
    """
    Load data to evaluate on, in the format of those that are trained on.

    Args:
        name, config, split: See [`load_dataset`]; of a file all is taken.
        train: The data that are trained on.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: See [`load_dataset`]; or the format is another, so that the loss would be of other tokens.
    """
    held_out = load_dataset(name, config, "train" if _is_file(Path(name).expanduser()) else split)
    here, there = (_format(data.column_names) for data in (held_out, train))
    if here != there:
        raise ValueError(
            f"{name} holds {_named(here)}, but the data to train on {_named(there)}: their losses would be of "
            "different tokens. Bring both into one format."
        )
    return held_out


def _is_file(path: Path) -> bool:
    return path.suffix in (".jsonl", ".json") or path.is_file()


def _named(format: tuple[str, ...] | None) -> str:
    return " and ".join(f"`{key}`" for key in format or ())


def _format(columns: Collection[str]) -> tuple[str, ...] | None:
    return next((keys for keys in _FORMATS if set(keys) <= set(columns)), None)


def _problem(row: dict, format: tuple[str, ...] | None, kinds: dict[str, str]) -> str | None:
    """
    What is wrong with an example, if anything.

    Args:
        row: The example.
        format: Its columns.
        kinds: Of each column that was seen so far, what is in it; those of this example are added.
    """
    if format is None:
        return f"the example has the keys {short(sorted(row))}"
    for key in format:
        value = row.get(key)
        if value and isinstance(value, list) and key != "text":
            if wrong := [message for message in value if not _is_message(message)]:
                return f"`{key}` holds {short(wrong[0])}, which is not a message with `role` and `content`"
        elif not value or not isinstance(value, str) or key == "messages":
            return f"`{key}` is {short(value)}"
    for key, value in row.items():
        kind = "a number" if type(value) in (int, float) else f"a {type(value).__name__}"
        if value is not None and kinds.setdefault(key, kind) != kind:
            return f"`{key}` is {kind}, but {kinds[key]} in an example before"
    return None


def _is_message(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    return isinstance(content, (str, list)) or (content is None and bool(value.get("tool_calls")))


def _read_jsonl(path: Path) -> list[dict]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    rows: list[dict] = []
    format: tuple[str, ...] | None = None
    kinds: dict[str, str] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            advice = "" if rows else f" {_LINES}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 ({error}); convert the file.") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}.{advice}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} is not a JSON object but {type(row).__name__}.{advice}")
            format = format or _format(row)
            if problem := _problem(row, format, kinds):
                raise ValueError(f"{where}: {problem}. {_EXPECTED}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no examples.")
    return rows
