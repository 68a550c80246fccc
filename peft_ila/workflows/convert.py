"""A ranking's selection as a file for PEFT or another program: what `peft-ila convert` does."""

import logging
from pathlib import Path
from typing import Any

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
    **lora: Any,
) -> Path:
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
        **lora: `r`, `lora_alpha` and `lora_dropout` of LoRA.

    Returns:
        The file.

    Raises:
        OSError: There is no such model.
        ValueError: A bad selection, another model than the ranked one, or targets that the program cannot name.
    """
    model = _ranked_config(importance) if model_name_or_path is None else _config(model_name_or_path, hub=True)
    if format == "peft":
        path = output_dir / "adapter_config.json"
        config = importance.to_lora_config(**(selection or {}), model=model, **lora)
        with whole_file(path) as temporary:
            config.save_pretrained(str(temporary.parent))
    else:
        path = output_dir / f"{format}.yaml"
        write_recipe(importance.to_recipe(format, **(selection or {}), model=model, **lora), path)
    return path


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
