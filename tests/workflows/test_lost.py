"""Nothing that a run has made is lost: to bad input, to another run, to a kill, or to what is beside it."""

import json
import os
import re
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainers import write_model_and_data

from peft_ila import LayerImportance
from peft_ila.cli import main
from peft_ila.embedded import write_jsonl
from peft_ila.files import lock_directory

TRAINING = (
    "--per_device_train_batch_size 8 --learning_rate 2e-2 --logging_steps 1 --max_steps 4 --save_strategy steps "
    "--save_steps 2 --report_to none --disable_tqdm True --lora_r 4 --lora_dropout 0 --gradient_checkpointing False"
).split()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tokenizer, dialogues):
    directory = tmp_path_factory.mktemp("lost")
    write_model_and_data(directory, tokenizer, dialogues)
    write_jsonl(dialogues[:5], directory / "few.jsonl")
    command(directory, "rank", directory / "ranked", "--gate_steps", "4")
    return directory


def command(workspace, name, output, *extra):
    data = ["--model_name_or_path", str(workspace / "model"), "--dataset_name", str(workspace / "data.jsonl")]
    both_stages = ["--method", "attribution"] if name == "rank" else []
    main([name, *data, "--output_dir", str(output), *TRAINING, *both_stages, *extra])


def error_of(workspace, name, output, *extra) -> str:
    with pytest.raises(SystemExit) as exit_:
        command(workspace, name, output, *extra)
    message = exit_.value.code
    assert isinstance(message, str) and message.startswith(f"peft-ila {name}: error: ") and "\n" not in message
    assert "PEFT_ILA_TRACEBACK" not in message
    return message


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--logging_strategy", "no"], "`logging_strategy` must not be"),
        (["--learning_rate", "nan"], "Invalid learning rate: nan"),
        (["--learning_rate", "1e30"], "diverged|not finite"),
        (["--max_length", "2"], "No example|no label|nothing"),
        (["--per_device_train_batch_size", "0"], "batch"),
        (["--gradient_accumulation_steps", "0"], "`--gradient_accumulation_steps` must be at least 1, got 0"),
        (["--max_steps", "0", "--num_train_epochs", "0"], "Not a single step was trained"),
        (["--adapter", "TRUNCATED"], "adapter_model.safetensors is damaged"),
        (["--adapter", "EMPTY"], "There is no adapter in .*: it lacks adapter_config.json"),
        (["--dataset_name", "/nowhere/data.jsonl"], "There is no data file /nowhere/data.jsonl"),
        (["--epsilon", "-1"], "`epsilon` must be greater than 0"),
    ],
)
def test_bad_input_costs_no_finished_run(workspace, tmp_path, arguments, message):
    out = shutil.copytree(workspace / "ranked", tmp_path / "out")
    (tmp_path / "EMPTY").mkdir()
    shutil.copytree(workspace / "ranked" / "adapter", tmp_path / "TRUNCATED")
    weights = tmp_path / "TRUNCATED" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = [str(tmp_path / a) if a in ("TRUNCATED", "EMPTY") else a for a in arguments]
    before = files(out)
    found = error_of(workspace, "rank", out, *arguments)
    assert re.search(message, found), found
    assert files(out) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning_rate", "1e30"], "training has diverged"),
        (["--dataset_name", "few.jsonl", "--dataloader_drop_last", "True"], "Not a single step was trained"),
    ],
)
def test_tune_writes_no_useless_adapter(workspace, tmp_path, arguments, message):
    arguments = [str(workspace / a) if a.endswith("jsonl") else a for a in arguments]
    selection = [
        "--importance",
        str(workspace / "ranked" / "importance.json"),
        "--top_k",
        "1",
        "--save_strategy",
        "no",
    ]
    assert message in error_of(workspace, "tune", tmp_path, *selection, *arguments)
    assert not list(tmp_path.iterdir())


