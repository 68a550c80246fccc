"""
Which estimator of importance finds the modules that matter? The tables of `docs/results.md`.

For each data set and seed: fine-tune SmolLM2-135M with LoRA (kept for the next call), then rank its 210 modules by
several estimators. All see the same training batches and may set the gates γ to any values; their cost is the number
of batches whose gradient ∂L/∂γ they ask for. "Kept" is (L(0) − L(mask)) / (L(0) − L(1)) on held-out examples, with the
deltas of all modules but the top ones switched off and nothing retrained. For "layers", whole decoder layers are
ranked by the sum of their modules' scores.

    python benchmarks/estimators.py --data ../shared/data/sft_alpaca_gpt4.jsonl ../shared/data/sft_lima.jsonl \
        --seeds 0 1 --output benchmarks/results/estimators.json

On one core, stage 1 takes 8 minutes a run, each estimator 6. What the output holds already is not computed again.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_ila import ILAConfig, LayerImportance
from peft_ila.attribution import PATH
from peft_ila.data import load_dataset
from peft_ila.embedded import smollm2
from peft_ila.files import whole_file
from peft_ila.layer import Gate
from peft_ila.units import unit_of

SHARES = (0.1, 0.3, 0.5, 0.75)
BATCHES = 32
HELD_OUT = 64
MAX_LENGTH, PROMPT = 96, 56  # tokens; examples with longer prompts are left out


def fine_tune(data: str, seed: int, steps: int, adapter: Path) -> SFTTrainer:
    """Stage 1: LoRA on all examples but the last ones, or what such a run has saved as `adapter`."""
    directory = smollm2()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(seed)
    config = ILAConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        granularity="module",
        gate_mode="open",
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # The loss is on the answers only: the tokens of the chat format are learned by any few layers, and with them even
    # random masks keep nine tenths of the gain.
    dataset = (
        load_dataset(data)
        .map(lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]})
        .select_columns(["prompt", "completion"])
        .filter(lambda row: len(tokenizer.apply_chat_template(row["prompt"], return_dict=True)["input_ids"]) <= PROMPT)
        .shuffle(seed=0)
    )
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(model, adapter) if adapter.exists() else get_peft_model(model, config),
        args=SFTConfig(
            output_dir=str(adapter),
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            max_length=MAX_LENGTH,
            max_steps=steps,
            learning_rate=5e-4,
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
    )
    if not adapter.exists():
        trainer.train()
        trainer.model.save_pretrained(adapter)
    return trainer


class FreeGate(Gate):
    """A gate whose γ is any number, also exactly 0 or 1, with a gradient."""

    gamma: torch.Tensor

    is_open = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma.to(x)


class Problem:
    """A fine-tuned adapter: its loss and ∂L/∂γ on one of its batches for any γ, a vector with one entry a module."""

    def __init__(self, data: str, seed: int, steps: int, adapter: Path) -> None:
        trainer = fine_tune(data, seed, steps, adapter)
        self.model = trainer.model
        self.model.set_gate_mode("soft")
        self.model.eval()
        self.gates = self.model.gates()
        self.units = list(self.gates)
        for gate in self.gates.values():
            gate.__class__ = FreeGate
            gate.weight.requires_grad_(False)
        torch.manual_seed(1000 + seed)
        self.batches = list(itertools.islice(trainer.get_train_dataloader(), BATCHES))
        self.held_out = list(trainer.get_eval_dataloader())
        zeros, ones = torch.zeros(len(self.units)), torch.ones(len(self.units))
        self.loss_open, self.loss_closed = self.held_out_loss(ones), self.held_out_loss(zeros)
        self.cost = 0

    def loss(self, gamma: torch.Tensor, batch: Any) -> torch.Tensor:
        for gate, value in zip(self.gates.values(), gamma.unbind()):
            gate.gamma = value
        return self.model(**batch, use_cache=False).loss

    def gradient(self, gamma: torch.Tensor, batch: Any) -> torch.Tensor:
        self.cost += 1
        gamma = gamma.detach().clone().requires_grad_()
        return torch.autograd.grad(self.loss(gamma, batch), gamma)[0]

    @torch.no_grad()
    def held_out_loss(self, gamma: torch.Tensor) -> float:
        tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in self.held_out]
        losses = [float(self.loss(gamma, batch)) for batch in self.held_out]
        return sum(a * b for a, b in zip(losses, tokens)) / sum(tokens)

    def kept(self, scores: torch.Tensor, share: float) -> float:
        gamma = torch.zeros(len(self.units))
        gamma[top(scores, share)] = 1
        return (self.loss_closed - self.held_out_loss(gamma)) / (self.loss_closed - self.loss_open)

    def of_layers(self, scores: torch.Tensor) -> torch.Tensor:
        """Each module's score replaced by the sum over its decoder layer."""
        layers = [unit_of(unit, "layer") for unit in self.units]
        sums = {
            layer: sum(score for score, own in zip(scores.tolist(), layers) if own == layer) for layer in set(layers)
        }
        return torch.tensor([sums[layer] for layer in layers])

    def worth(self) -> float:
        """L(0) − L(1) on training batches."""
        with torch.no_grad():
            ones = torch.ones(len(self.units))
            return statistics.mean(
                float(self.loss(ones * 0, batch) - self.loss(ones, batch)) for batch in self.batches[:4]
            )


