"""The mean rankings of whole models that come with the package, in `peft_ila/published/`."""

import os
from pathlib import Path

_DIRECTORY = Path(__file__).parents[1] / "published"


def find(path: str | os.PathLike[str]) -> Path:
    """
    The file of a ranking: the path itself if there is such a file, otherwise the published one of that name.

    Raises:
        FileNotFoundError: There is neither.
        ValueError: It is a directory.
    """
    if Path(path).is_dir():
        raise ValueError(
            f"{path} is a directory, not a ranking: pass the file, such as {Path(path) / 'importance.json'}."
        )
    if Path(path).exists():
        return Path(path)
    published = {file.stem: file for file in sorted(_DIRECTORY.glob("*.json"))}
    if str(path) not in published:
        raise FileNotFoundError(
            f"No such file: {str(path)!r}. It is no published ranking either; those are {', '.join(published)}."
        )
    return published[str(path)]
