"""Tuning a selection in full, and evaluating on held-out data, by the command line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import WORDS, tiny_llama
from datasets import Dataset
from safetensors.torch import load_file
from trainers import ila, write_model_and_data
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_ila import LayerImportance
from peft_ila.cli import main
from peft_ila.embedded import write_jsonl

STEPS = (
    "--per_device_train_batch_size 8 --logging_steps 1 --max_steps 4 --save_strategy steps --save_steps 2 "
    "--report_to none --disable_tqdm True"
).split()
FAST = ["--learning_rate", "2e-2", "--gradient_checkpointing", "False"]
LORA = ["--lora_r", "4", "--lora_dropout", "0"]
RESUME = ["--resume_from_checkpoint", "True"]
UNITS = [f"model.layers.{index}" for index in range(3)]
MODULES = [f"{unit}.mlp.{name}_proj" for unit in UNITS for name in ("up", "down")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tokenizer, dialogues):
    """
    A model, data and two rankings, of which `--top_k 1` selects layer 1 and its `down_proj`. The held-out answers are
    others, so that training makes the loss on them worse.
    """
    directory = tmp_path_factory.mktemp("tune")
    write_model_and_data(directory, tokenizer, dialogues)
    modules = ila().layer_importance().modules
    LayerImportance(UNITS, [1.0, 3.0, 2.0], modules=modules).save(directory / "layers.json")
    LayerImportance(MODULES, [1.0, 2.0, 3.0, 6.0, 5.0, 4.0]).save(directory / "modules.json")
    held_out = [{**row, "completion": [{"role": "assistant", "content": WORDS[50]}]} for row in dialogues[:8]]
    write_jsonl(held_out, directory / "held_out.jsonl")
    return directory


def arguments(workspace: Path, name: str, output: Path, *extra: str) -> list[str]:
    data = ["--model_name_or_path", str(workspace / "model"), "--dataset_name", str(workspace / "data.jsonl")]
    selection = ["--importance", str(workspace / "layers.json")] if name == "tune" else ["--method", "attribution"]
    return [name, *data, *selection, "--output_dir", str(output), *STEPS, *extra]


def run(workspace: Path, name: str, output: Path, *extra: str) -> None:
    main(arguments(workspace, name, output, *extra))


def full(workspace: Path, output: Path, *extra: str) -> None:
    run(workspace, "tune", output, "--full", "--top_k", "1", *FAST, *extra)


def evaluating(workspace: Path) -> list[str]:
    data = ["--eval_dataset_name", str(workspace / "held_out.jsonl")]
    return [*data, "--eval_strategy", "steps", "--eval_steps", "2"]


def error_of(*args) -> str:
    with pytest.raises(SystemExit) as exit_:
        run(*args)
    message = exit_.value.code
    assert isinstance(message, str) and "\n" not in message and "PEFT_ILA_TRACEBACK" not in message, message
    return message


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())


@pytest.mark.support("Operations", "full fine-tuning of a selection, `tune --full`")
@pytest.mark.parametrize(
    "ranking, unit", [("layers.json", "model.layers.1"), ("modules.json", "model.layers.1.mlp.down_proj")]
)
def test_only_the_selected_units_move(workspace, dialogues, tmp_path, ranking, unit, capsys):
    full(workspace, tmp_path / "tuned", "--importance", str(workspace / ranking))
    before, after = tiny_llama().state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").state_dict()
    assert after.keys() == before.keys()
    inside = {name for name in before if name.startswith(f"{unit}.")}
    assert {name for name in before if not torch.equal(before[name], after[name])} == inside and inside
    AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert not list(tmp_path.rglob("adapter_*"))
    count, total = (sum(before[name].numel() for name in names) for names in (inside, before))
    printed = capsys.readouterr().out
    assert f"Wrote a model to {tmp_path / 'tuned'}; {count:,} of its {total:,} parameters were trained.\n" in printed
    (call,) = re.findall(r"Next, in Python: (.*)\n$", printed)
    assert type(eval(call)).__name__ == "LlamaForCausalLM"

    # the same as a trainer of TRL does by itself with what else there is frozen by hand
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in inside)
    settings = {"max_steps": 4, "learning_rate": 2e-2, "save_strategy": "no", "report_to": "none", "bf16": False}
    args = SFTConfig(str(tmp_path / "own"), per_device_train_batch_size=8, gradient_checkpointing=False, **settings)
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    SFTTrainer(model, args=args, train_dataset=Dataset.from_list(dialogues), processing_class=tokenizer).train()
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("reentrant", ["false", "true"])
def test_the_backward_pass_ends_at_the_lowest_selected_unit(workspace, tmp_path, reentrant):
    """Under checkpointing; reentrant checkpointing would give that unit no gradient."""
    full(workspace, tmp_path / "plain")
    seen = set()

    def observe(module, args, output):
        if type(module).__name__ == "LlamaDecoderLayer" and torch.is_grad_enabled() and module.training:
            seen.add((module.self_attn.layer_idx, output.requires_grad))

    hook = torch.nn.modules.module.register_module_forward_hook(observe)
    checkpointing = ["--gradient_checkpointing_kwargs", f'{{"use_reentrant": {reentrant}}}']
    try:
        full(workspace, tmp_path / "checkpointed", "--gradient_checkpointing", "True", *checkpointing)
    finally:
        hook.remove()
    assert ((0, False) in seen) == (reentrant == "false") and (1, True) in seen
    assert all((index, False) not in seen for index in (1, 2))
    plain, checkpointed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "checkpointed"))
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("best", [[], ["--load_best_model_at_end", "True"]], ids=["last", "best"])
def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(workspace, tmp_path, monkeypatch, best):
    """Killed some steps after the first checkpoint; and after the last one, before the model was written."""
    options = ["--full", "--top_k", "1", *FAST, *evaluating(workspace), *best]
    run(workspace, "tune", tmp_path / "whole", *options)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    last = state(tmp_path / "whole" / "checkpoint-4")
    assert last["best_global_step"] == (2 if best else None)
    at = "checkpoint-2" if best else "checkpoint-4"
    assert expected == (tmp_path / "whole" / at / "model.safetensors").read_bytes()

    def killed(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    out, original = tmp_path / "killed", SFTTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(SFTTrainer, "training_step", killed)
        run(workspace, "tune", out, *options)
    assert (out / "checkpoint-2").exists() and not (out / "config.json").exists()
    run(workspace, "tune", out, *options, *RESUME)
    assert (out / "model.safetensors").read_bytes() == expected

    for path in ("config.json", "model.safetensors"):
        (out / path).unlink()
    run(workspace, "tune", out, *options, *RESUME)
    assert (out / "model.safetensors").read_bytes() == expected
    assert state(out / "checkpoint-4")["global_step"] == 4 and not (out / "checkpoint-5").exists()


def test_a_directory_with_an_earlier_run(workspace, tmp_path):
    out = tmp_path / "out"
    full(workspace, out)
    before = files(out)
    for extra in (["--full", *FAST], [*FAST, *LORA]):
        assert "belongs to an earlier run. Resume it with" in error_of(workspace, "tune", out, "--top_k", "1", *extra)
    message = error_of(workspace, "tune", out, "--full", *FAST, "--top_k", "2", *RESUME)
    assert "holds a run with another `units`: ['model.layers.1'], now ['model.layers.1', 'model.layers.2']" in message
    message = error_of(workspace, "tune", out, *FAST, *LORA, "--top_k", "1", *RESUME)
    assert "holds a run with another `command`: 'tune --full', now 'tune'" in message
    assert files(out) == before


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--load_in_4bit"], "cannot perform fine-tuning on purely quantized models"),
        (["--lora_r", "4", "--use_dora", "True"], "`--full` trains no LoRA: leave out `--lora_r` and `--use_dora`."),
        (["--lora_target_modules", "q_proj"], "trains no LoRA: leave out `--lora_target_modules`."),
        (["--memory_budget", "24GB"], "`--memory_budget` counts LoRA only: with `--full`, select by `--top_p`"),
        (["--top_k", "0"], "`top_k` .* got 0"),
        (["--output_dir", "MODEL"], "belongs to an earlier run. Choose another `--output_dir`"),
    ],
)
def test_what_is_of_no_use_in_full_is_found_before_any_work(workspace, tmp_path, extra, message):
    model = shutil.copytree(workspace / "model", tmp_path / "model")
    before = files(tmp_path)
    extra = [str(model) if value == "MODEL" else value for value in extra]
    selection = [] if "--memory_budget" in extra else ["--top_k", "1"]
    options = ["--full", *selection, "--model_name_or_path", str(model), *extra]
    assert re.search(message, error_of(workspace, "tune", tmp_path / "out", *options))
    assert files(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["lora_target_modules", "lora_target_parameters"])
def test_the_ranking_decides_the_targets(workspace, tmp_path, name):
    message = error_of(workspace, "tune", tmp_path / "out", "--top_k", "1", f"--{name}", "q_proj")
    assert f"decides the targets: leave out `--{name}`" in message


def test_a_ranking_of_another_architecture(workspace, tmp_path):
    LayerImportance(["transformer.h.0"], [1.0]).save(tmp_path / "other.json")
    options = ["--full", "--top_k", "1", "--importance", str(tmp_path / "other.json")]
    assert "The model has no 'transformer.h.0'" in error_of(workspace, "tune", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra, rate", [(["--full"], 2e-5), (LORA, 2e-4), (["--full", "--config", "FILE"], 3e-3)])
def test_the_learning_rate(workspace, tmp_path, extra, rate):
    """TRL's own in full, its advice for LoRA; what is set is set."""
    (tmp_path / "config.yaml").write_text("learning_rate: 3e-3\n")
    extra = [str(tmp_path / "config.yaml") if value == "FILE" else value for value in extra]
    run(workspace, "tune", tmp_path / "out", "--top_k", "1", "--max_steps", "1", "--save_steps", "1", *extra)
    (logged,) = [entry for entry in state(tmp_path / "out" / "checkpoint-1")["log_history"] if "loss" in entry]
    assert logged["learning_rate"] == rate


