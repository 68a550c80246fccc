"""Rank a model on a data set by name, with TRL's trainer and arguments: `peft-ila rank`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import IntervalStrategy, TrainerCallback, set_seed
from trl import SFTTrainer, get_peft_config, get_quantization_config

from ..export.adapters import adapter_directory, read_config
from ..files import read_json, whole_directory
from ..ranking.card import upload
from ..ranking.importance import LayerImportance
from ..search.delta import extract_lora
from ..search.gates import check_settings
from ..search.stability import EpsilonStability
from ..tuner.config import ILAConfig
from ..tuner.model import disable_cpu_4bit_packing
from ..units import Granularity
from .arguments import PruneArguments, RankArguments, required
from .data import described, is_file, load_dataset
from .models import model_config, model_name
from .prune import Pruning, check_prune_settings, check_pruned_output, prune
from .rank import check_output, rank_in
from .resuming import lock_output_dir
from .training import load_adapter


def lora_config(model_args: Any) -> Any:
    """The [`~peft.LoraConfig`] that TRL makes from its [`~trl.ModelConfig`]."""
    model_args.use_peft = True
    targets = model_args.lora_target_modules
    if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.]+", targets):
        model_args.lora_target_modules = [targets]  # TRL reads a single name as a pattern, which matches no module
    return get_peft_config(model_args)


def check_evaluation(training_args: Any, eval_dataset_name: str | None) -> None:
    if eval_dataset_name and training_args.eval_strategy == "no":
        raise ValueError("`--eval_dataset_name` needs `--eval_strategy steps` or `epoch`.")


def sft_trainer(
    script_args: Any,
    training_args: Any,
    model_args: Any,
    peft_config: PeftConfig | None,
    eval_dataset_name: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTTrainer:
    """An [`~trl.SFTTrainer`] as in TRL's own script. The arguments are TRL's, plus the held-out data's name."""
    if script_args.dataset_streaming:
        raise ValueError(
            "`--dataset_streaming` is not supported: leave it out. For a part of a large data set, pass a split such "
            'as `--dataset_train_split "train[:2000]"`.'
        )
    set_seed(training_args.seed)  # the trainer makes LoRA's initial weights before it sets its seed
    name = model_name(model_args.model_name_or_path)
    dataset = required(script_args.dataset_name, "dataset_name")
    train_dataset = load_dataset(dataset, script_args.dataset_config, script_args.dataset_train_split)
    if training_args.gradient_accumulation_steps < 1:
        raise ValueError(
            f"`--gradient_accumulation_steps` must be at least 1, got {training_args.gradient_accumulation_steps}."
        )
    eval_dataset = None
    if training_args.eval_strategy != "no":
        split = "train" if eval_dataset_name and is_file(eval_dataset_name) else script_args.dataset_test_split
        eval_dataset = load_dataset(eval_dataset_name or dataset, script_args.dataset_config, split)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    model_config(name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code)
    try:
        trainer = SFTTrainer(
            model=name,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=peft_config,
            callbacks=list(callbacks),
        )
    except Exception as error:  # columns that TRL does not know, a chat template that refuses the data, …
        clear = isinstance(error, (OSError, ValueError, ImportError, torch.OutOfMemoryError))
        if clear and not isinstance(error, UnicodeError):
            raise
        data = {
            dataset: train_dataset,
            **({eval_dataset_name or "the evaluation split": eval_dataset} if eval_dataset else {}),
        }
        reason = f"{type(error).__name__}: {error}. {described(data)}"
        raise ValueError(f"{name} cannot be trained on {dataset}: {reason}") from error
    _check_comparable(trainer, eval_dataset, eval_dataset_name or dataset)
    _check_examples(trainer, trainer.train_dataset, dataset, "train")
    _check_examples(trainer, trainer.eval_dataset, eval_dataset_name or dataset, "evaluate")
    disable_cpu_4bit_packing(trainer.accelerator.unwrap_model(trainer.model))  # evaluation would pack them
    return trainer


