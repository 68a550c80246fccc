"""Files that are written whole or not at all, careful reading, and a lock on an output directory."""

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

PARTIAL = ".peft_ila-partial"  # ends the name of a directory whose files are being written
_LOCK = "_peft_ila.lock"  # trainers do not upload names with this prefix


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path with the same name, which replaces `path` if the block succeeds."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file.")
    with _partial(path.parent / f".{path.name}-{secrets.token_hex(4)}{PARTIAL}", path) as directory:
        temporary = directory / path.name
        yield temporary
        os.replace(temporary, path)


@contextmanager
def whole_directory(path: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """
    Yield a temporary directory, whose files replace those in `path` if the block succeeds; others stay. The file
    `last` says that all are there: it is removed first and written last. Only one process may write at a time.
    """
    path = Path(path)
    with _partial(path / PARTIAL, path) as directory:
        yield directory
        (path / last).unlink(missing_ok=True)
        written = [file for file in directory.rglob("*") if file.is_file()]
        for file in sorted(written, key=lambda file: file == directory / last):
            target = path / file.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


@contextmanager
def _partial(directory: Path, result: Path) -> Iterator[Path]:
    """A new directory for half-written files, deleted at the end of the block."""
    made = not directory.parent.exists()
    shutil.rmtree(directory, ignore_errors=True)  # of a killed run
    directory.mkdir(parents=True)
    try:
        yield directory
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"{result} could not be written: {error}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if made and not any(directory.parent.iterdir()):
            directory.parent.rmdir()


@contextmanager
def lock_directory(directory: str | os.PathLike[str]) -> Iterator[None]:
    """
    Lock a directory against other runs, and remove half-written files of killed runs. A killed run keeps no lock. A
    directory that was created here and stays empty is removed again.
    """
    directory = Path(directory)
    if directory.is_file():
        raise NotADirectoryError(f"{directory} is a file; choose another output directory.")
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"{directory} is in use by another run. Wait for it, or choose another output directory."
        ) from None
    try:
        for left in directory.glob(f"*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # it stays where a file in use cannot be removed
            (directory / _LOCK).unlink()
            if made:
                directory.rmdir()
        lock.release()


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a regular file of JSON with any content."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):  # a device may have no end
        raise ValueError(f"{path} is not a regular file.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


@contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """`safetensors.safe_open` on the CPU."""
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); save or load it again.") from error