def test_what_others_put_there_stays(workspace, tmp_path):
    out = shutil.copytree(workspace / "ranked", tmp_path / "out")
    (out / "adapter" / "notes.txt").write_text("mine")
    (out / "gates").mkdir()
    (out / "gates" / "mine.txt").write_text("mine")
    command(workspace, "rank", out, "--gate_steps", "4", "--seed", "7")
    assert (out / "adapter" / "notes.txt").read_text() == (out / "gates" / "mine.txt").read_text() == "mine"
    assert LayerImportance.load(out / "importance.json").metadata["learn_gates"]["seed"] == 7
    for directory, adapter in ((out, out / "adapter"), (out / "adapter", out / "adapter")):
        before = files(out)
        message = error_of(workspace, "rank", directory, "--adapter", str(adapter))
        assert "would be replaced by the ranked one; choose another `output_dir`" in message
        assert files(out) == before


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_target_that_is_no_directory_is_found_before_the_training(workspace, tmp_path, kind):
    target = tmp_path / "out" / "adapter"
    target.parent.mkdir()
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    else:
        target.write_text("mine")
    assert "is not a directory, but would be replaced" in error_of(workspace, "rank", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    "arguments, name",
    [
        (["--dataset_name", "few.jsonl"], "dataset"),
        (["--seed", "7"], "seed"),
        (["--learning_rate", "1e-3"], "learning_rate"),
        (["--lora_r", "2"], "r"),
        (["--lora_target_modules", "q_proj"], "target_modules"),
        (["--granularity", "module"], "granularity"),
    ],
)
def test_a_run_is_resumed_with_its_own_settings_only(workspace, tmp_path, arguments, name):
    out = shutil.copytree(workspace / "ranked", tmp_path / "out")
    arguments = [str(workspace / a) if a.endswith("jsonl") else a for a in arguments]
    before = files(out)
    message = error_of(workspace, "rank", out, *arguments, "--resume_from_checkpoint", "True")
    assert f"holds a run with another `{name}`: " in message
    assert files(out) == before


def test_tune_is_resumed_with_its_own_settings_only(workspace, tmp_path):
    ranking = ["--importance", str(workspace / "ranked" / "importance.json")]
    command(workspace, "tune", tmp_path, *ranking, "--top_k", "1")
    expected = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_config.json").unlink()
    message = error_of(workspace, "tune", tmp_path, *ranking, "--top_k", "1")
    assert "checkpoint-2 belongs to an unfinished run. Resume it with `--resume_from_checkpoint True`" in message
    resume = ["--resume_from_checkpoint", "True"]
    message = error_of(workspace, "tune", tmp_path, *ranking, "--top_k", "2", *resume)
    assert "holds a run with another `" in message
    shutil.rmtree(tmp_path / "checkpoint-4")
    command(workspace, "tune", tmp_path, *ranking, "--top_k", "1", *resume)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == expected
    command(workspace, "tune", tmp_path, *ranking, "--top_k", "2")  # a finished run is replaced
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 2 * 7


def test_a_checkpoint_of_the_same_directory_is_ranked_and_kept(workspace, tmp_path):
    out = shutil.copytree(workspace / "ranked", tmp_path / "out")
    before = files(out / "checkpoint-4")
    command(workspace, "rank", out, "--adapter", str(out / "checkpoint-4"), "--gate_steps", "4")
    assert files(out / "checkpoint-4") == before
    command(workspace, "rank", out, "--method", "untrained", "--gate_steps", "4")
    assert files(out / "checkpoint-4") == before


def test_a_training_of_others_is_no_place_for_a_run(workspace, tmp_path):
    """Its checkpoints could be taken for those of the run."""
    shutil.copytree(workspace / "ranked" / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "adapter_config.json").write_text("{}")
    ranking = ["--importance", str(workspace / "ranked" / "importance.json"), "--top_k", "1"]
    message = error_of(workspace, "tune", tmp_path, *ranking)
    assert "checkpoint-4 belongs to another training run; choose another `--output_dir`" in message
    out = shutil.copytree(workspace / "ranked", tmp_path / "out")
    assert "holds a run of another command" in error_of(workspace, "tune", out, *ranking)


def test_a_run_that_had_ended_takes_no_further_step(workspace, tmp_path):
    ranking = ["--importance", str(workspace / "ranked" / "importance.json"), "--top_k", "1"]
    options = [*ranking, "--lr_scheduler_type", "constant"]
    command(workspace, "tune", tmp_path, *options)
    expected = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_config.json").unlink()
    command(workspace, "tune", tmp_path, *options, "--resume_from_checkpoint", "True")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == expected


def test_one_run_at_a_time(workspace, tmp_path):
    with lock_directory(tmp_path):
        message = error_of(workspace, "rank", tmp_path)
        assert f"{tmp_path} is in use by process {os.getpid()} on " in message
        assert "in use by" in error_of(
            workspace, "tune", tmp_path, "--importance", str(workspace / "ranked" / "importance.json"), "--top_k", "1"
        )
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_gives_way_to_the_one_before(workspace, tmp_path):
    results = ("importance.json", "adapter/adapter_model.safetensors", "adapter/stage_1.json")
    for damaged in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "adapter_model.safetensors",
        "trainer_state.json",
    ):
        out = shutil.copytree(workspace / "ranked", tmp_path / damaged)
        shutil.rmtree(out / "adapter")
        (out / "importance.json").unlink()
        (out / "checkpoint-best").mkdir()
        path = out / "checkpoint-4" / damaged
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        command(workspace, "rank", out, "--gate_steps", "4", "--resume_from_checkpoint", "True")
        for name in results:
            assert (out / name).read_bytes() == (workspace / "ranked" / name).read_bytes(), (damaged, name)
        named = ["--resume_from_checkpoint", str(out / "checkpoint-2")]
        (out / "checkpoint-2" / damaged).write_bytes(b"")
        shutil.rmtree(out / "adapter")
        message = error_of(workspace, "rank", out, *named)
        assert "Cannot resume from the checkpoint " in message and "checkpoint-2: " in message and damaged in message