def _check_comparable(trainer: Any, eval_dataset: Any, name: str) -> None:
    """Refuse held-out data whose loss would count other tokens than the training loss."""
    if eval_dataset is None or not trainer.completion_only_loss:
        return
    if not {"completion", "completion_mask", "labels"}.intersection(eval_dataset.column_names):
        raise ValueError(
            f"{name} has no `completion`, only {sorted(eval_dataset.column_names)}, but the training loss counts "
            "completions only, so the losses would not be comparable. Use one format for both data sets."
        )


def _check_examples(trainer: Any, data: Any, name: str, purpose: str) -> None:
    if not hasattr(data, "__len__"):  # none, or a stream
        return
    if not len(data):
        raise ValueError(
            f"No example of {name} is left to {purpose} on: none has an answer token within `--max_length "
            f"{trainer.args.max_length}`. Raise it, or check the data."
        )
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)  # a processor has one
    known = len(trainer.accelerator.unwrap_model(trainer.model).get_input_embeddings().weight)
    if "input_ids" in data.column_names and len(tokenizer) > known:  # else the model knows all of them
        greatest = max(max(ids, default=0) for ids in data["input_ids"])
        if greatest >= known:
            raise ValueError(
                f"{name} has the token {greatest}, but the model has only {known} tokens. The tokenizer belongs to "
                "another model: pass the model with its own."
            )


def rank_by_sft(
    script_args: Any, training_args: Any, model_args: Any, rank_args: RankArguments
) -> tuple[LayerImportance, str | None]:
    """
    [`rank`] with TRL's `SFTTrainer`, on a model and a data set by name: `peft-ila rank`.

    Args:
        script_args ([`~trl.ScriptArguments`]): The data set.
        training_args ([`~trl.SFTConfig`]): Both stages; `push_to_hub` uploads the ranked adapter with a card that
            shows the ranking.
        model_args ([`~trl.ModelConfig`]): The model, its quantisation, LoRA's options.
        rank_args ([`RankArguments`]): The search.

    Returns:
        The ranking, and the URL of the upload.

    Raises:
        FileNotFoundError: The model or a data file does not exist.
        ValueError: See [`rank`]; or arguments contradict each other, or the model does not fit the data.
    """
    settings = rank_args.gate_settings()
    try:
        check_settings(**settings)
    except ValueError as error:  # two settings have other names on the command line
        text = str(error).replace("learning_rate", "gate_learning_rate").replace("`steps`", "`gate_steps`")
        raise ValueError(text) from error
    check_evaluation(training_args, rank_args.eval_dataset_name)
    if settings["method"] == "untrained" and training_args.eval_strategy != "no":
        raise ValueError(
            "`--eval_strategy` evaluates stage 1, which `--method untrained` does not have: leave it out, or pass "
            "`--method attribution`."
        )
    stability = EpsilonStability(**rank_args.stability_settings())
    model_args.lora_target_modules = model_args.lora_target_modules or "all-linear"
    lora = lora_config(model_args)
    # push the ranked adapter at the end, not the trainer's checkpoints
    push, training_args.push_to_hub = training_args.push_to_hub, False
    output_dir = Path(training_args.output_dir)
    with lock_output_dir(output_dir):
        check_output(training_args, rank_args.adapter or rank_args.tuned_model)
        adapter, metadata = rank_args.adapter, {"dataset": script_args.dataset_name}
        if rank_args.eval_dataset_name:
            metadata["eval_dataset"] = rank_args.eval_dataset_name
        if rank_args.tuned_model:
            adapter, metadata["stage_1"] = _extract_delta(model_args, lora, rank_args, training_args)
        if adapter:
            config = _gated_config(adapter, rank_args.granularity)
        else:
            config = ILAConfig.from_lora(lora, granularity=rank_args.granularity, gate_mode="open")
        trainer = sft_trainer(script_args, training_args, model_args, config, rank_args.eval_dataset_name)
        importance = rank_in(trainer, stability, adapter, metadata, **settings)
    return importance, _pushed(trainer, output_dir / "adapter") if push else None


