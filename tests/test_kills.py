"""
A run that was killed before any of its file operations loses nothing: called again it ends with the same files, or one
clear line says what to do.

    pytest tests/test_kills.py                # some operations
    pytest tests/test_kills.py --size large   # all of them, and how many there were; about 1 s for each

A tiny model runs in this process. An audit hook stands for the kill: from one file operation on it blocks all others,
clean-up too, and half of the file that torch or safetensors was writing is left.
"""

import gc
import os
import shutil
import sys
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch
from conftest import tiny_llama
from peft import PeftModel
from trainers import ila, plain_trainer

from peft_ila import ILAModel, LayerImportance, rank
from peft_ila.workflows.prune import prune

EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")


class Killed(BaseException):
    """Stands for SIGKILL."""


class Operations:
    """Counts the file operations under a directory, and lets none happen from a chosen one on."""

    def __init__(self):
        self.active, self.directory, self.done, self.last, self.renamed = False, "", 0, None, 0
        sys.addaudithook(self.hook)  # for good: no hook can be removed
        # these write by code of their own, which no hook sees
        safetensors.torch.serialize_file = self.seen(safetensors.torch.serialize_file)
        torch.save = self.seen(torch.save)
        gc.freeze()  # each run collects garbage several times, most of which would be spent on imported modules

    def hook(self, event, args):
        if not self.active:
            return
        opened = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (opened or event in EVENTS) and isinstance(args[0], (str, bytes)):
            path = os.fsdecode(args[0])
            if not os.path.isabs(path) or path.startswith(self.directory):  # relative ones are rmtree's
                self.renamed = self.done if event == "os.rename" else self.renamed
                self.count()

    def count(self):
        if self.last is not None and self.done >= self.last:
            raise Killed
        self.done += 1

    def seen(self, write):
        def counted(content, path, *args, **kwargs):
            if self.active and str(path).startswith(self.directory):
                try:
                    self.count()
                except Killed:
                    self.active = False
                    write(content, path, *args, **kwargs)
                    os.truncate(path, os.path.getsize(path) // 2)
                    self.active = True
                    raise
            return write(content, path, *args, **kwargs)

        return counted

    @contextmanager
    def under(self, directory, last=None):
        self.active, self.directory, self.done, self.last = True, str(directory), 0, last
        try:
            yield
        except Killed as error:
            error.__traceback__ = None
        finally:
            self.active = False
        gc.collect()  # a lock goes with the process


@pytest.fixture(scope="module")
def operations():
    return Operations()


class Rank:
    """`rank` into a directory."""

    results = ("importance.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")

    def __init__(self, tokenizer, dialogues, **options):
        self.data, self.options = (tokenizer, dialogues), {"max_steps": 4, **options}

    def prepare(self, directory):
        pass

    def run(self, directory, **options):
        rank(plain_trainer(directory, *self.data, **self.options, **options), method="attribution", steps=4)

    def resume(self, directory):
        self.run(directory, resume_from_checkpoint=True)

    def check(self, directory, *_):
        """A ranking that is there is whole, and that of the adapter that is there."""
        if (directory / "importance.json").exists() and (directory / "adapter").exists():
            ranking = LayerImportance.load(directory / "importance.json")
            tensors = safetensors.torch.load_file(directory / "adapter" / "adapter_model.safetensors")
            gates = [value.item() for key, value in tensors.items() if "lora_gate" in key]
            assert sorted(gates) == sorted(torch.tensor(ranking.scores).tolist())


class Prune:
    """`prune` of the adapter in `given`, perhaps over an earlier result with a file of the user's."""

    results = ("given/*", "small/*")

    def __init__(self, tokenizer, dialogues, earlier):
        self.data, self.earlier = (tokenizer, dialogues), earlier

    def prepare(self, directory):
        ila(init_lora_weights=False).to_lora(directory / "given")
        if self.earlier:
            self.run(directory, top_p=0.5)
            (directory / "small" / "notes.txt").write_text("mine")

    def run(self, directory, top_p=0.2):
        lora = PeftModel.from_pretrained(tiny_llama(), directory / "given", is_trainable=True)
        trainer = plain_trainer(directory / "run", *self.data, model=ILAModel.from_lora(lora))
        prune(trainer, directory / "small", top_p=top_p, steps=1, rounds=1, gate_steps=1)

    resume = run

    def check(self, directory, *others):
        """The given adapter is as it was, and what PEFT would load from `small` is an earlier or a new whole."""
        found, *wholes = (files(own, self.results) for own in (directory, *others))
        assert all(found[name] == data for name, data in wholes[0].items() if name.startswith("given/"))
        if "small/adapter_config.json" in found:
            names = ("small/adapter_config.json", "small/adapter_model.safetensors")
            assert [found.get(name) for name in names] in [[whole.get(name) for name in names] for whole in wholes]


def files(directory, patterns) -> dict[str, bytes]:
    paths = [path for pattern in patterns for path in directory.glob(pattern) if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


RUNS = {
    "rank, with checkpoints": lambda *data: Rank(*data, save_strategy="steps", save_steps=2),
    "rank, without": lambda *data: Rank(*data),
    "prune": lambda *data: Prune(*data, False),
    "prune, over an earlier result": lambda *data: Prune(*data, True),
}


@pytest.mark.parametrize("name", RUNS)
def test_killed_before_any_file_operation(operations, tmp_path, tokenizer, dialogues, large, capsys, name):
    run = RUNS[name](tokenizer, dialogues)
    prepared, whole, killed = (tmp_path / own for own in ("prepared", "whole", "killed"))
    prepared.mkdir()
    run.prepare(prepared)
    shutil.copytree(prepared, whole)
    with operations.under(whole):
        run.run(whole)
    number, expected = operations.done, files(whole, run.results)
    sample = (number // 8, number // 2, operations.renamed, operations.renamed + 1)
    refused = 0
    for last in range(number) if large else sample:
        shutil.copytree(prepared, killed)
        with operations.under(killed, last):
            run.run(killed)
        run.check(killed, prepared, whole)
        try:
            run.resume(killed)
        except ValueError as error:  # it says what to do instead: start afresh
            assert str(error) and "\n" not in str(error), last
            refused += 1
            run.check(killed, prepared, whole)
            run.run(killed)
        assert files(killed, run.results) == expected, last
        shutil.rmtree(killed)
    if large:
        with capsys.disabled():
            print(f"\n{name}: killed before each of {number} file operations, {refused} times run afresh")
