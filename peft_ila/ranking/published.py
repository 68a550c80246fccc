"""The rankings of whole models that come with the package, in `peft_ila/published/`."""

import os
from pathlib import Path

_DIRECTORY = Path(__file__).parents[1] / "published"


def find(path: str | os.PathLike[str]) -> Path:
    """The file of a ranking: the path itself if it exists, else the published ranking with that name."""
    name, file = os.fspath(path), Path(path)
    published = {file.stem: file for file in sorted(_DIRECTORY.glob("*.json"))}
    if name in published and not file.is_file():  # a directory with that name may hold the model
        return published[name]
    if not name or not file.exists():
        raise FileNotFoundError(f"No such file: {name!r}. The published rankings are {', '.join(published)}.")
    if file.is_dir():
        raise ValueError(f"{name} is a directory, not a ranking: pass the file, such as {name}/importance.json.")
    return file