@pytest.mark.parametrize("mode, strategy, steps", [(["--full"], "steps", [2, 4]), (LORA, "epoch", [1, 2])])
def test_tune_evaluates_on_a_held_out_file(workspace, tmp_path, mode, strategy, steps):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((workspace / "data.jsonl").read_text().splitlines(keepends=True)[:8]))
    length = ["--num_train_epochs", "2", "--max_steps", "-1"] if strategy == "epoch" else []
    data = ["--dataset_name", str(few), "--eval_dataset_name", str(workspace / "held_out.jsonl"), *length]
    options = ["--top_k", "1", *FAST, "--eval_strategy", strategy, "--eval_steps", "2", "--save_strategy", strategy]
    run(workspace, "tune", tmp_path / "out", *options, *data, *mode)
    history = state(tmp_path / "out" / f"checkpoint-{steps[-1]}")["log_history"]
    evaluated = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert list(evaluated) == steps

    rows = [json.loads(line) for line in (workspace / "held_out.jsonl").read_text().splitlines()]
    args = SFTConfig(str(tmp_path / "own"), report_to="none", bf16=False)
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    trainer = SFTTrainer(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), args=args, **data)
    # transformers loads an adapter's directory as its model with the adapter
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(evaluated[steps[-1]], abs=1e-5)


