"""The paper's claims and the study's findings: one table for all models."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.study.figures import LORA, Estimate, Figures, estimate
from peft_ila.ranking.comparison import mean_and_error

CHANCE = 0.6  # the overlap of two random choices of 75 %


@dataclass
class Claim:
    """
    A claim that a figure is above a number.

    Args:
        text: What is claimed.
        paper: The paper's figure, or its word for it.
        figure: Ours. None where it was not run.
        target: The number.
        floor: What the figure would be by chance, if it may lie between chance and the target.
    """

    text: str
    paper: str
    figure: Callable[[Figures], Estimate | None]
    target: float
    floor: float | None = None

    def verdict(self, found: Estimate) -> str:
        """Whether it holds, by two standard errors of at least three runs."""
        if found.error is None or found.runs < 3:
            return "too few runs"
        error = 2 * found.error
        if found.mean - error > self.target:
            return "holds"
        if found.mean + error >= self.target:
            return "no difference measured"
        return "partly" if self.floor is not None and found.mean - error > self.floor else "does not hold"


def _gained(group: str) -> Callable[[Figures], Estimate | None]:
    return lambda figures: estimate(lambda run: figures.gained(group, "full search", run))


def _less(group: str, other: tuple[str, str], arm: str = "full search") -> Callable[[Figures], Estimate | None]:
    return lambda figures: figures.less(group, arm, other)


def _overlap(label: str, search: str = "full search") -> Callable[[Figures], Estimate | None]:
    """Over pairs of rankings."""

    def found(figures: Figures) -> Estimate | None:
        (own, *_) = figures.overlaps(False, search).get(label, ([],))
        return Estimate(*mean_and_error(own), len(own)) if own else None

    return found


ALIGNMENT, REASONING = "two sets: alignment", "two sets: reasoning"
KAPPA, DESCENT = ("modules 30", "KappaTune"), ("modules 30", "descent")
CLAIMS = (
    Claim("30 % of the decoder layers come close to all, as shares of its gain", "0.98", _gained("layers 30"), 0.98),
    Claim("30 % of the parameters, by modules", "10 to 30 % are enough", _gained("modules 30"), 0.98),
    Claim("20 % of the parameters, by modules", "10 to 30 % are enough", _gained("modules 20"), 0.98),
    Claim("10 % of the parameters, by modules", "10 to 30 % are enough", _gained("modules 10"), 0.98),
    Claim("30 % at a higher rank, with as many parameters as all: more than all", "", _gained("raised 30"), 1.0),
    Claim("30 %: chosen layers minus random ones", "better", _less("layers 30", ("layers 30", "random")), 0.0),
    Claim("30 %: chosen modules minus random ones", "better", _less("modules 30", ("modules 30", "random")), 0.0),
    Claim("10 %: chosen modules minus random ones", "better", _less("modules 10", ("modules 10", "random")), 0.0),
    Claim("30 %: chosen modules minus KappaTune's, which needs no data", "", _less("modules 30", KAPPA), 0.0),
    Claim("30 %: chosen modules minus those of the paper's descent", "", _less("modules 30", DESCENT), 0.0),
    Claim("the unimportant quarter frozen, minus LoRA on all", "better", _less("modules 75", LORA), 0.0),
    Claim(
        "the unimportant quarter frozen, minus a random one frozen",
        "better",
        _less("modules 75", ("modules 75", "random")),
        0.0,
    ),
    Claim(
        "full fine-tuning, the unimportant quarter frozen, minus all",
        "better",
        _less("weights 75", ("weights 100", "full search")),
        0.0,
    ),
    Claim(
        "full fine-tuning, the unimportant quarter frozen, minus a random one (fewer weights train)",
        "better",
        _less("weights 75", ("weights 75", "random")),
        0.0,
    ),
    Claim("the top 75 % of the modules are the same on two alignment sets", "0.90", _overlap(ALIGNMENT), 0.9, CHANCE),
    Claim("… on two reasoning sets", "0.86", _overlap(REASONING), 0.86, CHANCE),
    Claim(
        "… on two alignment sets, ranked before training",
        "",
        _overlap(ALIGNMENT, "untrained, 8 batches"),
        0.9,
        CHANCE,
    ),
    Claim(
        "a ranking works on other data: 30 % by the mean of other sets, minus the set's own",
        "",
        _less("modules 30", ("modules 30", "full search"), "mean of other sets"),
        0.0,
    ),
)


def rows(models: list[Figures]) -> list[list[str]]:
    """One for each claim: the paper's figure, that of each model with its runs, and the verdicts."""
    table = []
    for claim in CLAIMS:
        found = [claim.figure(figures) for figures in models]
        verdicts = dict.fromkeys(claim.verdict(own) for own in found if own)
        cells = [f"{own} ({own.runs})" if own else "not run" for own in found]
        table.append([claim.text, claim.paper, *cells, "; ".join(verdicts)])
    return table
