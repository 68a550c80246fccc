"""learn_gates: stage 2 in the user's trainer."""

import math
from collections.abc import Sized
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments

from ..choices import Method
from ..ranking.importance import LayerImportance
from ..ranking.validation import is_integer
from ..tuner.model import ILAModel
from .attribution import ROUND, Attribution
from .descent import Descent
from .measurement import FACTORS, SCORES, Measurement, check_engine, measuring

STEPS = {"attribution": 32, "descent": 128, "untrained": 16}


def learn_gates(
    trainer: Trainer,
    steps: int | None = None,
    min_agreement: float | None = 0.8,
    loss_batches: int = 8,
    seed: int | None = None,
    method: Method | None = None,
    initial_score: float | None = None,
    learning_rate: float | None = None,
    budget: float | None = None,
) -> LayerImportance:
    """
    Learn the gates of a fine-tuned ILA model and rank its units (stage 2).

    Only the gates get gradients; the weight deltas are frozen. The gradients come from the trainer's own training
    steps, with the data, loss, precision, gradient accumulation and processes of stage 1. The trainer trains nothing,
    and dropout is off.

    - `method="attribution"` closes all gates and takes the mean of −∂L/∂γ over the steps, the unit's attribution: to
      first order, the loss gain of its delta alone. For n units, the score is n·attribution / Σ attributions − 1, so
      a gate is above ½ for a unit worth more than the mean.
    - `method="untrained"` skips stage 1: B is 0, and (α/r)·‖∂L/∂B‖₁ takes the place of −∂L/∂γ. Up to the learning
      rate, it is the first-order gain of the first training step.
    - `method="descent"` is the paper's: from one value of all scores, Adam minimises the loss of the fine-tuned model
      over the scores alone. At a stable point the loss is flat in every gate, so without a `budget` this ranks little
      better than chance (docs/appendix/rankings.md compares).

    Afterwards A and B are bit-identical and the gates are open: the model computes what it did after stage 1. If
    stage 1 was trained in mode "joint", its gates are first folded into B. An error restores the model and the
    trainer.

    Args:
        trainer (`transformers.Trainer`):
            The trainer of stage 1, such as TRL's `SFTTrainer`. Its model is a `PeftModel` with one active ILA adapter.
        steps (`int`, *optional*):
            The maximum number of steps, at least 4. By default 32 for "attribution" (docs/appendix/steps.md), 16 for
            "untrained", and 128 for "descent" (the paper's number, recalled).
        min_agreement (`float`, *optional*):
            "attribution" and "untrained" stop when the ranking from the first half of the steps agrees with the
            ranking from all steps three times in a row: the overlaps of the top 30 % and 75 % and the Spearman
            correlation are at least this. `None` takes all steps.
        loss_batches (`int`): L(0) and L(1) are measured on this many first steps; they are equal before training.
        seed (`int`, *optional*): The seed for the order of the data, by default the trainer's `seed` and `data_seed`.
        method (`str`, *optional*): By default "untrained" for a fresh adapter, "attribution" for a trained one.
        initial_score (`float`, *optional*): "descent": the start of all scores, by default the adapter's `gate_init`.
        learning_rate (`float`, *optional*): "descent": Adam's rate for the scores, by default 0.1 (assumed).
        budget (`int` or `float`, *optional*):
            "descent": the paper's constraint ‖γ‖₀ ≤ H, as a number or a share of units. A pressure on all gates
            brings their mean to it. Select H units of the ranking by `top_k` or `top_p`.

    Returns:
        [`LayerImportance`]: The ranking. Its metadata holds the settings and both losses. From 8 steps on, it holds
        the standard error of each score over the batches, except for "descent".

    Raises:
        TypeError: The trainer's model is not an ILA model.
        ValueError: A setting is out of range; the adapter is masked, disabled, merged, or not as trained as the method
            needs; the deltas do not lower the loss; a gradient is not finite; the data end too soon; or the trainer
            runs under DeepSpeed, FSDP1, or FSDP2 with an adapter in half precision.
    """
    ila = rankable(trainer)
    units = len(ila.gates())
    check_settings(steps, min_agreement, loss_batches, seed, method, initial_score, learning_rate, budget, units)
    trained = ila.is_trained()
    method = method or ("attribution" if trained else "untrained")
    check_trained(trained, method)
    steps = STEPS[method] if steps is None else steps
    search: Attribution | Descent
    if method == "descent":
        (config,) = (ila.peft_config[name] for name in ila.active_adapters)
        start = config.gate_init if initial_score is None else initial_score
        search = Descent(units, steps, start, 0.1 if learning_rate is None else learning_rate, budget)
    else:
        search = Attribution(units, steps, min_agreement, untrained=method == "untrained")

    hidden = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
    gradients = FACTORS if method == "untrained" else SCORES
    with (
        measuring(trainer, ila, seed, gradients) as measurement,
        tqdm(total=steps, desc="Stage 2", disable=hidden) as bar,
    ):
        closed, opened = _run(search, method, measurement, loss_batches, trainer.args, bar)
        scores, spread, facts = search.result()
        measurement.set_scores(scores)

    importance = ila.layer_importance()
    importance.spread = spread
    importance.metadata["learn_gates"] = {
        "method": method,
        "steps": int(steps),  # NumPy's are no JSON
        "steps_taken": search.taken,
        "seed": trainer.args.seed if seed is None else int(seed),
        "batch_size": trainer.get_total_train_batch_size(trainer.args),
        "loss_closed": closed,
        "loss_open": opened,
        **facts,
    }
    data: Any = trainer.train_dataset
    importance.metadata["data"] = {
        "name": getattr(getattr(data, "info", None), "dataset_name", None),
        "examples": len(data) if isinstance(data, Sized) else None,
    }
    return importance


