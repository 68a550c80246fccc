import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import tiny_llama
from huggingface_hub import HfApi, RepoUrl
from models import build
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from trainers import write_model_and_data
from transformers import AutoTokenizer, LlamaConfig
from trl import SFTTrainer

from peft_ila import LayerImportance
from peft_ila.cli import main, parse
from peft_ila.export.skeleton import meta_skeleton
from peft_ila.ranking.table import ranking_table
from peft_ila.search.directions import Directions
from peft_ila.workflows.arguments import RankArguments
from peft_ila.workflows.budget import select_within
from peft_ila.workflows.data import load_dataset
from peft_ila.workflows.demo import demo_commands
from peft_ila.workflows.plan import plan

TRAINING = (
    "--per_device_train_batch_size 8 --learning_rate 2e-2 --logging_steps 1 --max_steps 6 "
    "--report_to none --disable_tqdm True --lora_r 4 --lora_dropout 0 --gradient_checkpointing False"
).split()
BOTH_STAGES = ["--method", "attribution"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tokenizer, dialogues):
    """A model, its tokenizer and data on disk."""
    directory = tmp_path_factory.mktemp("cli")
    write_model_and_data(directory, tokenizer, dialogues)
    return directory


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def data(workspace) -> list[str]:
    return ["--model_name_or_path", str(workspace / "model"), "--dataset_name", str(workspace / "data.jsonl")]


def rank(workspace, output, *extra):
    main(["rank", *data(workspace), "--output_dir", str(output), *TRAINING, *BOTH_STAGES, "--gate_steps", "8", *extra])


@pytest.fixture(scope="module")
def ranked(workspace):
    rank(workspace, workspace / "ranked")
    return workspace / "ranked"


def test_rank_writes_ranking_heatmap_and_adapter(workspace, ranked, input_ids):
    importance = LayerImportance.load(ranked / "importance.json")
    assert importance.units == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert importance.metadata["dataset"] == str(workspace / "data.jsonl")
    assert importance.metadata["model"] == str(workspace / "model")
    assert importance.metadata["stage_1"] == {"steps": 6, "stable": False}
    assert (ranked / "importance.png").read_bytes().startswith(b"\x89PNG")
    model = PeftModel.from_pretrained(tiny_llama(), ranked / "adapter")
    assert model.layer_importance().scores == importance.scores
    assert model.peft_config["default"].gate_mode == "open"
    assert {entry.name for entry in ranked.iterdir()} >= {"adapter", "importance.json", "importance.png"}
    assert not [entry for entry in ranked.iterdir() if entry.name.startswith(".")]


def test_rank_trains_nothing_unless_asked(workspace, tmp_path, capsys):
    """It is to choose what to tune; a fine-tuned adapter is ranked by what it has learned."""
    command = ["rank", *data(workspace), "--output_dir", str(tmp_path / "out"), *TRAINING, "--gate_steps", "8"]
    main(command)
    importance = LayerImportance.load(tmp_path / "out" / "importance.json")
    assert importance.metadata["learn_gates"]["method"] == "untrained"
    assert importance.metadata["stage_1"] == {"steps": 0, "stable": False}
    weights = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert not any(value.any() for name, value in weights.items() if "lora_B" in name)
    for flag, value in (("--eval_strategy", "epoch"), ("--eval_dataset_name", str(workspace / "data.jsonl"))):
        assert f"`{flag}` evaluates stage 1" in error_of([*command, flag, value], capsys)


@pytest.mark.parametrize(
    "passed, method",
    [
        ({}, "untrained"),
        ({"adapter": "A"}, "attribution"),
        ({"tuned_model": "M"}, "attribution"),
        ({"epsilon": 1.0}, "attribution"),
        ({"window": 2, "method": "descent"}, "descent"),
    ],
)
def test_the_method_that_settings_ask_for(passed, method):
    assert RankArguments(**passed).gate_settings()["method"] == method


def test_settings_from_yaml(workspace, tmp_path, capsys):
    config = tmp_path / "rank.yaml"
    config.write_text(
        f"model_name_or_path: {workspace / 'model'}\ndataset_name: {workspace / 'data.jsonl'}\n"
        f"output_dir: {tmp_path / 'out'}\ngranularity: module\ngate_steps: 8\nlora_target_modules: [q_proj, up_proj]\n"
        "epsilon: 100\nwindow: 1\npatience: 2\n"
    )
    main(["rank", "--config", str(config), *TRAINING])
    importance = LayerImportance.load(tmp_path / "out" / "importance.json")
    assert importance.metadata["learn_gates"]["steps"] == 8
    assert importance.metadata["stage_1"] == {"steps": 3, "stable": True}
    # one line for each of 2 · 3 modules
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" +\d+  model", line)]
    probability = importance.probability(top_p=0.3)
    assert [row[1] for row in rows] == importance.ranking() and len(rows) == 6
    assert [float(row[4]) for row in rows] == pytest.approx([probability[row[1]] for row in rows], abs=0.005)


def test_uncertain_units_are_named():
    importance = LayerImportance([f"model.layers.{i}" for i in range(3)], [4.0, 1.1, 1.0], spread=[0.1, 0.5, 0.5])
    *_, last = ranking_table(importance).splitlines()
    unsure = importance.coin_tosses(top_p=0.3)
    assert unsure == [] and "Uncertain" not in last
    importance.spread = [9.0, 9.0, 9.0]
    *_, last = ranking_table(importance).splitlines()
    unsure = ", ".join(importance.coin_tosses(top_p=0.3))
    assert unsure and last == f"Uncertain (in the top 30% with a probability of ¼ to ¾): {unsure}"


