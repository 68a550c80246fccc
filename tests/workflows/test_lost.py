"""Nothing that a run has made is lost: to bad input, to another run, to a kill, or to what is beside it."""

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainers import plain_trainer, write_model_and_data

from peft_ila.cli import main
from peft_ila.embedded import write_jsonl
from peft_ila.files import lock_directory
from peft_ila.workflows.training import train_or_resume

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


RESUME = ["--resume_from_checkpoint", "True"]


def top_layer(workspace) -> list[str]:
    return ["--importance", str(workspace / "ranked" / "importance.json"), "--top_k", "1"]


def test_an_earlier_run_stays_as_it_is(workspace, tmp_path):
    out = shutil.copytree(workspace / "ranked", tmp_path / "out")
    before = files(out)
    for name, extra in (("rank", []), ("rank", ["--adapter", str(out / "adapter")]), ("tune", top_layer(workspace))):
        message = error_of(workspace, name, out, *extra)
        assert "belongs to an earlier run. Resume it with `--resume_from_checkpoint True`, or choose" in message
    for name, extra, setting in (
        ("rank", ["--dataset_name", str(workspace / "few.jsonl")], "dataset"),
        ("rank", ["--seed", "7"], "seed"),
        ("rank", ["--granularity", "module"], "granularity"),
        ("rank", ["--adapter", str(out / "adapter")], "adapter"),
        ("tune", top_layer(workspace), "command"),
    ):
        message = error_of(workspace, name, out, *extra, *RESUME)
        assert f"holds a run with another `{setting}`: " in message
    assert files(out) == before


