"""A ranking's selection as a file for PEFT or another program: what `peft-ila convert` does."""

import logging
from pathlib import Path
from typing import Any

from ..choices import Format
from ..export.recipes import write_recipe
from ..files import whole_file
from ..ranking.importance import LayerImportance
from .budget import select_within
from .models import model_config

logger = logging.getLogger(__name__)


def convert(
    importance: LayerImportance,
    output_dir: Path,
    format: Format = "peft",
    selection: dict[str, Any] | None = None,
    model_name_or_path: str | None = None,
    memory_budget: int | str | None = None,
    step: dict[str, Any] | None = None,
    **lora: Any,
) -> tuple[Path, list[str]]:
    """
    Write `adapter_config.json` of the selected units, or the settings that make another program tune them.

    Args:
        importance ([`LayerImportance`]): The ranking.
        output_dir: Where to write the file.
        format (`str`): `"peft"`, or see [`LayerImportance.to_recipe`].
        selection (`dict`): The arguments of [`LayerImportance.select`].
        model_name_or_path (`str`, *optional*):
            The ranked model, to check the conversion by injection into its architecture. By default the one in the
            ranking's metadata, which may be gone; then names alone are compared.
        memory_budget (`int` or `str`, *optional*): Instead of a selection, see [`select_within`].
        step (`dict`): The arguments of [`select_within`] that say what a training step is.
        **lora: `r`, `lora_alpha` and `lora_dropout` of LoRA.

    Returns:
        The file, and the selected units.

    Raises:
        OSError: There is no such model.
        ValueError: A bad selection or budget, another model than the ranked one, or targets that the program cannot
            name.
    """
    model = _ranked_config(importance) if model_name_or_path is None else _config(model_name_or_path, hub=True)
    if memory_budget is not None:
        if model is None:
            raise ValueError("A memory budget needs the model: say where it is by `--model_name_or_path`.")
        if format == "axolotl-full":
            raise ValueError("A memory budget is of tuning by LoRA: full fine-tuning is not counted.")
        units = select_within(model, importance, memory_budget, **(step or {}), **lora)
    else:
        units = importance.select(**(selection or {}))
    if format == "peft":
        path = output_dir / "adapter_config.json"
        config = importance.to_lora_config(units=units, model=model, **lora)
        with whole_file(path) as temporary:
            config.save_pretrained(str(temporary.parent))
    else:
        path = output_dir / f"{format}.yaml"
        write_recipe(importance.to_recipe(format, units=units, model=model, **lora), path)
    return path, units


def _config(model: str, hub: bool) -> Any:
    # code from the hub is not run for a check, nor asked about on the terminal
    return model_config(model, local_files_only=not hub, trust_remote_code=False)


def _ranked_config(importance: LayerImportance) -> Any:
    model = importance.metadata.get("model")
    try:
        return _config(model, hub=False) if model else None
    except (OSError, ValueError):
        logger.warning(
            f"The configuration of {str(model)[:80]!r} is not at hand; the targets are checked by name only. Say "
            "where it is by `--model_name_or_path`."
        )
        return None
