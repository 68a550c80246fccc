"""What the command line shows around the work: help, versions, no noise of others."""

import argparse
import copy
import importlib.metadata
import logging
import warnings

from .version import __version__

EXIT_CODES = "Exit codes: 0 done; 1 an error, one line on stderr; 2 a wrong command line; 130 Ctrl-C."

# the settings of TRL that most runs need, for `--help`
TRL_OPTIONS = {
    "model_name_or_path": "The model: a directory, or a name on the hub.",
    "dataset_name": "The data: a `.jsonl` file in one of TRL's formats, or a name on the hub.",
    "output_dir": "Where to write all results.",
    "resume_from_checkpoint": "True: go on with a run that was killed.",
    "learning_rate": "2e-4 by default, 2e-5 with `tune --full`.",
    "num_train_epochs": "At most so many epochs,",
    "max_steps": "or at most so many steps.",
    "per_device_train_batch_size": "The number of examples of a batch,",
    "gradient_accumulation_steps": "and of batches of a step.",
    "max_length": "The greatest number of tokens of an example.",
    "logging_steps": "Log the loss every so many steps.",
    "eval_strategy": "Evaluate on held-out data: 'no', 'steps' or 'epoch'.",
    "seed": "Of the first weights and the order of the data.",
    "lora_r": "LoRA's rank.",
    "lora_alpha": "LoRA's alpha.",
    "lora_dropout": "LoRA's dropout.",
    "load_in_4bit": "Quantise the model to NF4 (QLoRA).",
    "gradient_checkpointing": "Compute activations again in the backward pass.",
    "report_to": "Where to log to, such as 'wandb', or 'none'.",
    "push_to_hub": "Upload the result.",
}

# what libraries log or warn of on each start, or that only their authors can act on
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
    """Keep known lines of other libraries from the terminal, each by its own text; before they are imported."""
    for name in _LOGGED:
        logging.getLogger(name).addFilter(_is_news)
    for message, category in _WARNED:
        warnings.filterwarnings("ignore", message=message, category=category)


def versions() -> str:
    """The version of peft-ila, and of what its results depend on, where it is installed; imports none of them."""
    lines = [f"peft-ila {__version__}"]
    for name in ("peft", "torch", "transformers", "trl"):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names each option once, with its default if that says something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)  # the parser takes `--top-p` beside `--top_p`
        shown.option_strings = [name for name in action.option_strings if "-" not in name.removeprefix("--")[1:]]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)
