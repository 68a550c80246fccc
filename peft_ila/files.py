"""Files that are written whole or not at all, careful reading, and a lock on an output directory."""

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

# suffixes: of a path being written, and of the earlier one while it is replaced
PARTIAL, _EARLIER = ".peft_ila-partial", ".peft_ila-earlier"
_LOCK = "_peft_ila.lock"  # trainers do not upload names with this prefix


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path with the same name, which replaces `path` if the block succeeds."""
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
    Yield a temporary directory, which replaces `path` if the block succeeds and writes anything.

    A process that is killed meanwhile leaves the old or the new directory, which [`recover`] restores. A block that
    fails leaves nothing.

    Args:
        path: The directory.
        own: The names that writers of this directory use. Other files in it are kept; by default, none are.
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
    """Restore the earlier directory if its writer was killed before replacing it, else delete it."""
    earlier = _earlier(path)
    if earlier.exists() and not path.exists():
        os.rename(earlier, path)
    shutil.rmtree(earlier, ignore_errors=True)


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
        with contextlib.suppress(OSError):  # Windows allows no writes to a locked file
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        for left in directory.glob(f".*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        for left in directory.glob(f".*{_EARLIER}"):
            recover(directory / left.name[1 : -len(_EARLIER)])
        yield
    finally:
        with contextlib.suppress(OSError):  # it stays where a file in use cannot be removed
            path.unlink()
            if made:
                directory.rmdir()
        lock.release()


def read_json(path: str | os.PathLike[str], most: int = 2**28) -> Any:
    """Read a regular file of JSON with any content, of at most `most` bytes."""
    path = Path(path)
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file.")
    if found.st_size > most:
        raise ValueError(f"{path} has {found.st_size} bytes; the maximum is {most}.")
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


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, deleted at the end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}-{secrets.token_hex(4)}{PARTIAL}"
    temporary.mkdir()  # follows the umask, unlike `tempfile.mkdtemp`
    try:
        yield temporary
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"{path} could not be written: {error}") from error
    except OSError as error:
        if error.errno is not None:  # from the system, which names no file if the disk is full
            error.filename = error.filename or str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _follow_umask(directory: Path) -> None:
    """safetensors makes files that only the owner can read."""
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
        os.link(source, target, follow_symlinks=False)  # works for any kind and size
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)
