"""Base models by name: a directory or a repository, and a configuration that may hold anything."""

import os
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import CONFIG_NAME

from ..files import open_safetensors, read_json
from .arguments import required

_MOST_BYTES, _MOST_LAYERS = 2**24, 10_000  # of a configuration; those of real models stay far below


def model_name(value: str | None, flag: str = "model_name_or_path") -> str:
    """
    The name of a model, as `from_pretrained` takes it.

    Raises:
        ValueError: The name is missing, or a file in the model's directory is damaged.
        FileNotFoundError: It is that of a directory that does not exist.
    """
    name = os.path.expanduser(required(value, flag))
    directory = Path(name)
    if not directory.exists() and name.startswith((".", "/")):
        raise FileNotFoundError(f"There is no model directory {name}.")
    if directory.is_file():
        raise ValueError(f"`--{flag}` must be the directory of a model or its name on the hub, but {name} is a file.")
    for path in directory.glob("*.safetensors") if directory.is_dir() else ():
        with open_safetensors(path):
            pass
    return name


def model_config(name: str, **kwargs: Any) -> Any:
    """
    The configuration of a model.

    Args:
        name: A directory, or a name on the hub.
        **kwargs: Of [`~transformers.AutoConfig.from_pretrained`].

    Raises:
        OSError: There is none.
        ValueError: It cannot be read, or is of no model that could exist.
    """
    directory = Path(name)
    if directory.is_dir():
        read_json(directory / CONFIG_NAME, _MOST_BYTES)
    try:
        config: Any = AutoConfig.from_pretrained(name, **kwargs)
    except ImportError:
        raise
    except OSError as error:
        if directory.is_dir():
            raise
        raise OSError(f"There is no model directory {name}, and the hub gives none of that name: {error}") from error
    except Exception as error:  # whatever the values in it make transformers do
        raise ValueError(f"The configuration of {name} cannot be read: {error}") from error
    _check_depth(config.to_dict(), name)
    return config


def _check_depth(values: dict[Any, Any], name: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _check_depth(value, name)
        elif re.search(r"layers?$|^depth", str(key)) and isinstance(value, int) and value > _MOST_LAYERS:
            raise ValueError(f"The configuration of {name} has `{key}` {value}, more than {_MOST_LAYERS}.")
