"""Help and versions of the command line, and silence for other libraries."""

import argparse
import copy
import importlib.metadata
import logging
import warnings

from .version import __version__

EXIT_CODES = "Exit codes: 0 done; 1 an error, one line on stderr; 2 a wrong command line; 130 Ctrl-C."

# the TRL settings that most runs need, for `--help`
TRL_OPTIONS = {
    "model_name_or_path": "The model: a directory, or a name on the hub.",
    "dataset_name": "The data: a `.jsonl` file in one of TRL's formats, or a name on the hub.",
    "output_dir": "Where to write all results.",
    "resume_from_checkpoint": "True: resume a killed run.",
    "learning_rate": "2e-4 by default, 2e-5 with `tune --full`.",
    "num_train_epochs": "The maximum number of epochs.",
    "max_steps": "The maximum number of steps; overrides the epochs.",
    "per_device_train_batch_size": "The number of examples per batch.",
    "gradient_accumulation_steps": "The number of batches per step.",
    "max_length": "The maximum number of tokens per example.",
    "logging_steps": "Log the loss every N steps.",
    "eval_strategy": "Evaluate on held-out data: 'no', 'steps' or 'epoch'.",
    "seed": "The seed of the initial weights and the data order.",
    "lora_r": "LoRA's rank.",
    "lora_alpha": "LoRA's alpha.",
    "lora_dropout": "LoRA's dropout.",
    "load_in_4bit": "Quantise the model to NF4 (QLoRA).",
    "gradient_checkpointing": "Recompute activations in the backward pass.",
    "report_to": "Where to log, such as 'wandb', or 'none'.",
    "push_to_hub": "Upload the result.",
}

# lines that libraries print on each start, or that only their authors can act on
_LOGGED = {
    "torchao": ("Failed to load", "Skipping import of cpp extensions"),
    "torchao.kernel.intmm": ("Detected no triton",),
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
    "datasets.packaged_modules.json.json": ("Failed to load JSON from file",),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}
_WARNED = (
    (r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning),
    (r"'pin_memory' argument is set as true but no accelerator is found", UserWarning),
)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _LOGGED[record.name])


def silence_others() -> None:
    """Hide known lines of other libraries, each by its own text. Call it before they are imported."""
    for name in _LOGGED:
        logging.getLogger(name).addFilter(_is_news)
    for message, category in _WARNED:
        warnings.filterwarnings("ignore", message=message, category=category)


def versions() -> str:
    """The versions of peft-ila and the libraries that its results depend on, without importing them."""
    lines = [f"peft-ila {__version__}"]
    for name in ("peft", "torch", "transformers", "trl"):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names each option once, with its default unless it is None or False."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)  # the parser also takes `--top-p`
        shown.option_strings = [name for name in action.option_strings if "-" not in name.removeprefix("--")[1:]]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)
