"""
Does a run that was killed before any of its file operations resume to the same files?

    python -m benchmarks.robustness.kills --output benchmarks/results/kills.json

A tiny model runs in this process. An audit hook simulates the kill: from one file operation on it blocks all others,
including clean-up, and leaves half of the file that torch or safetensors was writing. Every operation is tried, with
and without checkpoints, and in a directory with an earlier run. About 2 s for each.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks.record import save
from peft_ila import LayerImportance, rank

SCENARIOS = {
    "with checkpoints": {"save_strategy": "steps", "save_steps": 2},
    "without": {"save_strategy": "no"},
    "after an earlier run": {"save_strategy": "steps", "save_steps": 2},
}
RESULTS = ("importance.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")


class Killed(BaseException):
    """Stands for SIGKILL."""


class _Operations:
    """Counts the file operations under a directory and lets none happen from a chosen one on."""

    def __init__(self) -> None:
        self.active = False
        self.directory = ""
        self.done = 0
        self.last: int | None = None
        sys.addaudithook(self._hook)
        safetensors.torch.serialize_file = self._half(safetensors.torch.serialize_file, 1)
        torch.save = self._half(torch.save, 1)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = args
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not isinstance(path, (str, bytes)):
                return
        elif event in _EVENTS:
            path = args[0]
        else:
            return
        path = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
        if not os.path.isabs(path) or path.startswith(self.directory):  # relative ones are rmtree's
            self._count()

    def _count(self) -> None:
        if self.last is not None and self.done >= self.last:
            raise Killed
        self.done += 1

    def _half(self, function: Callable[..., Any], position: int) -> Callable[..., Any]:
        """These write by code of their own, which no hook sees."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = str(args[position])
            if not self.active or not path.startswith(self.directory):
                return function(*args, **kwargs)
            try:
                self._count()
            except Killed:
                self.active = False
                function(*args, **kwargs)
                with open(path, "rb+") as file:
                    file.truncate(os.path.getsize(path) // 2)
                self.active = True
                raise
            return function(*args, **kwargs)

        return wrapped

    @contextmanager
    def counted(self, directory: Path, last: int | None = None) -> Iterator[None]:
        self.directory, self.done, self.last, self.active = str(directory), 0, last, True
        try:
            yield
        finally:
            self.active = False


_operations: _Operations | None = None


def operations() -> _Operations:
    global _operations
    if _operations is None:
        _operations = _Operations()
        gc.freeze()  # each run collects garbage several times, most of which would be spent on imported modules
    return _operations


def attempt(make: Callable[..., Any], directory: Path, scenario: str, last: int | None = None) -> int:
    """
    Rank in a directory; killed before the operation `last`, resume.

    Args:
        make: Makes the trainer from its output directory and further training arguments.
        directory: An empty directory.
        scenario: One of `SCENARIOS`.
        last: The number of file operations that may happen.

    Returns:
        The number of file operations.
    """
    options = SCENARIOS[scenario]
    if scenario == "after an earlier run":
        rank(make(directory, seed=1, max_steps=3, **options), method="attribution", steps=4)
    killed = False
    trainer = make(directory, **options)
    with operations().counted(directory, last):
        try:
            rank(trainer, method="attribution", steps=4)
        except Killed as error:
            killed = True
            error.__traceback__ = None
    number = operations().done
    del trainer
    gc.collect()  # the lock goes with the process
    if killed:
        _check_whole(directory)
        try:
            rank(make(directory, resume_from_checkpoint=True, **options), method="attribution", steps=4)
        except ValueError as error:
            if "holds a run with another `" not in str(error):
                raise
            rank(make(directory, **options), method="attribution", steps=4)  # it is the earlier run that is there
    return number


def _check_whole(directory: Path) -> None:
    """A ranking that is there is whole, and that of the adapter that is there."""
    if (directory / "importance.json").exists() and (directory / "adapter").exists():
        ranking = LayerImportance.load(directory / "importance.json")
        tensors = safetensors.torch.load_file(directory / "adapter" / "adapter_model.safetensors")
        gates = [value.item() for key, value in tensors.items() if "lora_gate" in key]
        assert sorted(gates) == sorted(torch.tensor(ranking.scores).tolist())


def contents(directory: Path) -> dict[str, bytes]:
    """The results of a run, and that nothing is left of a killed one."""
    left = [path.name for path in directory.rglob(".*")]
    assert not left, left
    return {name: (directory / name).read_bytes() for name in RESULTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the counts")
    args = parser.parse_args()
    sys.path.insert(0, "tests")
    from conftest import tiny_dialogues, tiny_tokenizer
    from trainers import plain_trainer

    def make(directory: Path, **kwargs: Any) -> Any:
        return plain_trainer(directory, tiny_tokenizer(), tiny_dialogues(), **{"max_steps": 4, **kwargs})

    counts = {}
    for scenario in SCENARIOS:
        root = Path(tempfile.mkdtemp())
        number = attempt(make, root / "whole", scenario)
        expected = contents(root / "whole")
        same = 0
        for last in range(number):
            attempt(make, root / "killed", scenario, last)
            same += contents(root / "killed") == expected
            shutil.rmtree(root / "killed")
        counts[scenario] = {"operations": number, "identical": same}
        print(f"{scenario}: killed before each of {number} file operations, {same} resumed to the same files")
        shutil.rmtree(root)
    if args.output:
        save(args.output, counts)


if __name__ == "__main__":
    main()
