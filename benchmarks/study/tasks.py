"""HellaSwag, ARC-easy and PIQA by lm-eval, on local files: does tuning on dialogues lose accuracy?"""

import functools
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

BATCH = 64


def accuracies(model: PreTrainedModel, directory: Path, data: Path, limit: int | None = None) -> dict[str, float]:
    """
    The model's accuracy on each task, without examples in the prompt. `acc_norm` allows for the answers' lengths.

    Args:
        model: A model without adapters, or with them injected.
        directory: Where its tokenizer is.
        data: The directory of `eval_hellaswag.jsonl`, `eval_arc_easy.jsonl` and `eval_piqa.jsonl`.
        limit: Only as many questions of each.

    """
    from lm_eval import simple_evaluate  # for this only: pip install lm-eval
    from lm_eval.models.huggingface import HFLM

    attention, training = model.config._attn_implementation, model.training
    model.eval()
    model.set_attn_implementation("sdpa")  # lm-eval pads
    tokenizer = AutoTokenizer.from_pretrained(directory)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, max_length=512)
    found = simple_evaluate(wrapped, tasks=_tasks(data), limit=limit, bootstrap_iters=0, log_samples=False)
    model.set_attn_implementation(attention)
    model.train(training)
    return {
        f"{task} {metric}": round(float(own[f"{metric},none"]), 5)
        for task, own in found["results"].items()
        for metric in ("acc", "acc_norm")
    }


@functools.cache
def _tasks(data: Path) -> list[Any]:
    """lm-eval's own prompts. The file of HellaSwag lacks the label of the activity, and so do the prompts."""
    from lm_eval.api.task import ConfigurableTask

    question = "Question: {{question}}\nAnswer:"
    prompts = {
        "hellaswag": {"doc_to_text": lambda row: _clean(row["ctx"]), "doc_to_target": "label"}
        | {"doc_to_choice": lambda row: [_clean(ending) for ending in row["endings"]]},
        "arc_easy": {"doc_to_text": question, "doc_to_target": "answer", "doc_to_choice": "choices"},
        "piqa": {"doc_to_text": question, "doc_to_target": "answer", "doc_to_choice": "choices"},
    }
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return [
        ConfigurableTask(
            config={
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data / f"eval_{name}.jsonl")}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "metric_list": metrics,
                "num_fewshot": 0,
                **prompt,
            }
        )
        for name, prompt in prompts.items()
    ]


def _clean(text: str) -> str:
    """As lm-eval's task does: brackets come from WikiHow."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
