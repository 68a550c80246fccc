"""LayerImportance: the scores of all units, and what is done with them."""

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
from .comparison import SURE, is_coin_toss, jaccard, mean_and_error, membership, spearman, standardised, top
from .published import find
from .validation import check_metadata, check_ranking, is_integer

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
    """What [`LayerImportance.select`] takes beside `top_p`."""

    top_k: int | None
    threshold: float | None
    min_probability: float | None
    units: Sequence[str] | None


@dataclass
class LayerImportance:
    """
    The importance of the units of a model for one fine-tuning task.

    Args:
        units (`list[str]`):
            The units in the order of the model: decoder layers such as `"model.layers.3"`, or modules such as
            `"model.layers.3.mlp.up_proj"`.
        scores (`list[float]`): The score of each unit, any finite number; the greater, the more important.
        metadata (`dict`): Where the scores come from, JSON values only.
        modules (`dict[str, list[str]]`, *optional*):
            What is adapted in each unit: target modules, and parameters. By default each unit is a module itself.
        lookalikes (`list[str]`, *optional*):
            Modules of the model that share the last part of their name with a target module but are none, so that
            [`to_lora_config`] can tell them apart without the model.
        spread (`list[float]`, *optional*):
            The standard error of each score, such as [`learn_gates`] finds it from the differences between batches.
        parameters (`dict[str, float]`, *optional*):
            Which of `modules` are no modules but parameters, such as experts that are fused into one, and the rank of
            each in multiples of LoRA's (PEFT takes twice the rank for two fused projections).

    Raises:
        TypeError: A field or an entry is of the wrong kind.
        ValueError: No units, a repeated unit, a name that cannot be a module's, modules outside their unit, scores of
            another number than units, or a score that is not finite.
    """

    units: list[str]
    scores: list[float]
    metadata: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, list[str]] = field(default_factory=dict)
    lookalikes: list[str] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    parameters: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modules and isinstance(self.units, list):
            self.modules = {unit: [unit] for unit in self.units if isinstance(unit, str)}
        check_ranking(
            self.units, self.scores, self.metadata, self.modules, self.lookalikes, self.spread, self.parameters
        )
        self.modules = {unit: self.modules[unit] for unit in self.units}  # in the order of the model

    @property
    def gates(self) -> list[float]:
        """γ = σ(s) of each unit, in the order of `units`."""
        return [1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(score)) for score in self.scores]

    def ranking(self) -> list[str]:
        """All units, the most important first; among equals, in the order of the model."""
        return [self.units[i] for i in top(self.scores, len(self.units))]

    def select(
        self,
        top_p: float | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        min_probability: float | None = None,
        units: Sequence[str] | None = None,
    ) -> list[str]:
        """
        The most important units, most important first. Exactly one of `top_p`, `top_k`, `threshold` and `units` is
        needed.

        Args:
            top_p (`float`, *optional*): The share of the units to select, in (0, 1]; rounded, at least one unit.
            top_k (`int`, *optional*): The number of units to select.
            threshold (`float`, *optional*): The least gate γ of a selected unit, in [0, 1].
            min_probability (`float`, *optional*):
                Of the share or number, only units that belong to it with at least this probability, see
                [`probability`].
            units (`list[str]`, *optional*):
                These units, such as those that fit into a memory budget, see [`~workflows.budget.select_within`].

        Raises:
            ValueError: Not exactly one of the four, one out of range, units of another ranking, no unit that is
                left, or a part of the units where all scores are equal, as before any search.
        """
        if sum(value is not None for value in (top_p, top_k, threshold, units)) != 1:
            listed = None if units is None else f"{len(units)} units"
            raise ValueError(
                f"Pass exactly one of `top_p`, `top_k`, `threshold` and `units`, got {top_p=}, {top_k=}, "
                f"{threshold=}, units={listed}."
            )
        if min_probability is not None and (threshold is not None or units is not None):
            raise ValueError("`min_probability` goes with `top_p` or `top_k`, not with `threshold` or `units`.")
        if units is not None:
            return self._listed(units)
        if threshold is not None:
            if not 0 <= threshold <= 1:
                raise ValueError(f"`threshold` is compared with gates and must be in [0, 1], got {threshold}.")
            gates = dict(zip(self.units, self.gates))
            selected = [unit for unit in self.ranking() if gates[unit] >= threshold]
            if not selected:
                raise ValueError(f"No gate reaches `threshold={threshold}`; the greatest is {max(self.gates):.3f}.")
            return selected
        selected = self.ranking()[: self._number(top_p, top_k)]
        if min_probability is not None:
            if not 0 <= min_probability <= 1:
                raise ValueError(f"`min_probability` must be in [0, 1], got {min_probability}.")
            probability = self.probability(top_p, top_k)
            selected = [unit for unit in selected if probability[unit] >= min_probability]
            if not selected:
                raise ValueError(f"No unit is selected with a probability of at least {min_probability}.")
        if len(selected) < len(self.units) and len(set(self.scores)) == 1:
            raise ValueError(
                f"All {len(self.units)} units have the same score, {self.scores[0]}, so the ranking cannot tell "
                f"{len(selected)} of them from the rest. Rank them first, such as by `learn_gates(trainer)`, select "
                "all by `top_p=1.0`, or name some by `units`."
            )
        return selected

    def _listed(self, units: Sequence[str]) -> list[str]:
        if not units or isinstance(units, str):
            raise ValueError(f"`units` must be a list of at least one unit, got {units!r}.")
        if unknown := sorted(set(units) - set(self.units)):
            raise ValueError(f"The ranking has no unit {unknown[0]!r} ({len(unknown)} of {len(units)} are unknown).")
        chosen = set(units)
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
        The probability of each unit to belong to the selection that ever more batches would settle on.

        From 1,000 draws of all scores, each from a normal distribution with the score as mean and its `spread` as
        standard deviation. The noise of fine-tuning (another seed, other data) is in it only if the ranking is a mean
        of such. Scores that are measured once more have noise of their own: their selection differs more often.

        Args:
            top_p, top_k: The share or the number of units to select, see [`select`].

        Raises:
            ValueError: The ranking has no `spread`, or a bad selection.
        """
        if not self.spread:
            raise ValueError("This ranking does not say how sure its scores are: it has no `spread`.")
        return dict(zip(self.units, membership(self.scores, self.spread, self._number(top_p, top_k))))

    def coin_tosses(self, top_p: float | None = None, top_k: int | None = None) -> list[str]:
        """
        The units whose membership in the selection is open: selected with a probability between ¼ and ¾.

        Args:
            top_p, top_k: The share or the number of units to select, see [`select`].

        Raises:
            ValueError: The ranking has no `spread`, or a bad selection.
        """
        probability = self.probability(top_p, top_k)
        return [unit for unit in self.ranking() if is_coin_toss(probability[unit])]

    def overlap(self, other: "LayerImportance", top_p: float = 0.75) -> float:
        """
        The Jaccard index |A ∩ B| / |A ∪ B| of the units that both rankings select.

        Args:
            other (`LayerImportance`): A ranking of the same units.
            top_p (`float`): The share of the units to select. Two random rankings overlap 0.60 at 0.75.

        Raises:
            ValueError: The rankings are of different units.
        """
        self._check_same_units(other)
        return jaccard(self.select(top_p=top_p), other.select(top_p=top_p))

    def spearman(self, other: "LayerImportance") -> float:
        """
        Spearman's rank correlation of the scores, ties ranked by their mean; NaN if either has only one value.

        Args:
            other (`LayerImportance`): A ranking of the same units.

        Raises:
            ValueError: The rankings are of different units.
        """
        self._check_same_units(other)
        theirs = dict(zip(other.units, other.scores))
        return spearman(self.scores, [theirs[unit] for unit in self.units])

    @classmethod
    def mean(cls, rankings: "Iterable[LayerImportance]") -> "LayerImportance":
        """
        One ranking of several, such as of one model on different data: the means of their standardised scores.

        Args:
            rankings (`list[LayerImportance]`):
                At least two rankings of one type of model, of the same units with the same modules.

        Returns:
            [`LayerImportance`]: Its `spread` is the standard error of each mean, none of fewer than 8 rankings. Its
                metadata are those that all rankings share, and in `mean_of` what each has of its own.

        Raises:
            ValueError: Fewer than two rankings, or rankings of different units, modules or types of models.
        """
        rankings = list(rankings)
        if len(rankings) < 2:
            raise ValueError(f"A mean needs at least two rankings, got {len(rankings)}.")
        types = {name for ranking in rankings if (name := ranking.metadata.get("model_type"))}
        if len(types) > 1:
            raise ValueError(f"A mean is of rankings of one model, but these are of the types {sorted(types)}.")
        first, *others = rankings
        for other in others:
            first._check_same_units(other)
            if any(set(other.modules[unit]) != set(first.modules[unit]) for unit in first.units) or (
                other.parameters != first.parameters
            ):
                raise ValueError("A mean is of rankings that adapt the same modules, but these adapt different ones.")
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
                f"Only rankings of the same units can be compared; {len(difference)} units are in one of them alone, "
                f"such as {difference[0]!r}."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ranking as JSON, one unit a line, in the order of the model."""
        rows: list[dict[str, Any]] = [
            {"unit": unit, "score": score, "modules": self.modules[unit]}
            for unit, score in zip(self.units, self.scores)
        ]
        for row, spread in zip(rows, self.spread):
            row["spread"] = spread
        for row in rows:
            if own := {name: self.parameters[name] for name in row["modules"] if name in self.parameters}:
                row["parameters"] = own
        head = {"format": _FORMAT, "version": _VERSION, "metadata": self.metadata, "lookalikes": self.lookalikes}
        lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}," for key, value in head.items()]
        units = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
        text = "{\n" + "\n".join(lines) + '\n "units": [\n' + units + "\n ]\n}\n"
        with whole_file(path) as temporary:
            # half a character, as in a path that is not UTF-8, is written as JSON's escape for it
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LayerImportance":
        """
        Read a ranking that [`save`] wrote.

        Args:
            path (`str`): A file, or the name of a ranking that comes with the package, see docs/howto/published.md.

        Raises:
            FileNotFoundError: There is no such file and no such name.
            ValueError: The file is not a ranking, or was written by a newer version.
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
            check_metadata(content["metadata"])
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
        self,
        path: str | os.PathLike[str] | None = None,
        top_p: float | None = None,
        **selection: "Unpack[Selection]",
    ) -> "Figure":
        """
        Draw the gates as a heatmap: decoder layers along x, for modules the linear names along y; many layers go on
        in bands below. Units outside every stack of layers, such as `lm_head`, get a last column. Where the ranking
        says how sure it is, a dot marks the units that are among the selected share or number, by default the top
        30 %, or not by a coin toss, see [`coin_tosses`].

        Args:
            path (`str`, *optional*): The picture to write; matplotlib tells the format from its suffix.
            top_p (`float`, *optional*): The share of the units to outline; by default none is outlined.
            **selection: Further arguments of [`select`].

        Raises:
            ImportError: matplotlib is missing.
            ValueError: A bad selection, or a path without a suffix that names a format.
        """
        from .plotting import heatmap

        every: dict[str, Any] = {"top_p": top_p, **selection}
        given = {name: value for name, value in every.items() if value is not None}
        selected = self.select(**given) if given else []
        share = {name: value for name, value in (given or {"top_p": 0.3}).items() if name in ("top_p", "top_k")}
        unsure = self.coin_tosses(**share) if self.spread and share else []
        facts = self.metadata.get("learn_gates")
        by_descent = isinstance(facts, dict) and facts.get("method") == "descent"
        label = "gate γ = σ(s)" if by_descent else "importance σ(s)"
        return heatmap(dict(zip(self.units, self.gates)), label, unsure, selected, self.metadata.get("model"), path)

    def save_card(self, directory: str | os.PathLike[str]) -> None:
        """
        Add the ranking to an adapter's directory: a section of its model card, `importance.png`, `importance.json`.
        Without matplotlib, there is no picture.

        Call it after `model.save_pretrained(directory)`, which writes the card that the section goes into. The
        section of an earlier ranking is replaced.
        """
        from .card import write_card

        self.save(Path(directory) / "importance.json")
        picture = Path(directory) / "importance.png"
        try:
            self.plot(picture)
        except ImportError as error:
            picture.unlink(missing_ok=True)  # of an earlier ranking
            logger.warning(f"{picture.name} is left out. {error}")
        gates = dict(zip(self.units, self.gates))
        write_card(directory, [(unit, gates[unit]) for unit in self.ranking()])

    def push_model_to_hub(self, model: "PeftModel", repo_id: str, **kwargs: Any) -> "CommitInfo":
        """
        Upload the model's adapters with a card that holds the ranking, see [`save_card`].

        Args:
            model ([`~peft.PeftModel`]): The model whose adapters are uploaded.
            repo_id (`str`): The repository, which is created if it does not exist.
            **kwargs: `token` and `private`, further arguments of [`~huggingface_hub.HfApi.upload_folder`].
        """
        from .card import upload

        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            self.save_card(directory)
            return upload(directory, repo_id, **kwargs)

    push_to_hub = push_model_to_hub  # its name before, which was documented

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
        modules become `target_modules`, parameters `target_parameters`. Where that would hit anything else, such as
        the other stack of an encoder-decoder model, the modules are named one by one. What counts is what PEFT makes
        of the names when it injects them: in some models it takes those of linear modules for fused experts.

        Args:
            top_p (`float`, *optional*): The share of the units to select.
            model (`torch.nn.Module` or `PretrainedConfig`, *optional*):
                The base model or its configuration: the result is then injected into it on the meta device, and
                returned only if PEFT hits exactly the selected modules. It is not changed.
            config_cls (`type`, *optional*):
                Another configuration class of PEFT that can target single layers, such as [`~peft.AdaLoraConfig`],
                [`~peft.LoKrConfig`] or [`~peft.OFTConfig`].
            **kwargs: Further arguments of [`select`], and options of the configuration, such as `r` and `lora_alpha`.

        Raises:
            TypeError: `config_cls` cannot target single layers.
            ValueError: A bad selection, an option that the selection decides, or a model without these modules.
        """
        from ..export.lora import LoraConfig, to_lora_config

        selected = self._selected(top_p, kwargs)
        kwargs.setdefault("task_type", self.metadata.get("task_type"))
        kwargs.setdefault("base_model_name_or_path", self.metadata.get("model"))
        return to_lora_config(self._targets(), selected, model, config_cls or LoraConfig, **kwargs)

    def _selected(self, top_p: float | None, options: dict[str, Any]) -> list[str]:
        """What is selected by `top_p` and by those of the options that [`select`] takes, which are removed."""
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
        The part of another training program's settings that makes it tune the selected units.

        Args:
            program (`str`):
                `"axolotl"` (LoRA), `"axolotl-full"` (full fine-tuning: `unfrozen_parameters`), `"llamafactory"`
                (LoRA) or `"trl"` (LoRA, the flags of its scripts).
            top_p (`float`, *optional*): The share of the units to select.
            model (`torch.nn.Module` or `PretrainedConfig`, *optional*):
                The base model or its configuration, see [`to_lora_config`]; `"axolotl-full"` needs it.
            **kwargs: Further arguments of [`select`], and LoRA's `r`, `lora_alpha` and `lora_dropout`.

        Raises:
            ValueError: A bad selection, `"axolotl-full"` without a model, or targets that the program cannot name.
        """
        from ..export.recipes import recipe

        selected = self._selected(top_p, kwargs)
        return recipe(self._targets(), selected, program, model, **kwargs)

    def freeze_unselected(
        self,
        model: "nn.Module",
        top_p: float | None = None,
        *,
        outside: bool = True,
        **selection: "Unpack[Selection]",
    ) -> list[str]:
        """
        Freeze all but the selected units, for full fine-tuning, as `peft-ila tune --full` does.

        Args:
            model (`torch.nn.Module`): The plain model that was ranked, without adapters.
            top_p (`float`, *optional*): The share of the units to select.
            outside (`bool`): Whether to freeze what belongs to no unit too, such as embeddings, norms and the head.
                With `False`, these train along if they did before.
            **selection: Further arguments of [`select`].

        Returns:
            `list[str]`: The names of the frozen parameters.

        Raises:
            ValueError: A bad selection, or a model that lacks a unit.
        """
        from ..export.freezing import check_units, freeze

        selected = set(self.select(top_p, **selection))
        check_units(model, self.units)
        if outside:
            return freeze(model, selected, all_but=True)
        return freeze(model, [unit for unit in self.units if unit not in selected])