def test_rank_by_descent(workspace, ranked, tmp_path):
    settings = "--method descent --budget 1.0 --initial_score 2 --gate_learning_rate 0.3".split()
    rank(workspace, tmp_path, "--adapter", str(ranked / "adapter"), *settings)
    importance = LayerImportance.load(tmp_path / "importance.json")
    found = importance.metadata["learn_gates"]
    assert (found["method"], found["steps_taken"], found["budget"]) == ("descent", 8, 1.0)
    assert (found["initial_score"], found["learning_rate"]) == (2.0, 0.3)
    assert importance.spread == []


@pytest.mark.parametrize("budget, number", [("0.4", 0.4), ("2", 2), ("1.0", 1.0), (0.3, 0.3)])
def test_a_budget_is_a_share_or_a_number(budget, number):
    found = RankArguments(method="descent", budget=budget).gate_settings()["budget"]
    assert found == number and type(found) is type(number)


def test_prune(workspace, ranked, input_ids, tmp_path, capsys, monkeypatch):
    small = tmp_path / "small"
    command = ["prune", str(ranked / "adapter"), *data(workspace), "--output_dir", str(small), *TRAINING]
    command += ["--measure_steps", "4"]
    held_out = ["--eval_dataset_name", str(workspace / "data.jsonl"), "--per_device_eval_batch_size", "8"]

    with monkeypatch.context() as patched:  # killed before anything is written
        patched.setattr(Directions, "learn_gates", interrupted)
        with pytest.raises(SystemExit, match="130"):
            main([*command, *held_out])
    assert not small.exists()
    main([*command, *held_out, "--min_kept", "0.8"])
    out = capsys.readouterr().out
    assert "of its gain in held-out loss" in out and "Next, in Python: PeftModel.from_pretrained" in out
    pruning = json.loads((small / "pruning.json").read_text())
    assert pruning["curve"][-1]["gain"] == 1 and pruning["result"]["gain"] >= 0.8
    model = PeftModel.from_pretrained(tiny_llama(), small)
    assert type(model.peft_config["default"]) is LoraConfig
    assert model(input_ids).logits.isfinite().all()

    # again, without held-out data, and as JSON
    main([*command, "--top_p", "0.3", "--uniform_rank", "True", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["result"] is None and facts["share"] <= 0.3 and facts["curve"] == []
    assert LoraConfig.from_pretrained(small).rank_pattern == {}

    for arguments, message in (
        ([*command, "--top_p", "2"], "`top_p` must be in"),
        ([*command, "--measure_steps", "0"], "`measure_steps` must be"),
        ([*command, "--min_kept", "0.9"], "`min_kept` needs held-out data"),
        (["prune", str(small), *command[2:]], "holds an adapter that would be replaced"),
        (["prune", str(workspace), *command[2:]], "There is no adapter in"),
    ):
        with pytest.raises(SystemExit, match=f"peft-ila prune: error: .*{message}"):
            main(arguments)


@pytest.mark.support("Trainers", "killed at any moment, resumed by the same command")
@pytest.mark.parametrize("killed_at", ["checkpoint-2", "adapter"])
def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(workspace, tmp_path, killed_at):
    """SIGKILL in stage 1, and between the stages or in stage 2; then the same command with one flag more."""

    def command(output, *extra):
        saving = ["--save_strategy", "steps", "--save_steps", "2", "--gate_steps", "6", "--output_dir", str(output)]
        stability = ["--epsilon", "0.05", "--window", "2", "--patience", "2"]
        return ["rank", *data(workspace), *TRAINING, *BOTH_STAGES, *saving, *stability, *extra]

    if not (workspace / "whole").exists():
        main(command(workspace / "whole"))
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_ila.cli", *command(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / killed_at).exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (tmp_path / "importance.json").exists()
    main(command(tmp_path, "--resume_from_checkpoint", "True"))
    for name in ("importance.json", "adapter/adapter_model.safetensors", "adapter/stage_1.json"):
        assert (tmp_path / name).read_bytes() == (workspace / "whole" / name).read_bytes(), name


def test_a_run_that_was_killed_after_a_last_checkpoint(workspace, tmp_path):
    """Of stage 2, before the ranking was written, and of stage 1, before its adapter was."""
    saving = ["--save_strategy", "steps", "--save_steps", "2"]
    rank(workspace, tmp_path, *saving)
    results = [tmp_path / name for name in ("importance.json", "adapter/adapter_model.safetensors")]
    expected = [path.read_bytes() for path in results]
    facts = (tmp_path / "adapter" / "stage_1.json").read_text()
    for lost in (["importance.json"], ["importance.json", "adapter"]):
        for name in lost:
            path = tmp_path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        rank(workspace, tmp_path, *saving, "--resume_from_checkpoint", "True")
        assert [path.read_bytes() for path in results] == expected
        assert (tmp_path / "adapter" / "stage_1.json").read_text() == facts
    # more steps than it had are more steps
    shutil.rmtree(tmp_path / "adapter")
    rank(workspace, tmp_path, *saving, "--resume_from_checkpoint", "True", "--max_steps", "8")
    assert json.loads((tmp_path / "adapter" / "stage_1.json").read_text())["steps"] == 8


def test_a_compiled_model_is_saved(workspace, tmp_path, monkeypatch):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "")  # the training arguments set them: put back what was there
        monkeypatch.delenv(name)
    AcceleratorState._reset_state(True)
    compiled = ["--torch_compile", "True", "--torch_compile_backend", "eager", "--save_strategy", "no"]
    try:
        rank(workspace, tmp_path, *compiled, "--gate_steps", "4")
        assert AcceleratorState().dynamo_plugin.backend.name == "EAGER"
    finally:
        AcceleratorState._reset_state(True)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 3 * (7 * 2 + 1)  # A and B of each module, a gate for each decoder layer


def test_a_file_has_no_split_to_evaluate_on(workspace, tmp_path):
    with pytest.raises(SystemExit, match='data.jsonl cannot be read as a data set: Unknown split "test"'):
        rank(workspace, tmp_path, "--eval_strategy", "steps")


def test_an_adapter_that_was_not_ranked_is_not_trained_anew(workspace, tmp_path, monkeypatch):
    """Stage 1 may end before the trainer saves its first checkpoint."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr("peft_ila.workflows.rank.learn_gates", interrupted)
        rank(workspace, tmp_path)
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="belongs to an earlier run. Resume it with"):
        rank(workspace, tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    rank(workspace, tmp_path, "--resume_from_checkpoint", "True")
    assert (tmp_path / "importance.json").exists()


def test_convert(ranked, tmp_path, capsys):
    main(["convert", str(ranked / "importance.json"), "--top_k", "2", "--output_dir", str(tmp_path), "--lora_r", "3"])
    config = LoraConfig.from_pretrained(tmp_path)
    top = LayerImportance.load(ranked / "importance.json").select(top_k=2)
    assert config.layers_to_transform == sorted(int(unit[-1]) for unit in top)
    assert (config.r, config.peft_type, config.task_type) == (3, "LORA", "CAUSAL_LM")
    assert "adapter_config.json" in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter_config.json"]


def test_neither_convert_nor_export_replaces_its_source(ranked, tmp_path, capsys):
    shutil.copytree(ranked / "adapter", tmp_path / "adapter")
    output = ["--output_dir", str(tmp_path / "adapter")]
    before = {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    convert = ["convert", str(ranked / "importance.json"), "--top_k", "2", *output]
    assert "holds a trained adapter (adapter_model.safetensors)" in error_of(convert, capsys)
    assert "holds the adapter that would be replaced" in error_of(["export", output[1], *output], capsys)
    assert {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lora_r", "0"], "`--lora_r` must be at least 1, got 0"),
        (["--lora_dropout", "7"], r"`--lora_dropout` must be in \[0, 1\), got 7.0"),
        (["--lora_r", "64", "--format", "axolotl-full"], "trains no LoRA: leave out `--lora_r`"),
    ],
)
def test_no_lora_that_could_not_be(ranked, tmp_path, options, message, capsys):
    arguments = ["--top_k", "2", "--output_dir", str(tmp_path / "out"), *options]
    assert re.search(message, error_of(["convert", str(ranked / "importance.json"), *arguments], capsys))
    assert not (tmp_path / "out").exists()


def test_only_sure_units_are_converted(ranked, tmp_path):
    path = tmp_path / "importance.json"
    LayerImportance([f"model.layers.{i}" for i in range(3)], [4.0, 1.1, 1.0], spread=[0.1, 0.5, 0.5]).save(path)
    arguments = ["--top_k", "2", "--min_probability", "0.9", "--output_dir", str(tmp_path)]
    main(["convert", str(path), *arguments])
    assert LoraConfig.from_pretrained(tmp_path).target_modules == {"model.layers.0"}


def test_convert_without_the_model_at_hand(ranked, tmp_path, caplog):
    content = json.loads((ranked / "importance.json").read_text())
    content["metadata"]["model"] = "someone/elsewhere"
    (tmp_path / "moved.json").write_text(json.dumps(content))
    main(["convert", str(tmp_path / "moved.json"), "--top_p", "0.3", "--output_dir", str(tmp_path / "lora")])
    assert "'someone/elsewhere' was not found, so targets are checked by name only" in caplog.text
    assert len(LoraConfig.from_pretrained(tmp_path / "lora").layers_to_transform) == 1


def test_convert_with_a_model_that_has_moved(workspace, ranked, tmp_path, caplog, capsys):
    content = json.loads((ranked / "importance.json").read_text())
    content["metadata"]["model"] = "/gone"
    (tmp_path / "moved.json").write_text(json.dumps(content))
    arguments = ["convert", str(tmp_path / "moved.json"), "--top_k", "1", "--output_dir", str(tmp_path / "lora")]
    main([*arguments, "--model_name_or_path", str(workspace / "model")])
    assert "was not found" not in caplog.text
    assert len(LoraConfig.from_pretrained(tmp_path / "lora").layers_to_transform) == 1
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    error = error_of([*arguments, "--model_name_or_path", str(tmp_path / "gpt2")], capsys)
    assert "the ranking was made on another architecture" in error
    assert "no model directory /gone" in error_of([*arguments, "--model_name_or_path", "/gone"], capsys)


STEP_OF_BUDGET = {"max_length": 32, "gradient_checkpointing": False, "r": 4}


def layers(path) -> set[str]:
    return {f"model.layers.{index}" for index in LoraConfig.from_pretrained(path).layers_to_transform}


def test_convert_by_a_memory_budget(workspace, ranked, tmp_path, capsys, caplog):
    importance = LayerImportance.load(ranked / "importance.json")
    config = tiny_llama().config
    whole = plan(config, importance, shares=(1.0,), **STEP_OF_BUDGET)["100%"].total
    step = "--per_device_train_batch_size 8 --max_length 32 --lora_r 4 --gradient_checkpointing False".split()
    arguments = ["convert", str(ranked / "importance.json"), "--output_dir", str(tmp_path / "lora"), *step]
    for budget in (whole, whole - 1):
        main([*arguments, "--memory_budget", str(budget)])
        assert layers(tmp_path / "lora") == set(select_within(config, importance, budget, **STEP_OF_BUDGET))
    assert "3 of 3 units fit into 0.00 GB" in caplog.text and "2 of 3 units fit" in caplog.text
    main([*arguments, "--memory_budget", str(whole - 1), "--gradient_checkpointing", "True"])
    assert len(layers(tmp_path / "lora")) == 3
    for extra, message in (
        (["--memory_budget", "1KB"], "A memory budget of 1e-06 GB is too small: the frozen model takes"),
        (["--memory_budget", "much"], "must be a size such as '24GB', '24GiB' or a number of bytes, got 'much'"),
        (["--memory_budget", "24GB", "--top_p", "0.3"], "`--memory_budget` decides .*: leave out `--top_p`"),
        (
            ["--memory_budget", "24GB", "--format", "axolotl-full", "--lora_r", "16"],
            "counts LoRA only: for `--format axolotl-full`",
        ),
    ):
        assert re.search(message, error_of([*arguments, *extra], capsys))
    without = re.escape("pass it, or leave out `--max_length` and `--gradient_checkpointing`.")
    assert re.search(without, error_of([*arguments, "--top_p", "0.3"], capsys))
    content = json.loads((ranked / "importance.json").read_text())
    content["metadata"]["model"] = "/gone"
    (tmp_path / "moved.json").write_text(json.dumps(content))
    error = error_of(["convert", str(tmp_path / "moved.json"), *arguments[2:], "--memory_budget", "24GB"], capsys)
    assert "needs the model: pass `--model_name_or_path`" in error


def test_tune_by_a_memory_budget(workspace, ranked, tmp_path, capsys):
    importance = LayerImportance.load(ranked / "importance.json")
    # TRL loads models in fp32
    step = {**STEP_OF_BUDGET, "dtype": torch.float32}
    budget = plan(tiny_llama().config, importance, shares=(1.0,), **step)["100%"].total - 1
    expected = select_within(tiny_llama().config, importance, budget, **step)
    arguments = ["--importance", str(ranked / "importance.json"), "--memory_budget", str(budget), *data(workspace)]
    arguments += TRAINING
    main(["tune", *arguments, "--max_length", "32", "--output_dir", str(tmp_path / "tuned")])
    assert layers(tmp_path / "tuned") == set(expected) and len(expected) == 2
    arguments = ["tune", *arguments, "--output_dir", str(tmp_path / "x")]
    assert "the frozen model takes" in error_of([*arguments, "--max_length", "64", "--memory_budget", "1KB"], capsys)
    assert "leave out `--top_k`" in error_of([*arguments, "--top_k", "1"], capsys)


def test_a_published_lora_adapter_is_ranked_as_it_is(workspace, ranked, tmp_path):
    main(["export", str(ranked / "adapter"), "--output_dir", str(tmp_path / "plain")])
    assert LoraConfig.from_pretrained(tmp_path / "plain").peft_type == "LORA"
    rank(workspace, tmp_path / "again", "--adapter", str(tmp_path / "plain"))
    first, second = (LayerImportance.load(path / "importance.json") for path in (ranked, tmp_path / "again"))
    assert second.scores == first.scores
    assert second.metadata["stage_1"] == {"adapter": str(tmp_path / "plain")}


def test_an_adapter_of_other_gates_is_refused(workspace, ranked, tmp_path):
    with pytest.raises(SystemExit, match="has one gate per layer: pass `--granularity layer`"):
        rank(workspace, tmp_path / "x", "--adapter", str(ranked / "adapter"), "--granularity", "module")


def test_a_masked_adapter_is_ranked_by_its_open_units(workspace, ranked, tmp_path, capsys):
    model = PeftModel.from_pretrained(tiny_llama(), ranked / "adapter")
    model.apply_mask(["model.layers.0", "model.layers.2"])
    model.save_pretrained(tmp_path / "masked")
    masked = ["--adapter", str(tmp_path / "masked"), "--output_dir", str(tmp_path / "out")]
    error = error_of(["rank", *data(workspace), *masked, *TRAINING], capsys)
    (command,) = re.findall(r"is masked.* Run `peft-ila (export .*)`, which .*, and pass PLAIN instead", error)
    main(command.replace("PLAIN", str(tmp_path / "plain")).split())
    rank(workspace, tmp_path / "out", "--adapter", str(tmp_path / "plain"))
    assert LayerImportance.load(tmp_path / "out" / "importance.json").units == ["model.layers.0", "model.layers.2"]


def test_an_adapter_of_another_size_is_refused(workspace, ranked, tmp_path):
    tiny_llama(intermediate_size=32).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(workspace / "model").save_pretrained(tmp_path / "model")
    dataset = ["--dataset_name", str(workspace / "data.jsonl")]
    with pytest.raises(SystemExit, match=r"adapter .*ranked/adapter does not fit .*model: .*size mismatch"):
        rank(tmp_path, tmp_path / "x", "--adapter", str(ranked / "adapter"), *dataset)


@pytest.mark.support("Operations", "rank a fully fine-tuned model, `--tuned_model`")
def test_a_fully_fine_tuned_model_is_ranked(workspace, ranked, tmp_path, capsys):
    """The tuned model is the LoRA of `ranked`, of rank 4, merged."""
    PeftModel.from_pretrained(tiny_llama(), ranked / "adapter").merge_and_unload().save_pretrained(tmp_path / "tuned")
    extra = ["--tuned_model", str(tmp_path / "tuned"), "--tuned_rank", "4"]
    rank(workspace, tmp_path / "out", *extra)
    first, second = (LayerImportance.load(path / "importance.json") for path in (ranked, tmp_path / "out"))
    assert second.scores == pytest.approx(first.scores, abs=1e-3)
    facts = second.metadata["stage_1"]
    assert facts["energy_kept"] == pytest.approx(1, abs=1e-4) and facts["energy_outside"] == 0
    assert "100.0% of the squared norm of the target modules' deltas; 0.0% of the total" in capsys.readouterr().out


@pytest.mark.support("Operations", "models with code of their own (`--trust_remote_code`)")
def test_a_model_with_code_of_its_own(workspace, ranked, tmp_path):
    """In a process of its own, where the code was not imported before and nobody answers a question."""
    for name in ("base", "tuned"):
        model = tmp_path / name
        shutil.copytree(workspace / "model", model)
        config = json.loads((model / "config.json").read_text())
        code = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomForCausalLM"}
        config |= {"model_type": "custom", "architectures": ["CustomForCausalLM"], "auto_map": code}
        (model / "config.json").write_text(json.dumps(config))
        (model / "custom.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class CustomConfig(LlamaConfig):\n    model_type = 'custom'\n"
            "class CustomForCausalLM(LlamaForCausalLM):\n    config_class = CustomConfig\n"
        )
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    torch.manual_seed(0)
    save_file(
        {k: v + 0.01 * torch.randn_like(v) for k, v in tensors.items()}, tmp_path / "tuned" / "model.safetensors"
    )
    options = ["--model_name_or_path", str(tmp_path / "base"), "--dataset_name", str(workspace / "data.jsonl")]
    options += [*TRAINING, "--trust_remote_code", "True"]
    ranking = ["--importance", str(ranked / "importance.json"), "--top_k", "1"]
    tune = ["tune", *options, *ranking, "--output_dir", str(tmp_path / "out")]
    extract = (
        "from peft import LoraConfig\nfrom peft_ila.search.delta import extract_lora\n"
        "config = LoraConfig(target_modules=['q_proj'])\n"
        f"extract_lora({str(tmp_path / 'base')!r}, {str(tmp_path / 'tuned')!r}, config, {str(tmp_path / 'delta')!r}, "
        "trust_remote_code=True)"
    )
    script = f"from peft_ila.cli import main\nmain({tune!r})\n{extract}\n"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", script], check=True, stdin=subprocess.DEVNULL, env=environment)
    for name in ("out", "delta"):
        assert (tmp_path / name / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adapter", "a", "--tuned_model", "b"], "Pass `--adapter` or `--tuned_model`, not both."),
        (["--tuned_rank", "4"], "`--tuned_rank` needs `--tuned_model`."),
        (["--method", "untrained", "--window", "3"], "`--window` ends stage 1, which `--method untrained` does not"),
        (["--method", "untrained", "--adapter", "a"], "`--method untrained` ranks by a fresh adapter"),
        (["--tuned_model", "/nowhere"], "There is no model directory /nowhere."),
        (["--gate_learning_rate", "0.2"], r"\['gate_learning_rate'\] are settings of `method=\"descent\"`"),
        (["--gate_steps", "2"], "`gate_steps` must be a whole number of at least 4, got 2"),
        (["--min_agreement", "2"], r"`min_agreement` must be in \(0, 1\], got 2"),
        (["--budget", "0.3"], r"\['budget'\] are settings of `method=\"descent\"`"),
        (["--method", "descent", "--budget", "2.5"], "`budget` must be a whole number of units from 1"),
        (
            ["--method", "descent", "--budget", "most"],
            "`budget` must be a whole number of units .*, got 'most'",
        ),
    ],
)
def test_bad_settings_are_found_before_any_work(workspace, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        rank(workspace, tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["axolotl", "axolotl-full", "llamafactory", "trl"])
def test_convert_for_other_programs(ranked, tmp_path, program):
    arguments = ["--top_k", "2", "--output_dir", str(tmp_path), "--format", program]
    rank = [] if program == "axolotl-full" else ["--lora_r", "3"]
    main(["convert", str(ranked / "importance.json"), *arguments, *rank])
    importance = LayerImportance.load(ranked / "importance.json")
    settings = yaml.safe_load((tmp_path / f"{program}.yaml").read_text())
    lora = {"r": 3, "lora_alpha": 32, "lora_dropout": 0.0}
    assert settings == importance.to_recipe(program, top_k=2, model=tiny_llama(), **lora)


def test_the_ranked_adapter_is_pushed(workspace, ranked, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **kwargs: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: pushed.append((self.token, kwargs)))
    options = ["--push_to_hub", "--hub_model_id", "me/ranked", "--hub_token", "t"]
    rank(workspace, tmp_path / "out", "--adapter", str(ranked / "adapter"), *options)
    assert pushed == [("t", {"repo_id": "me/ranked", "folder_path": tmp_path / "out" / "adapter"})]
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert all(unit in card for unit in LayerImportance.load(tmp_path / "out" / "importance.json").units)


def test_the_seed_decides_on_the_first_weights(workspace, tmp_path):
    weights = []
    for i, seed in enumerate("112"):
        rank(workspace, tmp_path / str(i), "--seed", seed, "--learning_rate", "1e-3", "--gate_steps", "4")
        weights.append(load_file(tmp_path / str(i) / "adapter" / "adapter_model.safetensors"))
    key = next(key for key in weights[0] if "lora_A" in key)
    assert torch.equal(weights[0][key], weights[1][key])
    assert not torch.allclose(weights[0][key], weights[2][key], atol=0.02)  # training moves them by less


def test_compare_writes_the_mean(ranked, tmp_path, capsys):
    paths, mean = [str(ranked / "importance.json"), str(tmp_path / "other.json")], str(tmp_path / "mean.json")
    one = LayerImportance.load(paths[0])
    other = dataclasses.replace(one, scores=one.scores[::-1])
    other.save(paths[1])
    main(["compare", *paths, "--mean", mean])
    assert capsys.readouterr().out.endswith(f"Wrote {mean}.\n")
    assert LayerImportance.load(mean) == LayerImportance.mean([one, other])


@pytest.mark.parametrize("mean", ["", "a.json", "./a.json", "picture.png", "."])
def test_compare_loses_nothing_by_the_mean(ranked, tmp_path, monkeypatch, mean, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        shutil.copyfile(ranked / "importance.json", name)
    before = Path("a.json").read_bytes()
    error = error_of(["compare", "a.json", "b.json", "--mean", mean, "--output", "picture.png"], capsys)
    assert re.search("would overwrite a ranking or the picture|is required|is a directory; name a file", error)
    assert Path("a.json").read_bytes() == before
    assert re.search("suffix", error_of(["compare", "a.json", "b.json", "--mean", "m", "--output", "p.zzz"], capsys))
    assert not Path("m").exists()


def test_compare_takes_published_rankings(capsys):
    name = "smollm2-135m-instruct"
    main(["compare", name, name])
    assert f"{name}  {name}         1.00         1.00      1.00" in capsys.readouterr().out


def test_compare_shows_overlaps_and_correlation(tmp_path, capsys):
    one = LayerImportance([f"layers.{i}" for i in range(20)], [float(i) for i in range(20)])
    two = dataclasses.replace(one, scores=[(i * 7 % 20) / 2 for i in range(20)])
    paths = [str(tmp_path / name) for name in ("one.json", "two.json")]
    for ranking, path in zip((one, two), paths):
        ranking.save(path)
    main(["compare", *paths, "--json"])
    figures = {
        "overlap_75": one.overlap(two, 0.75),
        "overlap_30": one.overlap(two, 0.3),
        "spearman": one.spearman(two),
    }
    assert len({*figures.values(), one.overlap(two, 0.5)}) == 4
    assert json.loads(capsys.readouterr().out) == {"pairs": [{"a": paths[0], "b": paths[1], **figures}]}


TESTS = str(Path(__file__).parent)


def error_of(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    message = str(exit_.value) if isinstance(exit_.value.code, str) else capsys.readouterr().err
    assert exit_.value.code not in (0, None)
    return message


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["convert", "missing.json", "--top_p", "0.3", "--output_dir", "x"], "No such file.*missing.json"),
        (["compare", "missing.json", "missing.json"], "No such file.*missing.json"),
        (["rank", "--model_name_or_path", "./nowhere", "--dataset_name", "d.jsonl"], "no model directory ./nowhere"),
        (["rank", "--dataset_name", "d.jsonl"], "`--model_name_or_path` is required"),
        ("rank --model_name_or_path m --dataset_name d --dataset_streaming".split(), "streaming` is not supported"),
        (["rank", "--model_name_or_path", "m"], "`--dataset_name` is required"),
        (
            ["plan", "--model_name_or_path", "nowhere"],
            "no model directory nowhere, and the hub has no such model: ",
        ),
        (["convert", TESTS, "--top_p", "0.3", "--output_dir", "x"], "is a directory.*such as .*tests/importance.json"),
        (["export", "A", "--output_dir", __file__], "test_cli.py is a file; choose another output directory"),
        (["demo"], "`--output_dir` is required"),
        (["tune", "--model_name_or_path", "m"], "`--importance` is required"),
        (["tune", "--importance", "gemma-3-270m"], "exactly one of"),
        (["rank", "--config", "missing.yaml"], "No such file.*missing.yaml"),
        (["plot", "a.json", "--config", __file__], "`--config` file is not YAML"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    error = error_of(arguments, capsys)
    assert re.search(message, error), error
    assert error.startswith(f"peft-ila {arguments[0]}: error: ") and "\n" not in error


@pytest.mark.parametrize("flags", [[], ["--fp16", "True"], ["--bf16", "False"]])
def test_bf16_is_the_default_on_a_gpu_unless_fp16_is_asked_for(tmp_path, monkeypatch, flags):
    monkeypatch.setattr("transformers.utils.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    command = "rank --model_name_or_path M --dataset_name D --output_dir".split()
    _, training, *_ = parse([*command, str(tmp_path), *flags])[1]
    assert (training.bf16, training.fp16) == (not flags, "--fp16" in flags)


def test_what_is_not_installed(ranked, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = str(tmp_path / "a.png")
    error = error_of(["plot", str(ranked / "importance.json"), "--output", picture], capsys)
    assert error.endswith("Plots need matplotlib: pip install matplotlib")
    assert "pip install matplotlib" in error_of(["demo", "--output_dir", str(tmp_path / "out")], capsys)
    monkeypatch.setitem(sys.modules, "trl", None)
    error = error_of(["rank", "--model_name_or_path", "M", "--dataset_name", "D"], capsys)
    assert error.endswith("needs TRL: pip install trl")
    assert not list(tmp_path.iterdir())


def test_rank_without_matplotlib(workspace, ranked, tmp_path, monkeypatch, capsys, caplog):
    """It leaves the picture out, and says so."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    rank(workspace, tmp_path, "--method", "untrained")
    assert "importance.png is not written. Plots need matplotlib: pip install matplotlib" in caplog.text
    assert f"Wrote {tmp_path}/importance.json and adapter/." in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.png"))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "importance.png" not in card and "`model.layers.0`" in card


def test_experts_need_no_dropout(workspace, tmp_path, capsys):
    model = build("mixtral")
    model.resize_token_embeddings(64)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(workspace / "model").save_pretrained(tmp_path / "model")
    options = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(workspace / "data.jsonl")]
    options += ["--max_steps", "1", "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    assert "does not work with lora_dropout" in error_of(["rank", *options], capsys)
    main(["rank", *options, "--lora_dropout", "0", "--gate_steps", "4"])
    (next_,) = re.findall(r"Next: peft-ila (.*)\n", capsys.readouterr().out)
    assert " --lora_dropout 0.0 " in next_
    ranking = ["--importance", str(tmp_path / "out" / "importance.json"), "--top_k", "1"]
    assert "does not work with lora_dropout" in error_of(["tune", *options, *ranking], capsys)


DATA = '{"prompt": "w1", "completion": "w2 w3"}\n' * 8


@pytest.mark.parametrize(
    "content, options, ids",
    [
        ('{"body": "w1 w2"}\n', ["--dataset_text_field", "body"], [7, 8, 1]),
        (
            '{"conversations": [{"from": "user", "value": "w1"}, {"from": "assistant", "value": "w2"}]}\n',
            [],
            [3, 5, 7, 1, 4, 5, 8, 1],
        ),
        ('{"prompt": "", "completion": "w1 w2"}\n' + DATA, [], [7, 8, 1]),
        ('{"text": "w1 w2", "note": 1}\n{"text": "w1 w2", "note": [1]}\n', [], [7, 8, 1]),
        ('[{"text": "w1 w2"}]', [], [7, 8, 1]),
    ],
)
def test_what_the_trainer_reads_is_ranked(workspace, tmp_path, monkeypatch, content, options, ids):
    """All of TRL's formats, each as the trainer tokenises it."""
    seen = []
    original = SFTTrainer.compute_loss

    def observed(self, model, inputs, *args, **kwargs):
        seen.extend(row[row != 0].tolist() for row in inputs["input_ids"])
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", observed)
    (tmp_path / "data.jsonl").write_text(content * 8 if content.endswith("\n") else content)
    untrained = ["--method", "untrained", "--gate_steps", "4"]
    rank(workspace, tmp_path / "out", "--dataset_name", str(tmp_path / "data.jsonl"), *untrained, *options)
    assert ids in seen and len(LayerImportance.load(tmp_path / "out" / "importance.json").units) == 3


def test_a_part_of_a_file(tmp_path):
    text = "".join(f'{{"text": "{i}"}}\n' for i in range(5))
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8-sig")  # with a byte order mark
    assert load_dataset(str(tmp_path / "data.jsonl"), split="train[:2]")["text"] == ["0", "1"]
    with pytest.raises(ValueError, match='data.jsonl cannot be read as a data set: Unknown split "test"'):
        load_dataset(str(tmp_path / "data.jsonl"), split="test")


LINES = "A file needs one JSON object per line"


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "cannot be read as a data set: it holds no examples"),
        ("\n\n", "cannot be read as a data set: .*no data"),
        ('{"text": "a"}\nnot json\n', f"cannot be read as a data set: JSON parse error.* in row 1. {LINES}"),
        ("[" * 100_000, f"cannot be read as a data set: .*depth.*{LINES}"),
        ('{"text": "ä"}\n'.encode("latin-1"), "cannot be trained on .*UnicodeDecodeError: 'utf-8' codec"),
        ('{"text": "a"}\n'.encode("utf-16"), f"cannot be read as a data set: .*{LINES}"),
        ('{"question": "a", "answer": "b"}\n', r"KeyError: 'text'. .* has the columns \['answer', 'question'\]"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', r"\['completion', 'prompt'\]. TRL takes"),
        ("[1, 2]\n", r"'int' object has no attribute 'endswith'. .* has the columns \['text'\]"),
        ('{"messages": "hello"}\n', "No example of .* is left to train on: none .* within `--max_length 1024`"),
        (None, "Unable to find"),
    ],
)
def test_bad_data(workspace, tmp_path, content, message, capsys):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["rank", "--model_name_or_path", str(workspace / "model"), "--dataset_name", str(path), *TRAINING]
    error = error_of([*arguments, "--output_dir", str(tmp_path / "out")], capsys)
    assert re.search(message, error), error
    assert str(path) in error and "\n" not in error and len(error) < 700
    assert not (tmp_path / "out" / "importance.json").exists()