@pytest.mark.parametrize("extra", [[], RESUME])
def test_what_others_made_stays_as_it_is(workspace, tmp_path, extra):
    """A directory with a training of other programs is refused; other files are no hindrance."""
    for name in ("rank/adapter", "tune/config.json", "other/notes/mine.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    shutil.copytree(workspace / "ranked" / "checkpoint-4", tmp_path / "trained" / "checkpoint-4")
    before = files(tmp_path)
    for name, output in (("rank", "rank"), ("tune", "tune"), ("rank", "trained")):
        selection = top_layer(workspace) if name == "tune" else []
        message = error_of(workspace, name, tmp_path / output, *selection, *extra)
        assert "belongs to an earlier run. Choose another `--output_dir`." in message
    assert files(tmp_path) == before
    command(workspace, "tune", tmp_path / "other", *top_layer(workspace), "--max_steps", "1", *extra)
    assert files(tmp_path).items() >= before.items()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max_length", "2"], "No example of .* is left to train on: none .* within `--max_length 2`"),
        (["--adapter", "TRUNCATED"], "adapter_model.safetensors is damaged"),
    ],
)
def test_bad_input_leaves_nothing_behind(workspace, tmp_path, arguments, message):
    shutil.copytree(workspace / "ranked" / "adapter", tmp_path / "TRUNCATED")
    weights = tmp_path / "TRUNCATED" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = [str(tmp_path / a) if a == "TRUNCATED" else a for a in arguments]
    found = error_of(workspace, "rank", tmp_path / "out", *arguments)
    assert re.search(message, found), found
    assert not [path for path in (tmp_path / "out").glob("*") if path.name != "_run.json"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning_rate", "1e30"], "training has diverged"),
        (["--dataset_name", "few.jsonl", "--dataloader_drop_last", "True"], "Not a single step was trained"),
    ],
)
def test_tune_writes_no_useless_adapter(workspace, tmp_path, arguments, message):
    arguments = [str(workspace / a) if a.endswith("jsonl") else a for a in arguments]
    assert message in error_of(workspace, "tune", tmp_path, *top_layer(workspace), "--save_strategy", "no", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["_run.json"]


def test_tune_is_resumed_with_its_own_selection_only(workspace, tmp_path):
    command(workspace, "tune", tmp_path, *top_layer(workspace))
    assert "github.com/huggingface/trl" in (tmp_path / "README.md").read_text()  # to whose card PEFT adds
    expected = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_config.json").unlink()
    message = error_of(workspace, "tune", tmp_path, *top_layer(workspace))
    assert re.search(r"checkpoint-\d belongs to an earlier run. Resume it with", message)
    message = error_of(workspace, "tune", tmp_path, *top_layer(workspace), "--top_k", "2", *RESUME)
    assert "holds a run with another `" in message
    shutil.rmtree(tmp_path / "checkpoint-4")
    command(workspace, "tune", tmp_path, *top_layer(workspace), *RESUME)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == expected


def test_stage_1_is_not_repeated(workspace, tmp_path, monkeypatch):
    out = shutil.copytree(workspace / "ranked", tmp_path / "out")
    results = [out / name for name in ("importance.json", "adapter/adapter_model.safetensors", "adapter/stage_1.json")]
    expected = [path.read_bytes() for path in results]
    results[0].unlink()
    monkeypatch.setattr("peft_ila.workflows.rank.train_or_resume", None)
    command(workspace, "rank", out, "--gate_steps", "4", *RESUME)
    assert [path.read_bytes() for path in results] == expected


def test_one_run_at_a_time(workspace, tmp_path):
    with lock_directory(tmp_path):
        for name, selection in (("rank", []), ("tune", top_layer(workspace))):
            assert f"{tmp_path} is in use by another run" in error_of(workspace, name, tmp_path, *selection)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, tokenizer, dialogues):
    def trainer(resume=None, directory=tmp_path / "whole"):
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return plain_trainer(directory, tokenizer, dialogues, resume_from_checkpoint=resume, **saving)

    whole = trainer()
    train_or_resume(whole)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json"):
        out = shutil.copytree(tmp_path / "whole", tmp_path / name)
        (out / "checkpoint-best").mkdir()
        data = (out / "checkpoint-4" / name).read_bytes()
        (out / "checkpoint-4" / name).write_bytes(data[: len(data) // 2])
        (out / "checkpoint-2" / name).write_bytes(b"")
        for checkpoint in ("checkpoint-2", "checkpoint-4"):
            with pytest.raises(ValueError, match=rf"Cannot resume from the checkpoint .*{checkpoint}: .*{name}"):
                train_or_resume(trainer(str(out / checkpoint)))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", out / "checkpoint-2", dirs_exist_ok=True)
    resumed, losses = trainer(True, out), []
    original = resumed.training_step
    resumed.training_step = lambda *args: losses.append(original(*args)) or losses[-1]
    assert train_or_resume(resumed) and len(losses) == 2
    expected = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    found = load_file(out / "checkpoint-4" / "adapter_model.safetensors")
    assert all((found[name] == value).all() for name, value in expected.items())


def test_the_home_directory(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workspace / "ranked", tmp_path / "ranked")
    main(["convert", "~/ranked/importance.json", "--top_k", "1", "--output_dir=~/lora"])
    main(["export", "~/ranked/adapter", "--output_dir", "~/plain"])
    (tmp_path / "ranked" / "plot.yaml").write_text("output: ~/picture.png\n")
    main(["plot", "~/ranked/importance.json", "--config=~/ranked/plot.yaml"])
    main(["compare", "~/ranked/importance.json", "~/ranked/importance.json", "--mean", "~/mean.json"])
    assert {path.name for path in tmp_path.iterdir()} == {"ranked", "lora", "plain", "picture.png", "mean.json"}


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
@pytest.mark.parametrize("value", [None, {"q_proj": 0}])
def test_a_damaged_configuration_is_refused(workspace, tmp_path, option, value):
    """PEFT reads no null there."""
    source = shutil.copytree(workspace / "ranked" / "adapter", tmp_path / "in")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {option: value}))
    message = f"`{option}` must hold finite numbers above 0"
    with pytest.raises(SystemExit, match=message):
        main(["export", str(source), "--output_dir", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*"))


def test_pickled_weights_are_not_read(workspace, tmp_path):
    source = shutil.copytree(workspace / "ranked" / "adapter", tmp_path / "in")
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")
    with pytest.raises(SystemExit, match=r"holds adapter_model.bin, a pickle .*call `save_pretrained`"):
        main(["export", str(source), "--output_dir", str(tmp_path / "out")])


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
