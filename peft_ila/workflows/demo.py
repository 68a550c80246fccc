"""
The whole method on a real model and real data, offline: `peft-ila demo --output_dir OUT`.

SmolLM2-135M-Instruct learns the short answers of ChatterBot's dialogues. The workflows of the commands `rank`,
`convert` and `tune` do the work; this module prepares their data and measures the results.
"""

import functools
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer

from ..embedded import dialogues, smollm2, write_jsonl
from ..measure import saved_tensor_bytes
from ..ranking.importance import LayerImportance
from ..ranking.plotting import check_matplotlib
from ..ranking.table import comparison_rows, comparison_table, ranking_table
from .arguments import PruneArguments, RankArguments, TuneArguments
from .convert import convert
from .data import load_dataset
from .prune import pruning_table
from .sft import prune_by_sft, rank_by_sft
from .tune import tune

_PUBLISHED = "smollm2-135m-instruct-layers"
_SHARE = 0.3
_HELD_OUT = 64
_STEPS = 40
_TIMED_STEPS = 5

_TRAINING: dict[str, Any] = {
    "max_steps": _STEPS,
    "learning_rate": 1e-3,
    "warmup_steps": 5,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "max_length": 64,
    "gradient_checkpointing": False,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
}


def demo(output_dir: Path) -> None:
    """
    Rank twice without training, compare, convert, tune twice, rank what tuning all layers has changed, and prune it.

    Args:
        output_dir: Where to write the data, the rankings, the heatmaps and the adapters.
    """
    check_matplotlib()
    start = time.perf_counter()
    model = str(smollm2())
    parts = _write_data(output_dir / "data")
    importances = []
    for name in ("part_a", "part_b"):
        _headline(f"Rank the decoder layers on {name}, before any training")
        importance, _ = rank_by_sft(*_arguments(model, parts[name], output_dir / name), RankArguments())
        print(ranking_table(importance))
        importances.append((name, importance))
    importance = importances[0][1]
    ranked = time.perf_counter() - start

    _headline("Do both parts of the data and the published ranking find the same layers?")
    print(comparison_table(comparison_rows([*importances, ("published", LayerImportance.load(_PUBLISHED))])))

    _headline(f"Convert the top {_SHARE:.0%} to a LoraConfig")
    file, _ = convert(importance, output_dir / "lora", selection={"top_p": _SHARE}, r=8, lora_alpha=16)
    print(file.read_text())

    tuned = {}
    for name, share in ((f"top {_SHARE:.0%}", _SHARE), ("full LoRA", 1.0)):
        _headline(f"Tune {name} for {_STEPS} steps")
        tuned[name] = output_dir / f"tuned_{share:.0%}".replace("%", "")
        ranking = TuneArguments(importance=str(output_dir / "part_a" / "importance.json"), top_p=share)
        tune(*_arguments(model, parts["part_a"], tuned[name]), ranking)

    _headline("Side by side")
    _print_comparison(model, tuned, parts["held_out"])

    _headline("What did tuning all layers change? Rank the deltas of full LoRA")
    arguments = _arguments(model, parts["part_a"], output_dir / "learned")
    learned, _ = rank_by_sft(*arguments, RankArguments(adapter=str(tuned["full LoRA"])))
    print(ranking_table(learned))
    print(comparison_table(comparison_rows([("before training", importance), ("after training", learned)])))
    _headline("How much of full LoRA is needed? Prune it")
    held_out = PruneArguments(min_kept=0.9, eval_dataset_name=str(parts["held_out"]))
    arguments = _arguments(model, parts["part_a"], output_dir / "pruned")
    pruning, _ = prune_by_sft(*arguments, held_out, str(tuned["full LoRA"]))
    print(pruning_table(pruning))
    print(
        f"\nPictures: importance.png in {output_dir}/learned, ranks.png and kept.png in {output_dir}/pruned. Both "
        f"rankings before training took {ranked:.0f} s, the whole demo {time.perf_counter() - start:.0f} s."
    )


def _arguments(model: str, data: Path, output_dir: Path) -> tuple[Any, Any, Any]:
    training = SFTConfig(str(output_dir), **_TRAINING)
    lora = ModelConfig(model_name_or_path=model, lora_r=8, lora_alpha=16, lora_dropout=0.0)
    return ScriptArguments(dataset_name=str(data)), training, lora


def _headline(text: str) -> None:
    print(f"\n=== {text} ===", flush=True)


def _write_data(directory: Path) -> dict[str, Path]:
    """Two halves to train on and held-out examples; no question is in two of them."""
    rows = dialogues()
    random.Random(0).shuffle(rows)
    half = (len(rows) - _HELD_OUT) // 2
    parts = {"held_out": rows[:_HELD_OUT], "part_a": rows[_HELD_OUT:-half], "part_b": rows[-half:]}
    paths = {name: directory / f"{name}.jsonl" for name in parts}
    for name, part in parts.items():
        write_jsonl(part, paths[name])
    return paths


def measuring_trainer(model: Any, directory: str | Path, data: Path) -> Any:
    """
    A trainer that only measures SmolLM2.

    Args:
        model: The model, with or without adapters.
        directory: The embedded model's, for its tokenizer.
        data: A file of the demo's data, for evaluation and ranking.
    """
    dataset = load_dataset(str(data))
    args = SFTConfig(
        output_dir=str(data.parent),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=16,
        max_length=64,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _load(directory: str, adapter: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True)


def _print_comparison(directory: str, adapters: dict[str, Path], held_out: Path) -> None:
    trainers = {n: measuring_trainer(_load(directory, path), directory, held_out) for n, path in adapters.items()}
    loss = {name: trainer.evaluate()["eval_loss"] for name, trainer in trainers.items()}
    trainable = {name: trainer.model.get_nb_trainable_parameters()[0] for name, trainer in trainers.items()}
    kept: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    batch = {name: next(iter(trainer.get_train_dataloader())) for name, trainer in trainers.items()}
    for name, trainer in trainers.items():
        trainer.model.train()
        loss_of = functools.partial(trainer.compute_loss, trainer.model, dict(batch[name]))
        kept[name] = saved_tensor_bytes(trainer.model, loss_of)
    for _ in range(_TIMED_STEPS):  # in turn, since the machine's speed drifts
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.compute_loss(trainer.model, dict(batch[name])).backward()
            seconds[name].append(time.perf_counter() - start)
    print(f"{'':<12}{'held-out loss':>15}{'trainable':>12}{'saved tensors':>16}{'step time':>12}")
    for name in adapters:
        print(
            f"{name:<12}{loss[name]:>15.4f}{trainable[name]:>12,}{kept[name] / 1e6:>13.1f} MB"
            f"{statistics.median(seconds[name]):>10.2f} s"
        )
    first, second = adapters
    ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[second]))
    print(
        f"{first} compared with {second}: {trainable[first] / trainable[second]:.2f} of the trainable parameters, "
        f"{kept[first] / kept[second]:.2f} of the saved tensors, {ratio:.2f} of the step time."
    )
