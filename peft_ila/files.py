"""Files that appear whole or not at all, are read with care, and a directory that one run at a time writes to."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

# of what is being written, and of what was there before while the new one takes its place
PARTIAL, _EARLIER = ".peft_ila-partial", ".peft_ila-earlier"
_LOCK = "_peft_ila.lock"  # trainers do not upload names that begin so


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Give a temporary path beside `path`, with the same name, that replaces `path` if the block succeeds.

    Raises:
        OSError: The path is a directory, or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file.")
    with _partial(path) as directory:
        temporary = directory / path.name
        yield temporary
        _follow_umask(directory)
        os.replace(temporary, path)


@contextmanager
def whole_directory(path: str | os.PathLike[str], own: Collection[str] | None = None) -> Iterator[Path]:
    """
    Give a temporary directory beside `path`; what it holds at the end of a successful block becomes `path`.

    A directory that is there already is replaced; a process that is killed meanwhile leaves one of the two, which
    [`recover`] puts in its place. Nothing is left behind by a block that fails or stays empty.

    Args:
        path: The directory.
        own: The names that writers of this directory use; anything else that is there is kept. By default nothing is.
    """
    path = Path(path)
    recover(path)
    with _partial(path) as temporary:
        yield temporary
        if not any(temporary.iterdir()):
            return
        _follow_umask(temporary)
        earlier = _earlier(path)
        if there := path.exists():
            for entry in path.iterdir() if own is not None else ():
                if entry.name not in (own or ()) and not (temporary / entry.name).exists():
                    _copy(entry, temporary / entry.name)
            os.rename(path, earlier)
        try:
            os.rename(temporary, path)
        except OSError:
            if there:
                os.rename(earlier, path)
            raise
        shutil.rmtree(earlier, ignore_errors=True)


def recover(path: Path) -> None:
    """Put a directory back whose writer was killed before the new one took its place, or drop the earlier one."""
    earlier = _earlier(path)
    if earlier.exists() and not path.exists():
        os.rename(earlier, path)
    shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def lock_directory(directory: str | os.PathLike[str]) -> Iterator[None]:
    """
    Hold a directory so that no other run writes to it; a killed run holds nothing. What a killed run has left
    half-written there is removed. A directory that had to be made and stays empty is removed again.

    Raises:
        OSError: Another process holds the directory, or it is none.
    """
    directory = Path(directory)
    if directory.is_file():
        raise NotADirectoryError(f"{directory} is a file; choose another output directory.")
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = ""
        with contextlib.suppress(OSError):
            holder = path.read_text()
        raise BlockingIOError(
            f"{directory} is in use by {holder or 'another process'}. Wait for it, or choose another output directory."
        ) from None
    try:
        with contextlib.suppress(OSError):  # Windows lets nobody write to a locked file
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        for left in directory.glob(f".*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        for left in directory.glob(f".*{_EARLIER}"):
            recover(directory / left.name[1 : -len(_EARLIER)])
        yield
    finally:
        with contextlib.suppress(OSError):  # where a file in use cannot be removed, it stays
            path.unlink()
            if made:
                directory.rmdir()
        lock.release()


def read_json(path: str | os.PathLike[str], most: int = 2**28) -> Any:
    """
    Read a file of JSON that may hold anything.

    Args:
        path: A regular file.
        most: The greatest size in bytes.

    Raises:
        OSError: There is no such file.
        ValueError: It is no regular file, too large, or not JSON.
    """
    path = Path(path)
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file.")
    if found.st_size > most:
        raise ValueError(f"{path} has {found.st_size} bytes, more than the {most} that it may have.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


@contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """
    `safetensors.safe_open` on the CPU.

    Raises:
        OSError: There is no such file.
        ValueError: The file is truncated or damaged.
    """
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); write or download it again.") from error


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, which is gone at the end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}-{secrets.token_hex(4)}{PARTIAL}"
    temporary.mkdir()  # by the umask, unlike `tempfile.mkdtemp`
    try:
        yield temporary
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"{path} could not be written: {error}") from error
    except OSError as error:
        if error.errno is not None:  # one of the system, which names no file where the disk is full
            error.filename = error.filename or str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _follow_umask(directory: Path) -> None:
    """safetensors makes files for the owner alone."""
    mode = directory.stat().st_mode
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # not every file system has modes
            path.chmod(mode & (0o777 if path.is_dir() else 0o666))


def _earlier(path: Path) -> Path:
    return path.with_name(f".{path.name}{_EARLIER}")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    else:
        _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)  # of any kind and size
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)