@pytest.mark.parametrize("umask, directory, file", [(0o077, 0o700, 0o600), (0o002, 0o775, 0o664)])
def test_files_follow_the_umask(workspace, tmp_path, umask, directory, file):
    before = os.umask(umask)
    try:
        main(["export", str(workspace / "ranked" / "adapter"), "--output_dir", str(tmp_path / "plain")])
        adapter = ["--adapter", str(tmp_path / "plain"), "--gate_steps", "4"]
        command(workspace, "rank", tmp_path / "out", *adapter)
    finally:
        os.umask(before)
    for path in [*(tmp_path / "plain").rglob("*"), *(tmp_path / "out").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (directory if path.is_dir() else file), path


def test_the_home_directory(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workspace / "ranked", tmp_path / "ranked")
    main(["convert", "~/ranked/importance.json", "--top_k", "1", "--output_dir=~/lora"])
    main(["export", "~/ranked/adapter", "--output_dir", "~/plain"])
    main(["plot", "~/ranked/importance.json", "--output", "~/picture.png"])
    main(["compare", "~/ranked/importance.json", "~/ranked/importance.json", "--mean", "~/mean.json"])
    assert {path.name for path in tmp_path.iterdir()} == {"ranked", "lora", "plain", "picture.png", "mean.json"}


def test_a_masked_adapter_that_has_nothing_else_wrong_is_read(workspace, tmp_path):
    source = shutil.copytree(workspace / "ranked" / "adapter", tmp_path / "in")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(
        json.dumps(config | {"gate_mode": "hard", "gate_mask": ["model.layers.1"]})
    )
    main(["export", str(source), "--output_dir", str(tmp_path / "out")])
    assert all(".layers.1." in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))


def change_a(tensors):
    key = next(key for key in tensors if "lora_A" in key)
    return key, tensors[key]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(change_a(t)[0]), r"must have the LoRA weights \['A', 'B'\], but has \['B'\]"),
        (lambda t: t.pop(change_a(t)[0].replace("lora_A", "lora_B")), r"but has \['A'\]"),
        (lambda t: t.update({change_a(t)[0]: change_a(t)[1] * torch.nan}), "is not finite"),
        (lambda t: t.update({"evil.weight": torch.zeros(2)}), "'evil.weight' is not a weight of an adapter"),
        (lambda t: t.update({change_a(t)[0]: change_a(t)[1].to(torch.int8)}), "has the type torch.int8"),
        (
            lambda t: t.update({k: v[0] for k, v in t.items() if "lora_gate" in k}),
            r"have the shape \(1,\), but has \(\)",
        ),
        (lambda t: [t.pop(key) for key in list(t)], "holds no LoRA weights"),
    ],
)
def test_damaged_weights_are_not_exported(workspace, tmp_path, change, message):
    source = shutil.copytree(workspace / "ranked" / "adapter", tmp_path / "in")
    tensors = load_file(source / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, source / "adapter_model.safetensors")
    with pytest.raises(SystemExit, match=message):
        main(["export", str(source), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [None, {"q_proj": 0}, {"q_proj": "a"}])
def test_a_damaged_configuration_is_refused(workspace, tmp_path, option, value):
    """PEFT reads no null there."""
    source = shutil.copytree(workspace / "ranked" / "adapter", tmp_path / "in")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {option: value}))
    message = f"`{option}` must hold finite numbers above 0"
    with pytest.raises(SystemExit, match=message):
        main(["export", str(source), "--output_dir", str(tmp_path / "out")])
    assert message in error_of(workspace, "rank", tmp_path / "out", "--adapter", str(source))
    assert not list((tmp_path / "out").glob("*"))


def test_pickled_weights_are_not_read(workspace, tmp_path):
    source = shutil.copytree(workspace / "ranked" / "adapter", tmp_path / "in")
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")
    with pytest.raises(SystemExit, match=r"holds adapter_model.bin, a pickle .*call `save_pretrained`"):
        main(["export", str(source), "--output_dir", str(tmp_path / "out")])
    message = error_of(workspace, "rank", tmp_path / "out", "--adapter", str(source))
    assert "holds adapter_model.bin, a pickle" in message


def test_a_full_disk(workspace, tmp_path, capsys):
    """A limit on the size of a file does the same."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        message = error_of(workspace, "rank", tmp_path, "--save_strategy", "no")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Traceback" not in capsys.readouterr().err
    assert re.search(r"adapter could not be written: .*File too large", message)
    assert {path.name for path in tmp_path.iterdir()} <= {"_run.json"}
