"""Rank a model on a data set by name, with TRL's trainer and arguments: `peft-ila rank`."""

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig
from transformers import IntervalStrategy, set_seed
from trl import SFTTrainer, get_peft_config, get_quantization_config

from ..export.adapters import adapter_directory, read_config
from ..ranking.card import upload
from ..ranking.importance import LayerImportance
from ..search.delta import extract_lora
from ..search.gates import check_settings
from ..search.stability import EpsilonStability
from ..tuner.config import ILAConfig
from ..tuner.model import disable_cpu_4bit_packing
from ..units import Granularity
from .arguments import PruneArguments, RankArguments, required, short
from .data import is_file, load_dataset
from .models import model_name
from .prune import Pruning, check_prune_settings, check_pruned_output, prune
from .rank import RESULTS, rank_in
from .training import check_free, load_adapter, lock_output_dir


def lora_config(model_args: Any) -> Any:
    """The [`~peft.LoraConfig`] that TRL makes from its [`~trl.ModelConfig`]."""
    model_args.use_peft = True
    targets = model_args.lora_target_modules
    if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.]+", targets):
        model_args.lora_target_modules = [targets]  # TRL reads a single name as a pattern, which matches no module
    return get_peft_config(model_args)


def sft_trainer(
    script_args: Any,
    training_args: Any,
    model_args: Any,
    peft_config: PeftConfig | None,
    eval_dataset_name: str | None = None,
) -> SFTTrainer:
    """An [`~trl.SFTTrainer`] as in TRL's own script. The arguments are TRL's, plus the held-out data's name."""
    if eval_dataset_name and training_args.eval_strategy == "no":
        raise ValueError("`--eval_dataset_name` needs `--eval_strategy steps` or `epoch`.")
    if script_args.dataset_streaming:
        raise ValueError(
            "`--dataset_streaming` is not supported. For a part of a large data set, pass a split such as "
            '`--dataset_train_split "train[:2000]"`.'
        )
    set_seed(training_args.seed)  # the trainer makes LoRA's initial weights before it sets its seed
    name = model_name(model_args.model_name_or_path)
    dataset = required(script_args.dataset_name, "dataset_name")
    train_dataset = load_dataset(dataset, script_args.dataset_config, script_args.dataset_train_split)
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
    try:
        trainer = SFTTrainer(
            model=name,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=peft_config,
        )
    except Exception as error:  # columns that TRL does not know, a chat template that refuses the data, …
        clear = isinstance(error, (OSError, ValueError, ImportError, torch.OutOfMemoryError))
        if clear and not isinstance(error, UnicodeError):
            raise
        columns = {dataset: train_dataset.column_names}
        if eval_dataset is not None:
            columns[eval_dataset_name or "the evaluation split"] = eval_dataset.column_names
        found = ", ".join(f"{data} has the columns {short(sorted(names))}" for data, names in columns.items())
        raise ValueError(
            f"{name} cannot be trained on {dataset}: {type(error).__name__}: {error}. {found}. TRL takes `messages`, "
            "`prompt` and `completion`, or `text`, in every example: https://huggingface.co/docs/trl/dataset_formats"
        ) from error
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
    if data is None:
        return
    if not len(data):
        raise ValueError(
            f"No example of {name} is left to {purpose} on: none has an answer token within `--max_length "
            f"{trainer.args.max_length}`. Raise it, or check the data."
        )
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)  # a processor has one
    known = trainer.accelerator.unwrap_model(trainer.model).config.get_text_config().vocab_size
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
        training_args ([`~trl.SFTConfig`]): Both stages. `push_to_hub` uploads the ranked adapter with its card.
        model_args ([`~trl.ModelConfig`]): The model, its quantisation, LoRA's options.
        rank_args ([`RankArguments`]): The search.

    Returns:
        The ranking, and the URL of the upload.
    """
    settings = rank_args.gate_settings()
    try:
        check_settings(**settings)
    except ValueError as error:  # two settings have other names on the command line
        text = str(error).replace("learning_rate", "gate_learning_rate").replace("`steps`", "`gate_steps`")
        raise ValueError(text) from error
    for name, passed in (
        ("eval_strategy", training_args.eval_strategy != "no"),
        ("eval_dataset_name", rank_args.eval_dataset_name),
    ):
        if settings["method"] == "untrained" and passed:
            raise ValueError(
                f"`--{name}` evaluates stage 1, which `--method untrained` does not have: leave it out, or pass "
                "`--method attribution`."
            )
    stability = EpsilonStability(**rank_args.stability_settings())
    model_args.lora_target_modules = model_args.lora_target_modules or "all-linear"
    lora = lora_config(model_args)
    # push the ranked adapter at the end, not the trainer's checkpoints
    push, training_args.push_to_hub = training_args.push_to_hub, False
    output_dir = Path(training_args.output_dir)
    with lock_output_dir(output_dir):
        check_free(training_args, *RESULTS)
        adapter, metadata = rank_args.adapter, {"dataset": script_args.dataset_name}
        if rank_args.eval_dataset_name:
            metadata["eval_dataset"] = rank_args.eval_dataset_name
        if rank_args.tuned_model:
            adapter, metadata["stage_1"] = _extract_delta(model_args, lora, rank_args, training_args)
        if adapter:
            config = _gated_config(adapter_directory(adapter), rank_args.granularity)
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
        config = _gated_config(source)
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


def _gated_config(adapter: Path, granularity: Granularity | None = None) -> ILAConfig:
    """The configuration that puts gates on an adapter that is there already; `None`: of any granularity."""
    config = read_config(adapter)
    if not isinstance(config, ILAConfig):
        config = ILAConfig.from_lora(config, granularity=granularity or "module", gate_mode="open")
    elif granularity and config.granularity != granularity:
        raise ValueError(
            f"The adapter {adapter} has one gate per {config.granularity}: pass `--granularity {config.granularity}`, "
            "or export it to plain LoRA with `peft-ila export` first."
        )
    elif config.gate_mode == "hard":
        raise ValueError(
            f"The adapter {adapter} is masked. Run `peft-ila export {adapter} --output_dir PLAIN`, which leaves out "
            "what the mask closes, and pass PLAIN instead."
        )
    config.init_lora_weights = True  # the weights are loaded
    return config


def _extract_delta(
    model_args: Any, config: Any, rank_args: RankArguments, training_args: Any
) -> tuple[str, dict[str, Any]]:
    """Write the delta of a fully fine-tuned model as an adapter."""
    delta, state = Path(training_args.output_dir) / "delta", PartialState()
    facts: dict[str, Any] = {"tuned_model": rank_args.tuned_model, "tuned_rank": rank_args.tuned_rank}
    if state.is_main_process:
        facts |= extract_lora(
            model_name(model_args.model_name_or_path),
            model_name(rank_args.tuned_model, "tuned_model"),
            config,
            delta,
            rank=rank_args.tuned_rank,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
    state.wait_for_everyone()
    return str(delta), facts
