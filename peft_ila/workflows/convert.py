"""Write a selection for PEFT or another program: `peft-ila convert`."""

import logging
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..choices import Format
from ..export.recipes import write_recipe
from ..files import whole_file
from ..ranking.importance import LayerImportance
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
    Write `adapter_config.json` for the selected units, or the settings for another program.

    Args:
        importance ([`LayerImportance`]): The ranking.
        output_dir: Where to write the file.
        format (`str`): `"peft"`, or see [`LayerImportance.to_recipe`].
        selection (`dict`): The arguments of [`LayerImportance.select`].
        model_name_or_path (`str`, *optional*):
            The ranked model, to check the result by injection into its architecture. By default, the model in the
            ranking's metadata; if it is not found, only names are checked.
        memory_budget (`int` or `str`, *optional*): Instead of a selection, see [`select_within`].
        step (`dict`): The arguments of [`select_within`] for the training step.
        **lora: `r`, `lora_alpha` and `lora_dropout` of LoRA.

    Returns:
        The file and the selected units.
    """
    for weights in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if format == "peft" and (output_dir / weights).exists():
            raise ValueError(f"{output_dir} holds a trained adapter ({weights}). Choose another `output_dir`.")
    if model_name_or_path is None:
        model = _ranked_config(importance)
    else:
        model = model_config(model_name_or_path, trust_remote_code=False)  # a check runs no code from the hub
    if memory_budget is not None:
        if model is None:
            raise ValueError("A memory budget needs the model: pass `--model_name_or_path`.")
        if format == "axolotl-full":
            raise ValueError("`--memory_budget` counts LoRA only: for `--format axolotl-full`, select by `--top_p`.")
        from .budget import select_within  # slow

        units = select_within(model, importance, memory_budget, **(step or {}), **lora)
    else:
        units = importance.select(**(selection or {}))
    if format == "peft":
        path = output_dir / CONFIG_NAME
        config = importance.to_lora_config(units=units, model=model, **lora)
        with whole_file(path) as temporary:
            config.save_pretrained(str(temporary.parent))
    else:
        path = output_dir / f"{format}.yaml"
        write_recipe(importance.to_recipe(format, units=units, model=model, **lora), path)
    return path, units


def _ranked_config(importance: LayerImportance) -> Any:
    model = importance.metadata.get("model")
    try:
        return model_config(model, local_files_only=True, trust_remote_code=False) if model else None
    except (OSError, ValueError):
        logger.warning(
            f"The configuration of {str(model)[:80]!r} was not found, so targets are checked by name only. To check "
            "them on the model, pass `--model_name_or_path`."
        )
        return None
