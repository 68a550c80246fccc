"""SmolLM2-135M, fine-tuned on a data set, and its loss for any gates of its modules."""

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from peft_ila import ILAConfig
from peft_ila.embedded import smollm2
from peft_ila.tuner.layer import Gate
from peft_ila.units import unit_of
from peft_ila.workflows.data import load_dataset

HELD_OUT = 64
MAX_LENGTH, PROMPT = 96, 56  # tokens; examples with longer prompts are left out
LORA = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
LEARNING_RATE = 5e-4
GATED = ILAConfig(**LORA, target_modules="all-linear", granularity="module", gate_mode="open")


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


def fine_tune(
    data: str,
    seed: int,
    steps: int,
    adapter: Path,
    config: PeftConfig = GATED,
    learning_rate: float = LEARNING_RATE,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTTrainer:
    """Train LoRA on all examples but the last ones, or take what such a run has saved as `adapter`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    # The loss is on the answers only: the tokens of the chat format are learned by any few layers, and with them even
    # random masks keep nine tenths of the gain.
    dataset = (
        load_dataset(data)
        .map(lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]})
        .select_columns(["prompt", "completion"])
        .filter(lambda row: len(tokenizer.apply_chat_template(row["prompt"], return_dict=True)["input_ids"]) <= PROMPT)
        .shuffle(seed=0)
    )
    model = base_model()
    trained = (adapter / SAFETENSORS_WEIGHTS_NAME).exists()  # the directory alone is made by any trainer
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(model, adapter) if trained else get_peft_model(model, config),
        args=SFTConfig(
            output_dir=str(adapter),
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            max_length=MAX_LENGTH,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            disable_tqdm=True,
        ),
        train_dataset=dataset.select(range(len(dataset) - HELD_OUT)),
        eval_dataset=dataset.select(range(len(dataset) - HELD_OUT, len(dataset))),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    if not trained:
        trainer.train()
        trainer.model.save_pretrained(adapter)
    return trainer


@torch.no_grad()
def held_out_loss(trainer: SFTTrainer) -> float:
    """The mean over the tokens of the held-out answers."""
    model = trainer.model.eval()
    total, tokens = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        counted = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch, use_cache=False).loss) * counted
        tokens += counted
    return total / tokens


class FreeGate(Gate):
    """A gate whose γ is any number, also exactly 0 or 1, with a gradient."""

    gamma: torch.Tensor

    is_open = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma.to(x)


class Problem:
    """A fine-tuned adapter: its loss and ∂L/∂γ on one of its batches for any γ, a vector with one entry a module."""

    def __init__(
        self, data: str, seed: int, steps: int, adapter: Path, batches: int, learning_rate: float = LEARNING_RATE
    ) -> None:
        self.trainer = fine_tune(data, seed, steps, adapter, learning_rate=learning_rate)
        self.model = self.trainer.model
        self.model.set_gate_mode("soft")
        self.model.eval()
        self.gates = self.model.gates()
        self.units = list(self.gates)
        self.layers = [unit_of(unit, "layer") for unit in self.units]
        for gate in self.gates.values():
            gate.__class__ = FreeGate
            gate.weight.requires_grad_(False)
        torch.manual_seed(1000 + seed)
        self.batches = list(itertools.islice(self.trainer.get_train_dataloader(), batches))
        self.cost = 0  # the number of gradients asked for

    def set_gates(self, gamma: torch.Tensor) -> None:
        for gate, value in zip(self.gates.values(), gamma.unbind()):
            gate.gamma = value

    def loss(self, gamma: torch.Tensor, batch: Any) -> torch.Tensor:
        self.set_gates(gamma)
        return self.model(**batch, use_cache=False).loss

    def loss_per_example(self, gamma: torch.Tensor, batch: Any) -> torch.Tensor:
        """The loss if each example counts alike, not each token."""
        self.set_gates(gamma)
        labels = batch["labels"][:, 1:]
        logits = self.model(**batch, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where the label is ignored
        return (losses.sum(1) / (labels != -100).sum(1)).mean()

    def gradient(
        self, gamma: torch.Tensor, batch: Any, loss: Callable[..., torch.Tensor] | None = None
    ) -> torch.Tensor:
        self.cost += 1
        gamma = gamma.detach().clone().requires_grad_()
        return torch.autograd.grad((loss or self.loss)(gamma, batch), gamma)[0]

    def samples(self, batches: int) -> torch.Tensor:
        """What `learn_gates` measures: −∂L/∂γ of each batch, all gates closed."""
        closed = torch.zeros(len(self.units))
        return torch.stack([-self.gradient(closed, batch) for batch in self.batches[:batches]])

    def held_out_loss(self, gamma: torch.Tensor) -> float:
        self.set_gates(gamma)
        return held_out_loss(self.trainer)

    @functools.cached_property
    def loss_closed(self) -> float:
        return self.held_out_loss(torch.zeros(len(self.units)))

    @functools.cached_property
    def loss_open(self) -> float:
        return self.held_out_loss(torch.ones(len(self.units)))

    @functools.cached_property
    def worth(self) -> float:
        """L(0) − L(1) on training batches."""
        with torch.no_grad():
            ones = torch.ones(len(self.units))
            return statistics.mean(
                float(self.loss(ones * 0, batch) - self.loss(ones, batch)) for batch in self.batches[:4]
            )

    def kept(self, scores: torch.Tensor, share: float) -> float:
        gamma = torch.zeros(len(self.units))
        gamma[top(scores, share)] = 1
        return (self.loss_closed - self.held_out_loss(gamma)) / (self.loss_closed - self.loss_open)

    def of_layers(self, scores: torch.Tensor) -> torch.Tensor:
        """Each module's score replaced by the sum over its decoder layer."""
        sums = {
            layer: sum(score for score, own in zip(scores.tolist(), self.layers) if own == layer)
            for layer in set(self.layers)
        }
        return torch.tensor([sums[layer] for layer in self.layers])


def top(scores: torch.Tensor, share: float) -> torch.Tensor:
    return scores.topk(max(1, round(share * len(scores)))).indices
