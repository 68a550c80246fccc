"""What of a trained adapter to keep: its directions by what they are worth, how many of them, and their gates."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from tqdm.auto import tqdm

from ..choices import PruneGranularity
from ..tuner.model import ILAModel
from ..units import unit_of
from .directions import Directions
from .measurement import Measurement, Step

# of the parameters; each costs one evaluation
SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
UNCHECKED_SHARE = 0.25


@dataclass
class Kept:
    """What a share of an adapter's parameters keeps: the held-out loss, and its part of the whole adapter's gain."""

    share: float
    loss: float
    gain: float


@dataclass
class Found:
    """What [`Search`] has found, with held-out losses if there are held-out data."""

    directions: Directions
    worth: torch.Tensor  # attributions, of shape (directions,)
    gates: torch.Tensor  # of shape (directions,), 0 where a direction is not kept
    held_out: "HeldOut | None"
    result: Kept | None


class Search:
    """The choice of what is kept of the trainer's active adapter, which is pruned in place."""

    def __init__(self, trainer: Any, ila: ILAModel, measurement: Measurement, granularity: PruneGranularity) -> None:
        self._measurement = measurement
        self._has_held_out = trainer.eval_dataset is not None
        self._hides_bar = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
        self._directions = Directions(ila)
        modules = self._directions.modules
        units = range(len(modules)) if granularity == "component" else [unit_of(name, granularity) for name in modules]
        number = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
        self._units = torch.tensor([number[unit] for unit in units])
        self._sizes = self._by_unit(self._directions.sizes)

    def run(
        self,
        top_p: float | None,
        min_kept: float | None,
        steps: int,
        rounds: int,
        gate_steps: int,
        gate_learning_rate: float,
    ) -> Found:
        """See [`prune`]."""
        directions = self._directions
        total = steps * (rounds if (top_p or 0) < 1 else 1) + gate_steps
        bar = tqdm(self._measurement.steps(), "Pruning", total, disable=self._hides_bar)
        data = iter(bar)  # one pass: each part takes the next steps
        none = torch.zeros(len(self._units))
        worth = directions.attributions(self._measurement, islice(data, steps), none)
        if not worth.sum() > 0:
            raise ValueError(
                f"The adapter does not lower the training loss: its attributions add up to {worth.sum():.4f}. Train "
                "it longer, or prune it on the data that it was trained on."
            )
        order = (self._by_unit(worth) / self._sizes).argsort(descending=True, stable=True)
        held_out = None
        if self._has_held_out:
            shares = sorted({*SHARES, top_p or 1.0})
            held_out = HeldOut(
                self._loss(none), {share: self._loss(self._kept(order, share) >= 0) for share in shares}
            )
        share = top_p or (held_out.smallest(min_kept) if held_out else UNCHECKED_SHARE)
        gates = (self._kept(order, share) >= 0).float()
        result = held_out.point(share) if held_out else None
        kept = self._kept(self._refined(order, share, rounds, data, steps), share)
        refined = (kept >= 0).float()
        candidates = [] if torch.equal(refined, gates) else [refined]  # equal ones are not evaluated twice
        if gate_steps:
            candidates.append(directions.learn_gates(self._measurement, data, kept, gate_steps, gate_learning_rate))
        for candidate in candidates:
            after = held_out.point(share, self._loss(candidate)) if held_out else None
            if result is None or after is None or after.loss <= result.loss:
                gates, result = candidate, after
        directions.set_gates(gates)
        bar.close()
        return Found(directions, worth, gates, held_out, result)

    def _refined(
        self, order: torch.Tensor, share: float, rounds: int, data: Iterator[Step], steps: int
    ) -> torch.Tensor:
        """The units, ordered anew after each of `rounds` equal parts of the share was switched on."""
        for number in range(1, rounds if share < 1 else 1):
            on = self._kept(order, share * number / rounds) >= 0
            worth = self._directions.attributions(self._measurement, islice(data, steps), on.float())
            value = self._by_unit(worth) / self._sizes
            value[self._units[on]] = torch.inf
            order = value.argsort(descending=True, stable=True)
        return order

    def _by_unit(self, values: torch.Tensor) -> torch.Tensor:
        return torch.bincount(self._units, values.double())

    def _kept(self, order: torch.Tensor, share: float) -> torch.Tensor:
        """The unit of each direction, or −1 where it is not kept. At least one unit is."""
        fits = self._sizes[order].cumsum(0) <= share * self._sizes.sum()
        fits[0] = True
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[fits]] = True
        return self._units.where(chosen[self._units], torch.tensor(-1))

    def _loss(self, gates: torch.Tensor) -> torch.Tensor:
        self._directions.set_gates(gates.float())
        return self._measurement.evaluate()


class HeldOut:
    """The held-out losses of an adapter, batch by batch."""

    def __init__(self, base: torch.Tensor, losses: dict[float, torch.Tensor]) -> None:
        """
        Args:
            base: Without the adapter: a loss and a number of examples for each batch, of shape (batches, 2).
            losses: The same for each share of the parameters that is kept, the smallest first.
        """
        self._usable = base[:, 0].isfinite()  # a mean over no labels is NaN
        if not self._usable.any():
            raise ValueError("No batch of the held-out data gives a finite loss. Check that they have labels.")
        base = base[self._usable]
        self._weight = base[:, 1].double() / base[:, 1].double().sum()
        self._losses = {share: own[self._usable] for share, own in losses.items()}
        self.base, self._whole = self._mean(base), self._mean(self._losses[1.0])
        if not self._whole < self.base:
            raise ValueError(
                f"The adapter does not lower the held-out loss ({self.base:.4f} without it, {self._whole:.4f} with "
                "it). Prune it on held-out data of the kind that it was trained on, or leave them out."
            )

    def _mean(self, losses: torch.Tensor) -> float:
        return float(self._weight @ losses[:, 0].double())

    def point(self, share: float, losses: torch.Tensor | None = None) -> Kept:
        """What this share keeps."""
        loss = self._mean(self._losses[share] if losses is None else losses[self._usable])
        return Kept(share, loss, (self.base - loss) / (self.base - self._whole))

    def curve(self) -> list[Kept]:
        """What each share keeps, the smallest first."""
        return [self.point(share) for share in self._losses]

    def smallest(self, min_kept: float | None) -> float:
        """
        The smallest share that keeps at least this part of the gain; without it, the smallest whose loss is at most
        one standard error of the paired differences above the best.
        """
        curve = self.curve()
        if min_kept is not None:
            return next(point.share for point in curve if point.gain >= min_kept)
        best = self._losses[min(curve, key=lambda point: point.loss).share]
        return next(share for share, losses in self._losses.items() if self._within_error(losses - best))

    def _within_error(self, worse: torch.Tensor) -> bool:
        """Whether the mean of differences is at most one standard error, as that of the best from itself is."""
        values = worse[:, 0].double()
        mean, number = self._weight @ values, max(2, len(values))
        error = ((self._weight * (values - mean)).square().sum() * number / (number - 1)).sqrt()
        return bool(mean <= error)
