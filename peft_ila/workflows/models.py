"""Base models by name, a directory or a repository, with checks of their configuration."""

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..files import open_safetensors
from .arguments import required

_MOST_LAYERS = 10_000  # far above real models


def model_name(value: str | None, flag: str = "model_name_or_path") -> str:
    """The name of a model for `from_pretrained`, after checks of its files."""
    name = required(value, flag)
    directory = Path(name)
    if not directory.is_dir() and (directory.exists() or name.startswith((".", "/"))):
        raise FileNotFoundError(f"There is no model directory {name}.")
    for path in directory.glob("*.safetensors"):
        with open_safetensors(path):
            pass
    return name


def model_config(name: str, **kwargs: Any) -> Any:
    """The configuration of a model, by [`~transformers.AutoConfig.from_pretrained`]."""
    try:
        config: Any = AutoConfig.from_pretrained(name, **kwargs)
    except ImportError:
        raise
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise OSError(f"There is no model directory {name}, and the hub has no such model: {error}") from error
    except Exception as error:  # transformers may raise anything for bad values
        raise ValueError(f"The configuration of {name} cannot be read: {error}") from error
    _check_depth(config.to_dict(), name)
    return config


def _check_depth(values: dict[Any, Any], name: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _check_depth(value, name)
        elif re.search(r"layers?$|^depth", str(key)) and isinstance(value, int) and value > _MOST_LAYERS:
            raise ValueError(f"The configuration of {name} has `{key}` {value}; the maximum is {_MOST_LAYERS}.")