def prune_by_sft(
    script_args: Any, training_args: Any, model_args: Any, prune_args: PruneArguments, adapter: str
) -> tuple[Pruning, str | None]:
    """
    [`prune`] with TRL's `SFTTrainer` on a model, an adapter and a data set by name: `peft-ila prune`.

    Args:
        script_args ([`~trl.ScriptArguments`]): The data set.
        training_args ([`~trl.SFTConfig`]): Batches, precision and the output directory. With `push_to_hub`, the pruned
            adapter is uploaded with its card.
        model_args ([`~trl.ModelConfig`]): The model and its quantisation.
        prune_args ([`PruneArguments`]): How much to keep.
        adapter (`str`): A directory or a repository with a LoRA or ILA adapter.

    Returns:
        What was kept, and where it was uploaded to.

    Raises:
        FileNotFoundError: There is no such model, adapter or data file.
        ValueError: See [`prune`]; or the model, the adapter and the data do not fit.
    """
    settings, output_dir = prune_args.settings(), Path(training_args.output_dir)
    try:
        check_prune_settings(**settings)
    except ValueError as error:  # beside the trainer's settings, one has a name of its own
        raise ValueError(str(error).replace("`steps`", "`measure_steps`")) from error
    if prune_args.eval_dataset_name and training_args.eval_strategy == "no":
        training_args.eval_strategy = IntervalStrategy.EPOCH  # so that the held-out data are loaded
    push, training_args.push_to_hub = training_args.push_to_hub, False
    with lock_output_dir(output_dir):
        source = adapter_directory(adapter)
        check_pruned_output(output_dir, source)
        config = _gated_config(adapter)
        trainer = sft_trainer(script_args, training_args, model_args, config, prune_args.eval_dataset_name)
        load_adapter(trainer, source)
        pruning = prune(trainer, output_dir, **settings)
    return pruning, _pushed(trainer, output_dir) if push else None


def _pushed(trainer: Any, directory: Path) -> str | None:
    if not trainer.is_world_process_zero():
        return None
    args = trainer.args
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    return str(upload(directory, name, args.hub_token, args.hub_private_repo))


def _gated_config(adapter: str, granularity: Granularity | None = None) -> ILAConfig:
    """The configuration that puts gates on an adapter that is there already; `None`: of any granularity."""
    config = read_config(adapter_directory(adapter))
    if not isinstance(config, ILAConfig):
        config = ILAConfig.from_lora(config, granularity=granularity or "module", gate_mode="open")
    elif granularity and config.granularity != granularity:
        raise ValueError(
            f"The adapter {adapter} has one gate per {config.granularity}: pass `--granularity {config.granularity}`, "
            "or export it to plain LoRA with `peft-ila export` first."
        )
    elif config.gate_mode == "hard":
        raise ValueError(
            f"The adapter {adapter} is masked. To rank the units that its mask keeps open, run `peft-ila export "
            f"{adapter} --output_dir PLAIN` and pass `--adapter PLAIN`."
        )
    config.init_lora_weights = True  # the weights are loaded
    return config


def _extract_delta(
    model_args: Any, config: Any, rank_args: RankArguments, training_args: Any
) -> tuple[str, dict[str, Any]]:
    """Write the delta of a fully fine-tuned model as an adapter, once."""
    delta = Path(training_args.output_dir) / "delta"
    report = delta / "delta.json"
    wanted = {
        "base_model": model_args.model_name_or_path,
        "revision": model_args.model_revision,
        "tuned_model": rank_args.tuned_model,
        "tuned_rank": rank_args.tuned_rank,
        "target_modules": model_args.lora_target_modules,
    }
    with PartialState().main_process_first():
        facts = _read_facts(report)
        if not facts.items() >= wanted.items():
            with whole_directory(delta, own=(CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, report.name)) as temporary:
                facts = wanted | extract_lora(
                    model_name(model_args.model_name_or_path),
                    model_name(rank_args.tuned_model, "tuned_model"),
                    config,
                    temporary,
                    rank=rank_args.tuned_rank,
                    revision=model_args.model_revision,
                    trust_remote_code=training_args.trust_remote_code,
                )
                (temporary / report.name).write_text(json.dumps(facts))
    return str(delta), facts


def _read_facts(report: Path) -> dict[str, Any]:
    if not report.exists():
        return {}
    facts = read_json(report)
    return facts if isinstance(facts, dict) else {}
