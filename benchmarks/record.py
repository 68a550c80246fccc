"""Figures on disk, with the facts needed to repeat them, and as tables."""

import importlib.metadata
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft_ila.files import whole_file

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "peft-ila")


def made_by() -> dict[str, Any]:
    """The command that was given, and the versions of the packages that are there."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {package: version for package in PACKAGES if (version := _version(package))},
    }


def save(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures as JSON, with what made them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps({**figures, "made_by": made_by()}))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, or none if it is not there. What a killed run has left of a row is removed."""
    *lines, last = file.read_text(encoding="utf-8").split("\n") if file.exists() else [""]
    if last:
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return [json.loads(line) for line in lines]


def table(columns: list[str], rows: Iterable[list[Any]]) -> None:
    """Print one as Markdown, a row as soon as it is there; what is missing is left empty."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = ("" if x is None else f"{x:.3f}" if isinstance(x, float) else str(x) for x in row)
        print(f"| {' | '.join(cells)} |", flush=True)
    print()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # on a lent machine the repository is not installed
        return None
