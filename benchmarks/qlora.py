"""
QLoRA on one GPU: what does each arm cost, and does `peft-ila plan` predict it?

The arms: both stages of the search, the search without training (`method="untrained"`), and LoRA (r = 16) on all, 75,
30 and 10 % of the layers that the search selects. For each: peak memory and the plan's, the time of a step, the loss
(of the last steps; of a search, of its first batch), trained parameters. The trainer is transformers' own, with bf16
autocast and fused AdamW.

    python -m benchmarks.qlora meta-llama/Llama-2-7b-hf --output OUT.json       # or mistralai/Mistral-7B-v0.1
    python -m benchmarks.qlora --output benchmarks/results/qlora.json           # SmolLM2-135M, also on the CPU

A directory with only a `config.json` gives a model of that shape with random weights and random data; memory and time
do not depend on them. `--settings` describes a step: `NF4` or `bf16`, examples × tokens, and `/checkpointing` to
recompute activations. Figures are written after each arm; no arm starts after `--time_limit`. A failed arm is a row
with its error. 7B shape, 4×1024 tokens: an estimated 40 s per setting on an H100. The default on 2 CPU cores, without
figures of memory: 6 minutes.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import re
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.record import save, table
from peft_ila import ILAConfig, LayerImportance, learn_gates
from peft_ila.embedded import dialogues, smollm2
from peft_ila.workflows.plan import plan

LORA = {"r": 16, "lora_alpha": 32}
GATED = {**LORA, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "gate_mode": "open"}
SHARES = (1.0, 0.75, 0.3, 0.1)
BATCHES = 16  # of the data
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda:0" if ON_GPU else "cpu"


class Setting(NamedTuple):
    """How a step is taken."""

    base: str
    batch: int
    length: int
    checkpointing: bool

    @classmethod
    def parse(cls, text: str) -> "Setting":
        found = re.fullmatch(r"(NF4|bf16)/(\d+)x(\d+)(/checkpointing)?", text)
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} is not like NF4/4x1024/checkpointing or bf16/1x1024")
        return cls(found[1], int(found[2]), int(found[3]), bool(found[4]))

    def __str__(self) -> str:
        return f"{self.base}/{self.batch}x{self.length}{'/checkpointing' * self.checkpointing}"


def is_shape(name: str) -> bool:
    """Whether it is a directory without weights."""
    return Path(name).is_dir() and not any((*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")))


def load(name: str, base: str) -> Any:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": DEVICE}}
    if base == "NF4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    if not is_shape(name):
        return AutoModelForCausalLM.from_pretrained(name, **options)
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    weights = {}
    for key, p in skeleton.named_parameters():
        weights[key] = torch.ones(p.shape, dtype=torch.bfloat16, device=DEVICE)
        if p.ndim > 1:
            weights[key].normal_(0, 0.02)
    return type(skeleton).from_pretrained(None, config=config, state_dict=weights, **options)


def examples(name: str, vocabulary: int, setting: Setting) -> list[dict[str, list[int]]]:
    """Blocks of the length of the setting: of dialogues, or of random tokens of 256 kinds, which can be learned."""
    count = setting.length * setting.batch * BATCHES
    if is_shape(name):
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, min(256, vocabulary), (count,), generator=random).tolist()
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
        texts = ["\n".join(turn["content"] for turn in row["prompt"] + row["completion"]) for row in dialogues()]
        text = tokenizer(texts, add_special_tokens=False)["input_ids"]
        end = [tokenizer.eos_token_id]
        tokens = list(itertools.islice(itertools.cycle(token for ids in text for token in ids + end), count))
    starts = range(0, count, setting.length)
    return [dict.fromkeys(("input_ids", "labels"), tokens[i : i + setting.length]) for i in starts]


class Clock(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.begun)


def now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def forget_peak() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Arms:
    """What is measured of one base model; `rows` holds the figures of each arm."""

    def __init__(self, name: str, setting: Setting, steps: int) -> None:
        self.name, self.setting, self.steps = name, setting, steps
        self.config = AutoConfig.from_pretrained(name)
        self.data = examples(name, self.config.vocab_size, setting)
        self.base: Any = None
        self.importance: LayerImportance | None = None
        self.rows: dict[str, dict[str, Any]] = {}

    def run(self, deadline: float, save_rows: Callable[[], None]) -> None:
        """Run all arms, each of which may fail, and ask the plan."""
        arms: dict[str, Callable[[], None]] = {"rank": self.rank, "untrained": self.untrained}
        arms |= {f"{share:.0%}": functools.partial(self.tune, share) for share in SHARES}
        for arm, run in (arms | {"plan": self.plan}).items():
            try:
                if time.perf_counter() > deadline:
                    raise TimeoutError("not begun, the time was over")
                run()
            except Exception as error:
                traceback.print_exc()
                self.rows[f"{arm}, failed"] = {"error": f"{type(error).__name__}: {error}"}
            save_rows()

    def rank(self) -> None:
        with self.trainer(ILAConfig(**GATED)) as trainer:
            self.rows["rank, stage 1"] = self.train(trainer)
            forget_peak()
            self.rows["rank, stage 2"], self.importance = self.search(trainer, "attribution")

    def untrained(self) -> None:
        with self.trainer(ILAConfig(**GATED)) as trainer:
            self.rows["rank"], importance = self.search(trainer, "untrained")
        self.importance = self.importance or importance

    def tune(self, share: float) -> None:
        if self.importance is None:
            raise ValueError("both searches have failed, so that there is no ranking")
        with self.trainer(self.importance.to_lora_config(top_p=share, **LORA)) as trainer:
            self.rows[f"{share:.0%}"] = self.train(trainer)

    def plan(self) -> None:
        base, batch, length, checkpointing = self.setting
        own = (batch, length, base == "NF4", checkpointing)
        found = plan(self.config, self.importance, *own, shares=SHARES, r=LORA["r"])
        found["rank, stage 1"] = found["100%"]
        for arm, row in self.rows.items():
            if arm in found:
                row["planned"] = {**vars(found[arm]), "total": found[arm].total}

    @contextlib.contextmanager
    def trainer(self, config: LoraConfig) -> Iterator[Trainer]:
        """A trainer of the base model with an adapter. After an error the next arm loads the model again."""
        base, self.base = self.base or load(self.name, self.setting.base), None
        forget_peak()
        torch.manual_seed(0)
        model = get_peft_model(base, config)
        checkpointing = self.setting.checkpointing
        args = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=self.setting.batch,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            max_steps=self.steps,
            learning_rate=5e-4,
            lr_scheduler_type="constant",
            bf16=True,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            label_names=["labels"],
            disable_tqdm=True,
            use_cpu=not ON_GPU,
        )
        yield Trainer(model=model, args=args, train_dataset=self.data)
        self.base = model.unload()

    def train(self, trainer: Trainer) -> dict[str, Any]:
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return row(statistics.median(clock.seconds[2:]), statistics.mean(losses[-4:]), trained, losses=losses)

    def search(self, trainer: Trainer, method: Any) -> tuple[dict[str, Any], LayerImportance]:
        begun = now()
        importance = learn_gates(trainer, steps=self.steps, min_agreement=None, loss_batches=1, method=method)
        facts = importance.metadata["learn_gates"]
        seconds = (now() - begun) / facts["steps_taken"]
        return row(seconds, facts["loss_open"], 0, scores=importance.scores), importance


def row(seconds: float, loss: float, trained: int, **more: Any) -> dict[str, Any]:
    peak = torch.cuda.max_memory_allocated() if ON_GPU else None
    return {"peak": peak, "seconds": seconds, "loss": loss, "trained": trained, **more}


def show(setting: Setting, rows: dict[str, Any]) -> None:
    def cells(arm: str, own: dict[str, Any]) -> list[Any]:
        if "error" in own:
            return [arm, own["error"][:200]]
        peak, planned = own["peak"], own.get("planned", {}).get("total")
        memory = [peak and peak / 1e9, planned and planned / 1e9, planned / peak if planned and peak else None]
        return [arm, *memory, own["seconds"], own["loss"], f"{own['trained']:,}"]

    columns = [str(setting), "peak, GB", "planned, GB", "planned / peak", "step, s", "loss", "trained"]
    table(columns, (cells(arm, own) for arm, own in rows.items()))


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a name on the hub or a directory, by default SmolLM2-135M")
    default = ["NF4/4x1024/checkpointing", "NF4/1x1024"] if ON_GPU else ["NF4/2x64/checkpointing"]
    parser.add_argument("--settings", nargs="+", type=Setting.parse, default=[Setting.parse(text) for text in default])
    parser.add_argument("--steps", type=int, default=8, help="the steps of each training and each search; at least 4")
    parser.add_argument("--time_limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    name = args.model or str(smollm2())
    figures: dict[str, Any] = {
        "model": args.model or "SmolLM2-135M",
        "random weights": is_shape(name),
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU",
        "steps": args.steps,
        "settings": {},
    }
    for setting in args.settings:
        arms = Arms(name, setting, args.steps)
        figures["settings"][str(setting)] = arms.rows
        arms.run(started + args.time_limit, lambda: save(args.output, figures))
        show(setting, arms.rows)
        del arms


if __name__ == "__main__":
    main()
