"""Which rankings are valid. They may come from a damaged file."""

import sys
from collections import Counter
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, TypeGuard, get_origin

from ..units import check_name

_LONGEST = 1000  # characters of a path or name


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether the value is an integer of Python or NumPy, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    # a bool is no number here, and an integer may be too large for a float
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def check_kinds(ranking: Any) -> None:
    """Check that the fields of a [`LayerImportance`] are lists and dicts, and its names are names."""
    for field in fields(ranking):
        value: Any = getattr(ranking, field.name)
        kind: Any = get_origin(field.type)
        if not isinstance(value, kind):
            raise TypeError(f"`{field.name}` must be a {kind.__name__}, got a {type(value).__name__}.")
    for name in (*ranking.units, *ranking.lookalikes):
        check_name(name)


def _check_metadata(metadata: dict[str, Any]) -> None:
    """Check what conversions and pictures use."""
    for key in ("model", "model_type", "task_type"):
        value = metadata.get(key)
        name = isinstance(value, str) and len(value) <= _LONGEST
        # a path may hold anything
        if value is not None and not (name and (key == "model" or value.isprintable())):
            raise ValueError(f"`metadata[{key!r}]` must be a name, got {repr(value)[:80]}.")


def check_ranking(ranking: Any) -> None:
    """Check the values of a [`LayerImportance`] and how they fit together."""
    units, scores, spread = ranking.units, ranking.scores, ranking.spread
    if not units:
        raise ValueError("A ranking needs at least one unit, got none.")
    if len(scores) != len(units):
        raise ValueError(f"Each unit needs one score, got {len(scores)} scores for {len(units)} units.")
    for unit, score in zip(units, scores):
        if not _finite(score):
            raise ValueError(
                f"The score of {unit!r} is {repr(score)[:40]}; scores must be finite numbers. Did training diverge?"
            )
    if spread and (len(spread) != len(units) or not all(_finite(error) and error >= 0 for error in spread)):
        raise ValueError(f"`spread` must hold one finite number of at least 0 for each of {len(units)} units.")
    if repeated := next((unit for unit, number in Counter(units).items() if number > 1), None):
        raise ValueError(f"Each unit must appear once, but {repeated!r} is repeated.")
    if ranking.modules.keys() != set(units):
        raise ValueError("`modules` must list the target modules of exactly the given units.")
    _check_modules(ranking.modules, ranking.lookalikes, ranking.parameters)
    _check_metadata(ranking.metadata)


def _check_modules(modules: dict[str, Any], lookalikes: list[str], parameters: dict[str, Any]) -> None:
    known: set[str] = set()
    for unit, own in modules.items():
        if not isinstance(own, list) or not own:
            raise ValueError(f"`modules` must hold a list of at least one name for {unit!r}, got {str(own)[:80]!r}.")
        for name in own:
            check_name(name)
            if name != unit and not name.startswith(f"{unit}."):
                raise ValueError(f"`modules` lists {name!r} for {unit!r}, but it is not part of that unit.")
            if name in known:
                raise ValueError(f"`modules` lists {name!r} twice.")
            known.add(name)
    if wrong := known.intersection(lookalikes):
        raise ValueError(f"{min(wrong)!r} is a target module and cannot be among `lookalikes`.")
    for name, multiple in parameters.items():
        if name not in known:
            raise ValueError(f"`parameters` names {str(name)[:80]!r}, which belongs to no unit.")
        if not _finite(multiple) or multiple <= 0:
            raise ValueError(f"`parameters` must hold a number above 0 for {name!r}, got {repr(multiple)[:40]}.")
