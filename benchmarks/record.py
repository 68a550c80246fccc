"""Save a benchmark's figures with the facts needed to repeat them."""

import importlib.metadata
import json
import shlex
import sys
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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # on a lent machine the repository is not installed
        return None