def top(scores: torch.Tensor, share: float) -> torch.Tensor:
    return scores.topk(max(1, round(share * len(scores)))).indices


def path(problem: Problem, points: tuple[float, ...], batches: int = BATCHES) -> torch.Tensor:
    ones = torch.ones(len(problem.units))
    gradients = [
        problem.gradient(ones * points[i % len(points)], batch) for i, batch in enumerate(problem.batches[:batches])
    ]
    return -torch.stack(gradients).mean(0)


def random_masks(problem: Problem, points: tuple[float, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for i, batch in enumerate(problem.batches):
        draw = torch.rand(len(problem.units), generator=generator)
        gradients.append(problem.gradient((draw < points[i % len(points)]).float(), batch))
    return -torch.stack(gradients).mean(0)


def descent(
    problem: Problem,
    penalty: float,
    start: torch.Tensor | float = 2.0,
    lr: float = 0.15,
    batches: int = BATCHES,
    offset: int = 0,
) -> torch.Tensor:
    """Descent on L + λ·mean(γ), γ = σ(s), with λ = `penalty`."""
    n = len(problem.units)
    s = (torch.zeros(n) + start).requires_grad_()
    adam = torch.optim.Adam([s], lr=lr)
    for batch in problem.batches[offset : offset + batches]:
        gamma = torch.sigmoid(s.detach())
        gradient = problem.gradient(gamma, batch) + penalty / n
        s.grad = gradient * gamma * (1 - gamma)
        adam.step()
    return s.detach()


def straight_through(problem: Problem, start: torch.Tensor, share: float, batches: int, offset: int) -> torch.Tensor:
    """The forward pass has the hard top-H mask, the gradient goes to all scores as if it had not."""
    scale = float(start.std())
    s = (start / scale).requires_grad_()
    adam = torch.optim.Adam([s], lr=0.1)
    for batch in problem.batches[offset : offset + batches]:
        gamma = torch.zeros(len(s))
        gamma[top(s.detach(), share)] = 1
        s.grad = problem.gradient(gamma, batch)
        adam.step()
    return s.detach()


def shrinking(problem: Problem, last: float = 0.1, decay: float = 0.9) -> torch.Tensor:
    """Attribution along a path of hard masks, which keep ever fewer of the units with the greatest running score."""
    n = len(problem.units)
    total = torch.zeros(n)
    for i, batch in enumerate(problem.batches):
        share = last ** (i / (BATCHES - 1))
        gamma = torch.zeros(n)
        gamma[top(total, share)] = 1
        if i == 0:
            gamma.fill_(1)
        total = decay * total - (1 - decay) * problem.gradient(gamma, batch)
    return total


def norm(problem: Problem) -> torch.Tensor:
    layers = dict(problem.model.base_model.model.named_modules())
    norms = []
    for unit in problem.units:
        layer = layers[unit]
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        norms.append(float(delta.norm()))
    return torch.tensor(norms)


def zscore(scores: torch.Tensor) -> torch.Tensor:
    return (scores - scores.mean()) / scores.std()


def random_scores(problem: Problem) -> torch.Tensor:
    return torch.rand(len(problem.units), generator=torch.Generator().manual_seed(len(str(problem.loss_open))))


ESTIMATORS: dict[str, Callable[[Problem], torch.Tensor]] = {
    "path": lambda p: path(p, PATH),
    "random masks": lambda p: random_masks(p, PATH),
    "shrinking masks": shrinking,
    "path 16 + pressure 16": lambda p: descent(p, p.worth(), zscore(path(p, PATH, 16)), batches=16, offset=16),
    "path 16 + straight-through 16 at 30 %": lambda p: straight_through(p, path(p, PATH, 16), 0.3, 16, 16),
    "pressure": lambda p: descent(p, p.worth()),
    "plain descent from s = 4": lambda p: descent(p, 0.0, 4.0, 0.1),
    "first order": lambda p: path(p, (1.0,)),
    "norm of ΔW": norm,
    "random": random_scores,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="JSONL files with `messages`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60, help="of stage 1")
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument("--adapters", type=Path, default=Path("adapters"), help="where stage 1 is kept")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    runs = json.loads(args.output.read_text()) if args.output.exists() else {}
    for seed, data in itertools.product(args.seeds, args.data):
        name = f"{Path(data).stem}_{seed}"
        run = runs.setdefault(name, {"estimators": {}})
        todo = [estimator for estimator in args.estimators if estimator not in run["estimators"]]
        if not todo:
            continue
        problem = Problem(data, seed, args.steps, args.adapters / name)
        run |= {"units": problem.units, "loss_base": problem.loss_closed, "loss_tuned": problem.loss_open}
        for estimator in todo:
            problem.cost = 0
            scores = ESTIMATORS[estimator](problem)
            run["estimators"][estimator] = {
                "cost": problem.cost,
                "scores": scores.tolist(),
                "kept": [problem.kept(scores, share) for share in SHARES],
                "kept_layers": [problem.kept(problem.of_layers(scores), share) for share in SHARES[:2]],
            }
            with whole_file(args.output) as temporary:
                temporary.write_text(json.dumps(runs))
            print(name, estimator, [round(kept, 3) for kept in run["estimators"][estimator]["kept"]], flush=True)
    print_tables(runs)


def print_tables(runs: dict[str, Any]) -> None:
    shares = [f"{share:.0%}" for share in SHARES]
    print(f"\n| run | ranking by | {' | '.join(shares)} | layers {' | layers '.join(shares[:2])} |")
    print("|" + "---|" * (len(shares) + 4))
    for name, run in runs.items():
        for estimator, found in run["estimators"].items():
            figures = " | ".join(f"{kept:.2f}" for kept in [*found["kept"], *found["kept_layers"]])
            print(f"| {name} | {estimator} | {figures} |")
    print("\n| ranking by | runs | overlap@75 | overlap@30 | Spearman |\n|---|---|---|---|---|")
    for estimator in ESTIMATORS:
        found = {name: run for name, run in runs.items() if estimator in run["estimators"]}
        rankings = {n: LayerImportance(r["units"], r["estimators"][estimator]["scores"]) for n, r in found.items()}
        for (a, first), (b, second) in itertools.combinations(rankings.items(), 2):
            figures = (first.overlap(second, 0.75), first.overlap(second, 0.3), first.spearman(second))
            print(f"| {estimator} | {a}, {b} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