def test_a_directory_as_data(tmp_path):
    with pytest.raises(OSError, match="doesn't contain any data files"):
        load_dataset(str(tmp_path))
    (tmp_path / "notes.bin").write_bytes(b"\0")
    with pytest.raises((ValueError, OSError)):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": "a"}, "The configuration of .*model cannot be read"),
        ({"hidden_size": -1}, "No model can be built from this LlamaConfig|cannot be read"),
        ({"hidden_size": 10**40}, "No model can be built from this LlamaConfig|cannot be read"),
        ({"num_hidden_layers": 10**12}, "has `num_hidden_layers` 1000000000000; the maximum is 10000"),
        (None, "is not a valid JSON file"),
    ],
)
def test_impossible_models(workspace, ranked, tmp_path, change, message, capsys):
    model = shutil.copytree(workspace / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text("{" if change is None else json.dumps(config | change))
    arguments = ["convert", str(ranked / "importance.json"), "--top_k", "1", "--output_dir", str(tmp_path / "lora")]
    error = error_of([*arguments, "--model_name_or_path", str(model)], capsys)
    assert re.search(message, error), error
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("architecture", ["Trainer", "HfArgumentParser", "GPT2LMHeadModel", "logging", 5])
def test_only_models_of_a_configuration_are_built(architecture):
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
    config.architectures = [architecture]
    assert type(meta_skeleton(config)).__name__ == "LlamaForCausalLM"


def test_a_tokenizer_of_another_model(workspace, tmp_path, capsys):
    model = shutil.copytree(workspace / "model", tmp_path / "model")
    tiny_llama(vocab_size=20).save_pretrained(model)
    with pytest.raises(SystemExit, match="has the token .*, but the model has only 20 tokens"):
        rank(tmp_path, tmp_path / "out", "--dataset_name", str(workspace / "data.jsonl"))


def test_a_template_that_refuses_the_data(workspace, tmp_path):
    model = shutil.copytree(workspace / "model", tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(SystemExit, match=r"cannot be trained on .*data.jsonl: .*roles must alternate"):
        rank(tmp_path, tmp_path / "out", "--dataset_name", str(workspace / "data.jsonl"))


def test_a_damaged_model(workspace, tmp_path):
    model = shutil.copytree(workspace / "model", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(SystemExit, match="model.safetensors is damaged or not a safetensors file"):
        rank(tmp_path, tmp_path / "out", "--dataset_name", str(workspace / "data.jsonl"))


def test_one_target_is_a_name(workspace, tmp_path):
    untrained = ["--method", "untrained", "--gate_steps", "4"]
    rank(workspace, tmp_path, "--lora_target_modules", "q_proj", *untrained)
    modules = LayerImportance.load(tmp_path / "importance.json").modules
    assert modules["model.layers.0"] == ["model.layers.0.self_attn.q_proj"]


def test_ctrl_c(ranked, monkeypatch, capsys):
    monkeypatch.setattr("peft_ila.cli.LayerImportance.load", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["compare", "a.json", "b.json"])
    assert exit_.value.code == 130 and capsys.readouterr().err == "peft-ila compare: interrupted\n"


def test_an_error_of_our_own(monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("division\nby zero \x1b[2J")

    monkeypatch.setattr("peft_ila.cli.LayerImportance.load", broken)
    with pytest.raises(SystemExit) as exit_:
        main(["compare", "a.json", "b.json"])
    assert exit_.value.code.startswith("peft-ila compare: error: ZeroDivisionError: division by zero ?[2J (`PEFT_ILA_")
    monkeypatch.setenv("PEFT_ILA_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["compare", "a.json", "b.json"])


def test_bad_shares_and_targets(workspace, ranked, tmp_path, capsys):
    ranking = str(ranked / "importance.json")
    error = error_of(["convert", ranking, "--top_p", "1.5", "--output_dir", str(tmp_path)], capsys)
    assert "`top_p` is the share of units to select and must be in (0, 1], got 1.5" in error
    assert "exactly one of" in error_of(["convert", ranking, "--output_dir", str(tmp_path)], capsys)
    arguments = ["rank", *data(workspace), *TRAINING, "--output_dir", str(tmp_path / "out")]
    arguments += ["--lora_target_modules", "query"]
    assert "Target modules {'query'} not found in the base model" in error_of(arguments, capsys)
    assert "at least two rankings" in error_of(["compare", ranking], capsys)


@pytest.mark.parametrize("arguments", [[], ["ranks"], ["convert"]])
def test_usage(arguments, capsys):
    assert "usage: peft-ila" in error_of(arguments, capsys)


@pytest.mark.parametrize("arguments", ["plot a.json", "rank --model_name_or_path m --dataset_name d"])
def test_an_unknown_option_is_named(arguments, capsys):
    error = error_of([*arguments.split(), "--outputs", "b.png"], capsys)
    assert "unrecognized arguments: --outputs b.png" in error


def test_the_commands_of_the_demo_are_known(tmp_path, dialogues, monkeypatch):
    monkeypatch.setattr("peft_ila.workflows.demo.smollm2", lambda: "model")
    monkeypatch.setattr("peft_ila.workflows.demo.dialogues", lambda: dialogues * 2)
    commands = [command for _, command in demo_commands(tmp_path)]
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 64
    (tmp_path / "ranked").mkdir()
    ranking = LayerImportance([f"model.layers.{i}" for i in range(30)], list(map(float, range(30))))
    ranking.save(tmp_path / "ranked" / "importance.json")
    runs = [parse(command)[0].__name__ for command in commands]
    assert runs == ["rank", "compare", "convert", "tune", "tune", "prune"]
