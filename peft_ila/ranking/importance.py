"""LayerImportance: the scores of all units, and how to use them."""

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..choices import RecipeFormat
from ..files import read_json, whole_file
from .comparison import SURE, is_coin_toss, mean_and_error, membership, spearman, standardised
from .published import find
from .validation import check_kinds, check_ranking, is_integer

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from matplotlib.figure import Figure
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PretrainedConfig
    from typing_extensions import Unpack

    from ..export.lora import Targets

logger = logging.getLogger(__name__)

_FORMAT = "peft_ila.LayerImportance"
_VERSION = 1


class Selection(TypedDict, total=False):
    """The arguments of [`LayerImportance.select`] besides `top_p`."""

    top_k: int | None
    threshold: float | None
    min_probability: float | None
    units: Sequence[str] | None


@dataclass(repr=False)
class LayerImportance:
    """
    The importance of the units of a model for one fine-tuning task.

    Args:
        units (`list[str]`):
            The units in the order of the model: decoder layers such as `"model.layers.3"`, or modules such as
            `"model.layers.3.mlp.up_proj"`.
        scores (`list[float]`): One finite number per unit; a greater score is more important.
        metadata (`dict`): How the scores were made, in JSON values.
        modules (`dict[str, list[str]]`, *optional*):
            The target modules and parameters of each unit. By default, each unit is a module itself.
        lookalikes (`list[str]`, *optional*):
            Modules that are not targets but share the last part of a target's name, so that [`to_lora_config`] can
            tell them apart without the model.
        spread (`list[float]`, *optional*):
            The standard error of each score. [`learn_gates`] estimates it from the differences between batches.
        parameters (`dict[str, float]`, *optional*):
            The entries of `modules` that are parameters, such as fused experts, with the rank of each in multiples of
            LoRA's (PEFT doubles the rank for two fused projections).

    Raises:
        TypeError, ValueError: A field has the wrong type, a name is no module's or is repeated, a module is outside
            its unit, a score is missing or not finite.
    """

    units: list[str]
    scores: list[float]
    metadata: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, list[str]] = field(default_factory=dict)
    lookalikes: list[str] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    parameters: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kinds(self)
        self.modules = self.modules or {unit: [unit] for unit in self.units}
        check_ranking(self)
        self.modules = {unit: self.modules[unit] for unit in self.units}  # in the order of the model

    def __repr__(self) -> str:
        ranking = self.ranking()
        shown = ", ".join(ranking[:3] + ["…"] * (len(ranking) > 3))
        model = f" of {name!r}" if (name := self.metadata.get("model")) else ""
        return f"LayerImportance({len(ranking)} units{model}, most important first: {shown})"

    @property
    def gates(self) -> list[float]:
        """γ = σ(s) of each unit, in the order of `units`."""
        return [1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(score)) for score in self.scores]

    def ranking(self) -> list[str]:
        """All units, most important first. Ties keep the order of the model."""
        return [self.units[i] for i in sorted(range(len(self.units)), key=lambda i: -self.scores[i])]

    def select(
        self,
        top_p: float | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        min_probability: float | None = None,
        units: Sequence[str] | None = None,
    ) -> list[str]:
        """
        The most important units, most important first. Pass exactly one of `top_p`, `top_k`, `threshold` and `units`.

        Args:
            top_p (`float`, *optional*): The share of units to select, in (0, 1], rounded to at least one unit.
            top_k (`int`, *optional*): The number of units to select.
            threshold (`float`, *optional*): The minimum gate γ of a selected unit, in [0, 1].
            min_probability (`float`, *optional*):
                Keep only units that belong to the share or number with at least this probability, see [`probability`].
            units (`list[str]`, *optional*):
                The units, such as those that fit into a memory budget, see [`~workflows.budget.select_within`].

        Raises:
            ValueError: Not exactly one of the four is passed, a value is out of range, a unit is not in the ranking,
                no unit is left, or all scores are equal, as before any search, and cannot select a part.
        """
        ways = {"top_p": top_p, "top_k": top_k, "threshold": threshold, "units": units}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"Pass exactly one of `top_p`, `top_k`, `threshold` and `units`, got {given}.")
        if min_probability is not None and given[0] in ("threshold", "units"):
            raise ValueError("`min_probability` goes with `top_p` or `top_k`, not with `threshold` or `units`.")
        if units is not None:
            return self._listed(units)
        if threshold is not None:
            return _reaching(self.ranking(), dict(zip(self.units, self.gates)), "threshold", threshold)
        selected = self.ranking()[: self._number(top_p, top_k)]
        if min_probability is not None:
            selected = _reaching(selected, self.probability(top_p, top_k), "min_probability", min_probability)
        if len(selected) < len(self.units) and len(set(self.scores)) == 1:
            raise ValueError(
                f"All {len(self.units)} units have the same score, {self.scores[0]}, so the ranking cannot select "
                f"{len(selected)} of them. Rank them first, for example by `learn_gates(trainer)`, or select all by "
                "`top_p=1.0` or some by `units`."
            )
        return selected

    def _listed(self, units: Sequence[str]) -> list[str]:
        if not units or isinstance(units, str):
            raise ValueError(f"`units` must be a list of at least one unit, got {units!r}.")
        chosen = set(units)
        if unknown := sorted(chosen - set(self.units)):
            raise ValueError(f"The ranking has no unit {unknown[0]!r} ({len(unknown)} of {len(units)} are unknown).")
        return [unit for unit in self.ranking() if unit in chosen]

    def _number(self, top_p: float | None, top_k: int | None) -> int:
        if (top_p is None) == (top_k is None):
            raise ValueError(f"Pass exactly one of `top_p` and `top_k`, got {top_p=}, {top_k=}.")
        if top_p is not None:
            if not 0 < top_p <= 1:
                raise ValueError(f"`top_p` is the share of units to select and must be in (0, 1], got {top_p}.")
            return max(1, round(top_p * len(self.units)))
        if not is_integer(top_k) or not 1 <= top_k <= len(self.units):
            raise ValueError(f"`top_k` must be a whole number from 1 to {len(self.units)}, got {top_k}.")
        return int(top_k)

    def probability(self, top_p: float | None = None, top_k: int | None = None) -> dict[str, float]:
        """
        The probability of each unit that it stays in the selection with ever more batches.

        It is estimated from 1,000 draws of all scores, each from a normal distribution with the score as mean and its
        `spread` as standard deviation. It covers the noise of fine-tuning (another seed, other data) only if the
        ranking is a mean over such runs. A second measurement has its own noise, so its selection differs more often.

        Args:
            top_p, top_k: See [`select`].

        Raises:
            ValueError: The ranking has no `spread`, or the selection is invalid.
        """
        if not self.spread:
            raise ValueError("The probabilities are unknown: this ranking has no `spread`.")
        return dict(zip(self.units, membership(self.scores, self.spread, self._number(top_p, top_k))))

    def coin_tosses(self, top_p: float | None = None, top_k: int | None = None) -> list[str]:
        """
        The units whose selection is uncertain: their [`probability`] is between ¼ and ¾.

        Args:
            top_p, top_k: See [`select`].
        """
        probability = self.probability(top_p, top_k)
        return [unit for unit in self.ranking() if is_coin_toss(probability[unit])]

    def overlap(self, other: "LayerImportance", top_p: float = 0.75) -> float:
        """
        The Jaccard index |A ∩ B| / |A ∪ B| of the two selections.

        Args:
            other (`LayerImportance`): A ranking of the same units.
            top_p (`float`): The share of units to select. At 0.75, two random rankings overlap by 0.60.

        Raises:
            ValueError: The rankings have different units.
        """
        self._check_same_units(other)
        number = self._number(top_p, None)
        # not `select`, which refuses equal scores: here they are compared in the order of the model
        ours, theirs = set(self.ranking()[:number]), set(other.ranking()[:number])
        return len(ours & theirs) / len(ours | theirs)

    def spearman(self, other: "LayerImportance") -> float:
        """
        Spearman's rank correlation of the scores. Ties get their mean rank; NaN if one side has only one value.

        Args:
            other (`LayerImportance`): A ranking of the same units.

        Raises:
            ValueError: The rankings have different units.
        """
        self._check_same_units(other)
        theirs = dict(zip(other.units, other.scores))
        return spearman(self.scores, [theirs[unit] for unit in self.units])

    @classmethod
    def mean(cls, rankings: "Iterable[LayerImportance]") -> "LayerImportance":
        """
        The mean of several rankings, such as of one model on different data, by their standardised scores.

        Args:
            rankings (`list[LayerImportance]`):
                At least two rankings of one model type, with the same units and modules.

        Returns:
            [`LayerImportance`]: Its `spread` is the standard error of each mean, if there are at least 8 rankings. Its
                metadata are those that all rankings share; `mean_of` lists the others of each ranking.

        Raises:
            ValueError: There are fewer than two rankings, or their units, modules or model types differ.
        """
        rankings = list(rankings)
        if len(rankings) < 2:
            raise ValueError(f"A mean needs at least two rankings, got {len(rankings)}.")
        types = {name for ranking in rankings if (name := ranking.metadata.get("model_type"))}
        if len(types) > 1:
            raise ValueError(f"A mean needs rankings of one model type, got {sorted(types)}.")
        first, *others = rankings
        for other in others:
            first._check_same_units(other)
            if any(set(other.modules[unit]) != set(first.modules[unit]) for unit in first.units) or (
                other.parameters != first.parameters
            ):
                raise ValueError("A mean needs rankings that adapt the same modules, but these adapt different ones.")
        scores = [dict(zip(ranking.units, standardised(ranking.scores))) for ranking in rankings]
        means, spread = zip(*(mean_and_error([own[unit] for own in scores]) for unit in first.units))
        shared = {
            key: value
            for key, value in first.metadata.items()
            if key != "mean_of" and all(key in o.metadata and o.metadata[key] == value for o in others)
        }
        own = [{k: v for k, v in ranking.metadata.items() if k not in shared} for ranking in rankings]
        return cls(
            units=first.units,
            scores=list(means),
            metadata={**shared, "mean_of": own},
            modules=first.modules,
            lookalikes=sorted({name for ranking in rankings for name in ranking.lookalikes}),
            spread=list(spread) if len(rankings) >= SURE else [],
            parameters=first.parameters,
        )

    def _check_same_units(self, other: "LayerImportance") -> None:
        if difference := sorted(set(self.units) ^ set(other.units)):
            raise ValueError(
                f"Only rankings of the same units can be compared; {len(difference)} units are in only one of them, "
                f"such as {difference[0]!r}."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ranking as JSON, one unit per line, in the order of the model."""
        rows = []
        for i, unit in enumerate(self.units):
            row: dict[str, Any] = {"unit": unit, "score": self.scores[i], "modules": self.modules[unit]}
            if self.spread:
                row["spread"] = self.spread[i]
            if own := {name: self.parameters[name] for name in row["modules"] if name in self.parameters}:
                row["parameters"] = own
            rows.append("  " + json.dumps(row, ensure_ascii=False))
        head = {"format": _FORMAT, "version": _VERSION, "metadata": self.metadata, "lookalikes": self.lookalikes}
        lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}," for key, value in head.items()]
        text = "\n".join(["{", *lines, ' "units": [', ",\n".join(rows), " ]", "}", ""])
        with whole_file(path) as temporary:
            # a lone surrogate, as in a path that is not UTF-8, becomes a JSON escape
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LayerImportance":
        """
        Read a ranking that [`save`] wrote.

        Args:
            path (`str`): A file, or the name of a published ranking, see docs/howto/published.md.

        Raises:
            FileNotFoundError: There is no such file or published ranking.
            ValueError: The file is not a ranking, or a newer version wrote it.
        """
        path = find(path)
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"This is not a ranking: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f'{path} is not a ranking: it lacks `"format": "{_FORMAT}"`.')
        version = content.get("version")
        if type(version) is not int or version != _VERSION:
            raise ValueError(
                f"{path} has version {repr(version)[:40]} of the file format, but this peft-ila reads version "
                f"{_VERSION}; upgrade peft-ila."
            )
        try:
            rows = content["units"]
            return cls(
                units=[row["unit"] for row in rows],
                scores=[row["score"] for row in rows],
                metadata=content["metadata"],
                modules={row["unit"]: row["modules"] for row in rows},
                lookalikes=content["lookalikes"],
                spread=[row["spread"] for row in rows] if any("spread" in row for row in rows) else [],
                parameters={name: multiple for row in rows for name, multiple in row.get("parameters", {}).items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a valid ranking: {type(error).__name__}: {error}") from error

    def plot(
        self, path: str | os.PathLike[str] | None = None, top_p: float | None = None, **selection: "Unpack[Selection]"
    ) -> "Figure":
        """
        Draw the gates as a heatmap: decoder layers along x, the names of linear modules along y. Many layers continue
        in bands below. Units outside every stack of layers, such as `lm_head`, get a last column. If the ranking has a
        `spread`, dots mark the uncertain units of the selected share or number, by default the top 30 %, see
        [`coin_tosses`].

        Args:
            path (`str`, *optional*): The picture to write; its suffix sets the format.
            top_p (`float`, *optional*): The share of units to outline; by default, none.
            **selection: Further arguments of [`select`].

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: The selection is invalid, or the path's suffix names no format.
        """
        from .plotting import heatmap, title_of

        every: dict[str, Any] = {"top_p": top_p, **selection}
        given = {name: value for name, value in every.items() if value is not None}
        selected = set(self.select(**given)) if given else set()
        share = {name: value for name, value in (given or {"top_p": 0.3}).items() if name in ("top_p", "top_k")}
        unsure = set(self.coin_tosses(**share)) if self.spread and share else set()
        facts = self.metadata.get("learn_gates")
        by_descent = isinstance(facts, dict) and facts.get("method") == "descent"
        label = "gate γ = σ(s)" if by_descent else "importance σ(s)"
        title = title_of("importance of the layers", self.metadata.get("model"))
        return heatmap(dict(zip(self.units, self.gates)), label, title, path, unsure, selected)

    def save_card(self, directory: str | os.PathLike[str]) -> None:
        """
        Add the ranking to an adapter's directory: a section of its model card, `importance.json`, and
        `importance.png` if matplotlib is installed.

        Call it after `model.save_pretrained(directory)`, which writes the card. It replaces the section of an earlier
        ranking.
        """
        from .card import write_card

        self.save(Path(directory) / "importance.json")
        picture = Path(directory) / "importance.png"
        try:
            self.plot(picture)
        except ImportError as error:
            picture.unlink(missing_ok=True)  # of an earlier ranking
            logger.warning(f"{picture.name} is not written. {error}")
        gates = dict(zip(self.units, self.gates))
        write_card(directory, [(unit, gates[unit]) for unit in self.ranking()])

    def push_model_to_hub(self, model: "PeftModel", repo_id: str, **kwargs: Any) -> "CommitInfo":
        """
        Upload the model's adapters with a card that shows the ranking, see [`save_card`].

        Args:
            model ([`~peft.PeftModel`]): The model with the adapters.
            repo_id (`str`): The repository, which is created if missing.
            **kwargs: `token`, `private`, and further arguments of [`~huggingface_hub.HfApi.upload_folder`].
        """
        from .card import upload

        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            self.save_card(directory)
            return upload(directory, repo_id, **kwargs)

    def to_lora_config(
        self,
        top_p: float | None = None,
        *,
        model: "nn.Module | PretrainedConfig | None" = None,
        config_cls: "type[PeftConfig] | None" = None,
        **kwargs: Any,
    ) -> Any:
        """
        A plain [`~peft.LoraConfig`] whose targets are exactly the modules of the selected units.

        Decoder layers become `layers_to_transform` (with `layers_pattern` where PEFT needs it to find the index),
        modules become `target_modules`, parameters become `target_parameters`. If these would hit anything else, such
        as the other stack of an encoder-decoder model, the modules are named one by one. Names count as PEFT injects
        them: in some models, it reads names of linear modules as fused experts.

        Args:
            top_p (`float`, *optional*): The share of units to select.
            model (`torch.nn.Module` or `PretrainedConfig`, *optional*):
                The base model or its configuration, which is not changed. If given, the result is injected into it on
                the meta device, and returned only if PEFT hits exactly the selected modules.
            config_cls (`type`, *optional*):
                Another configuration class of PEFT that can target single layers, such as [`~peft.AdaLoraConfig`],
                [`~peft.LoKrConfig`] or [`~peft.OFTConfig`].
            **kwargs: Further arguments of [`select`], and options of the configuration, such as `r` and `lora_alpha`.

        Raises:
            TypeError: `config_cls` cannot target single layers.
            ValueError: The selection is invalid, it decides a passed option, or the model lacks its modules.
        """
        from ..export.lora import LoraConfig, to_lora_config

        selected = self._selected(top_p, kwargs)
        kwargs.setdefault("task_type", self.metadata.get("task_type"))
        kwargs.setdefault("base_model_name_or_path", self.metadata.get("model"))
        return to_lora_config(self._targets(), selected, model, config_cls or LoraConfig, **kwargs)

    def _selected(self, top_p: float | None, options: dict[str, Any]) -> list[str]:
        """Select by `top_p` and the options that [`select`] takes, which are removed."""
        return self.select(top_p, **{name: options.pop(name) for name in Selection.__optional_keys__ & options.keys()})

    def _targets(self) -> "Targets":
        from ..export.lora import Targets

        return Targets(self.modules, self.lookalikes, self.parameters, self.metadata.get("model_type"))

    def to_recipe(
        self,
        program: RecipeFormat,
        top_p: float | None = None,
        *,
        model: "nn.Module | PretrainedConfig | None" = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """
        The settings that make another training program tune the selected units.

        Args:
            program (`str`):
                `"axolotl"` (LoRA), `"axolotl-full"` (full fine-tuning: `unfrozen_parameters`), `"llamafactory"`
                (LoRA) or `"trl"` (LoRA, the flags of its scripts).
            top_p (`float`, *optional*): The share of units to select.
            model (`torch.nn.Module` or `PretrainedConfig`, *optional*):
                The base model or its configuration, see [`to_lora_config`]; `"axolotl-full"` needs it.
            **kwargs: Further arguments of [`select`], and LoRA's `r`, `lora_alpha` and `lora_dropout`.

        Raises:
            ValueError: The selection is invalid, `"axolotl-full"` has no model, or the program cannot name the
                targets.
        """
        from ..export.recipes import recipe

        selected = self._selected(top_p, kwargs)
        return recipe(self._targets(), selected, program, model, **kwargs)

    def freeze_unselected(
        self, model: "nn.Module", top_p: float | None = None, *, outside: bool = True, **selection: "Unpack[Selection]"
    ) -> list[str]:
        """
        Freeze all but the selected units, for full fine-tuning, as `peft-ila tune --full` does.

        Args:
            model (`torch.nn.Module`): The plain model that was ranked, without adapters.
            top_p (`float`, *optional*): The share of units to select.
            outside (`bool`): Whether to freeze parameters outside all units too, such as embeddings, norms and the
                head. With `False`, they stay as they are.
            **selection: Further arguments of [`select`].

        Returns:
            `list[str]`: The names of the frozen parameters.

        Raises:
            ValueError: The selection is invalid, or the model lacks a unit.
        """
        from ..export.freezing import check_units, freeze

        selected = set(self.select(top_p, **selection))
        check_units(model, self.units)
        if outside:
            return freeze(model, selected, all_but=True)
        return freeze(model, [unit for unit in self.units if unit not in selected])


def _reaching(units: list[str], values: dict[str, float], option: str, least: float) -> list[str]:
    if not 0 <= least <= 1:
        raise ValueError(f"`{option}` must be in [0, 1], got {least}.")
    reaching = [unit for unit in units if values[unit] >= least]
    if not reaching:
        raise ValueError(f"No unit reaches `{option}={least}`; the greatest is {max(values[u] for u in units):.3f}.")
    return reaching