def test_evaluations_of_a_4_bit_model_change_nothing(workspace, tmp_path, monkeypatch):
    """On a CPU with AVX512-BF16 bitsandbytes would pack its weights, for a kernel without a backward pass."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    tuned = []
    for name, evaluation in (("without", []), ("with", evaluating(workspace))):
        options = ["--load_in_4bit", "--top_k", "1", *FAST, *LORA, *evaluation]
        run(workspace, "tune", tmp_path / name, *options)
        tuned.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert tuned[0] == tuned[1]


def test_rank_evaluates_stage_1_and_ranks_its_best_model(workspace, tmp_path):
    longer = ["--max_steps", "8", "--save_steps", "4", "--eval_steps", "4", "--gate_steps", "4"]
    # here the loss on these data falls: what is called the best is not the last one
    best = ["--load_best_model_at_end", "True", "--greater_is_better", "True"]
    options = [*FAST, *LORA, *evaluating(workspace), *longer, *best]
    run(workspace, "rank", tmp_path / "whole", *options)
    last = state(tmp_path / "whole" / "checkpoint-8")
    assert [entry["step"] for entry in last["log_history"] if "eval_loss" in entry] == [4, 8]
    assert last["best_global_step"] == 4
    importance = LayerImportance.load(tmp_path / "whole" / "importance.json")
    assert importance.metadata["eval_dataset"] == str(workspace / "held_out.jsonl")
    adapter = ["--adapter", str(tmp_path / "whole" / "checkpoint-4"), "--gate_steps", "4"]
    run(workspace, "rank", tmp_path / "best", *FAST, *adapter)
    assert importance.scores == LayerImportance.load(tmp_path / "best" / "importance.json").scores

    for kept in ("checkpoint-4", "checkpoint-8"):  # killed after the first checkpoint, and after the last one
        out = shutil.copytree(tmp_path / "whole", tmp_path / kept)
        shutil.rmtree(out / "adapter")
        (out / "importance.json").unlink()
        if kept == "checkpoint-4":
            shutil.rmtree(out / "checkpoint-8")
        run(workspace, "rank", out, *options, *RESUME)
        for name in ("importance.json", "adapter/adapter_model.safetensors"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (kept, name)
    other = ["--eval_dataset_name", str(workspace / "data.jsonl"), *RESUME]
    assert "with another `eval_dataset`: " in error_of(workspace, "rank", tmp_path / "whole", *options, *other)


def test_held_out_data_in_another_format(workspace, tmp_path):
    """Where the loss of both is on all tokens, it may be any that the trainer takes."""
    held_out = tmp_path / "text.jsonl"
    held_out.write_text('{"text": "w1 w2"}\n')
    options = ["--completion_only_loss", "False", "--eval_dataset_name", str(held_out)]
    run(workspace, "tune", tmp_path / "out", "--top_k", "1", *FAST, *LORA, *evaluating(workspace), *options)
    assert any("eval_loss" in entry for entry in state(tmp_path / "out" / "checkpoint-4")["log_history"])


@pytest.mark.parametrize(
    "content, strategy, message",
    [
        ('{"text": "a"}\n', "no", "`--eval_dataset_name` needs `--eval_strategy steps` or `epoch`."),
        (None, "steps", "bad.jsonl"),
        ("", "steps", "bad.jsonl cannot be read as a data set: it holds no examples"),
        ('{"text": "a"}\n', "steps", r"bad.jsonl has no `completion`, only \['text'\], but the training loss counts"),
        ('{"body": "a"}\n', "steps", r"data.jsonl has the columns .*'prompt'\], .*bad.jsonl has .* \['body'\]"),
        ('{"prompt": "LONG", "completion": "w1"}\n', "epoch", "No example of .*bad.jsonl is left to evaluate on"),
    ],
)
def test_bad_held_out_data(workspace, tmp_path, content, strategy, message):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content.replace("LONG", "w1 " * 99))
    options = ["--eval_strategy", strategy, "--eval_dataset_name", str(path), "--max_length", "64"]
    for name, selection in (("rank", []), ("tune", ["--top_k", "1"])):
        assert re.search(message, error_of(workspace, name, tmp_path / "out", *selection, *options))
    assert not (tmp_path / "out").exists()
