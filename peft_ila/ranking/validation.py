"""Checks of the fields of a ranking."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

from ..units import check_name

_LONGEST = 1000  # characters of a path or name


def check_ranking(
    units: Any, scores: Any, metadata: Any, modules: Any, lookalikes: Any, spread: Any, parameters: Any
) -> None:
    """Check the fields of a [`LayerImportance`]."""
    for field, value, kind in (
        ("units", units, list),
        ("scores", scores, list),
        ("metadata", metadata, dict),
        ("modules", modules, dict),
        ("lookalikes", lookalikes, list),
        ("spread", spread, list),
        ("parameters", parameters, dict),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"`{field}` must be a {kind.__name__}, got a {type(value).__name__}.")
    if not units:
        raise ValueError("A ranking needs at least one unit, got none.")
    _check_names(units, "unit")
    _check_names(lookalikes, "entry of `lookalikes`")
    _check_numbers(units, scores, spread)
    _check_modules(units, modules, lookalikes, parameters)


def check_metadata(metadata: Any) -> None:
    """Check the metadata of a ranking file."""
    if not isinstance(metadata, dict):
        raise TypeError(f"`metadata` must be a dict, got a {type(metadata).__name__}.")
    for key in ("model", "model_type", "task_type"):
        if not isinstance(metadata.get(key), (str, type(None))):
            raise TypeError(f"`metadata[{key!r}]` must be a string, got a {type(metadata[key]).__name__}.")
        if len(metadata.get(key) or "") > _LONGEST:
            raise ValueError(f"`metadata[{key!r}]` has {len(metadata[key])} characters; the maximum is {_LONGEST}.")
        if key != "model" and not (metadata.get(key) or "").isprintable():  # a path may hold anything
            raise ValueError(f"`metadata[{key!r}]` must be a name, got {metadata[key][:40]!r}.")


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether the value is an integer of Python or NumPy, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_names(names: Iterable[Any], what: str) -> None:
    seen = set()
    for name in names:
        check_name(name)
        if name in seen:
            raise ValueError(f"Each {what} must appear once, but {name!r} is repeated.")
        seen.add(name)


def _finite(value: Any) -> bool:
    # a bool is no number here, and an integer may be too large for a float
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _check_numbers(units: Sequence[str], scores: Sequence[Any], spread: Sequence[Any]) -> None:
    if len(scores) != len(units):
        raise ValueError(f"Each unit needs one score, got {len(scores)} scores for {len(units)} units.")
    for unit, score in zip(units, scores):
        if not _finite(score):
            raise ValueError(
                f"The score of {unit!r} is {repr(score)[:40]}; scores must be finite numbers. Did training diverge?"
            )
    if spread and (len(spread) != len(units) or not all(_finite(error) and error >= 0 for error in spread)):
        raise ValueError(f"`spread` must hold one finite number of at least 0 for each of {len(units)} units.")


def _check_modules(
    units: Sequence[str], modules: Mapping[str, Any], lookalikes: Sequence[str], parameters: Mapping[Any, Any]
) -> None:
    if modules.keys() != set(units):
        raise ValueError("`modules` must list the target modules of exactly the given units.")
    unit_of_module: dict[str, str] = {}
    for unit, own in modules.items():
        if not isinstance(own, list) or not own:
            raise ValueError(f"`modules` must hold a list of at least one name for {unit!r}, got {str(own)[:80]!r}.")
        for name in own:
            check_name(name)
            if name != unit and not name.startswith(f"{unit}."):
                raise ValueError(f"`modules` lists {name!r} for {unit!r}, but it is not part of that unit.")
            if name in unit_of_module:
                raise ValueError(f"`modules` lists {name!r} twice, for {unit_of_module[name]!r} and {unit!r}.")
            unit_of_module[name] = unit
    if wrong := next((name for name in lookalikes if name in unit_of_module), None):
        raise ValueError(f"{wrong!r} is a target module and cannot be among `lookalikes`.")
    for name, multiple in parameters.items():
        if name not in unit_of_module:
            raise ValueError(f"`parameters` names {str(name)[:80]!r}, which belongs to no unit.")
        if not _finite(multiple) or multiple <= 0:
            raise ValueError(f"`parameters` must hold a number above 0 for {name!r}, got {repr(multiple)[:40]}.")