def _run(
    search: Attribution | Descent,
    method: Method,
    measurement: Measurement,
    loss_batches: int,
    args: TrainingArguments,
    bar: tqdm,
) -> tuple[float, float]:
    """Run the search and measure L(0) and L(1), the means over its first steps, in one pass over the data."""
    losses: list[tuple[float, float]] = []
    for step in measurement.steps():
        wanted = len(losses) < loss_batches
        opened = measurement.loss(step, closed=False) if wanted and method != "untrained" else None
        loss = search.step(measurement, step)
        if wanted:
            closed = measurement.loss(step, closed=True) if method == "descent" else loss
            losses.append((closed, closed if opened is None else opened))
            if len(losses) == loss_batches:
                _means(losses, method)  # fails before more work is done
        bar.update()
        every = args.logging_steps if args.logging_steps >= 1 else math.ceil(args.logging_steps * bar.total)
        if args.logging_strategy == "steps" and search.taken % every == 0 and args.process_index == 0:
            bar.write(str({"step": search.taken, "loss": round(loss, 4)}))  # when the trainer would log
        if search.finished:
            break
    return _means(losses, method)


def _means(losses: list[tuple[float, float]], method: Method) -> tuple[float, float]:
    if not losses:
        raise ValueError("No training batch gives a loss: there are no batches, or none has a label. Check the data.")
    closed, opened = (sum(values) / len(losses) for values in zip(*losses))
    if not closed > opened and method != "untrained":
        raise ValueError(
            f"The adapter does not lower the loss on its own training data ({closed:.4f} without it, {opened:.4f} "
            "with it), so there is nothing to rank. Fine-tune longer, or rank by a loss that falls as the model "
            "improves."
        )
    return closed, opened


def check_settings(
    steps: int | None = None,
    min_agreement: float | None = None,
    loss_batches: int = 1,
    seed: int | None = None,
    method: str | None = None,
    initial_score: float | None = None,
    learning_rate: float | None = None,
    budget: float | None = None,
    units: int | None = None,
) -> None:
    """Check arguments of [`learn_gates`], also before the model and its number of units are known."""
    if method is not None and method not in STEPS:
        raise ValueError(f"`method` must be one of {tuple(STEPS)}, got {method!r}.")
    for name, value, least in (("steps", steps, ROUND), ("loss_batches", loss_batches, 1)):
        if value is not None and (not is_integer(value) or value < least):
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value}.")
    if min_agreement is not None and not 0 < min_agreement <= 1:
        raise ValueError(f"`min_agreement` must be in (0, 1], got {min_agreement}.")
    if seed is not None and (not is_integer(seed) or not 0 <= seed < 2**32):  # what NumPy takes
        raise ValueError(f"`seed` must be a whole number from 0 to 2**32 - 1, got {seed}.")
    settings = {"initial_score": initial_score, "learning_rate": learning_rate, "budget": budget}
    own = sorted(name for name, value in settings.items() if value is not None)
    if own and method != "descent":
        raise ValueError(f'{own} are settings of `method="descent"`: pass it, or leave them out.')
    if initial_score is not None and not math.isfinite(initial_score):
        raise ValueError(f"`initial_score` must be finite, got {initial_score}.")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise ValueError(f"`learning_rate` must be greater than 0, got {learning_rate}.")
    if budget is None or (isinstance(budget, float) and 0 < budget <= 1):
        return
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= (units or budget):
        most = f" to {units}" if units else ""
        raise ValueError(
            f"`budget` must be a whole number of units from 1{most}, or a share of them in (0, 1], got {budget!r}."
        )


def check_trained(trained: bool, method: Method) -> None:
    """Check that the method fits a trained or a fresh adapter."""
    if method == "untrained" and trained:
        raise ValueError(
            '`method="untrained"` needs a fresh adapter with B = 0, but this one has been trained (or '
            '`init_lora_weights` does not start with B = 0). Make a new one, or use `method="attribution"`.'
        )
    if method != "untrained" and not trained:
        raise ValueError(
            "The adapter has not been trained: its B is 0, so there is no delta to measure. Fine-tune first. To rank "
            'units before training, use `learn_gates(method="untrained")`.'
        )


def rankable(trainer: Trainer) -> ILAModel:
    """The trainer's model, if [`learn_gates`] can rank it; for callers with other work to do first."""
    check_engine(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    ila = getattr(model, "base_model", None)
    if not isinstance(ila, ILAModel):
        raise TypeError(
            "`learn_gates` and `prune` need a trainer whose model was made by `get_peft_model(model, "
            f"ILAConfig(...))`, or from a LoRA by `ILAModel.from_lora(model)`; got {type(model).__name__}."
        )
    if len(ila.active_adapters) != 1:
        raise ValueError(f"Exactly one adapter must be active, got {ila.active_adapters}.")
    (name,) = ila.active_adapters
    if ila.peft_config[name].gate_mode == "hard":
        raise ValueError(
            'The adapter is masked (mode "hard"). Call `set_gate_mode("open")` to use all its units, or write the '
            "kept ones by `to_lora` and gate that."
        )
    if model.get_model_status().enabled is not True:
        raise ValueError("The adapter is disabled; call `enable_adapter_layers()` on the model.")
    ila.check_unmerged(name)
    return ila
