import atexit
import contextlib
import os
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on two threads, and differ on each machine
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="peft_ila-data-")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peft_ila  # noqa: F401  registers ILA

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def tiny_llama(layers: int = 3, seed: int = 0, **kwargs) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "pad_token_id": 0,
            **kwargs,
        }
    )
    return LlamaForCausalLM(config)


# more threads than cores are several times slower than one thread
THREADS_OF_BIG_MODELS = max(1, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))


@pytest.fixture(autouse=True)
def threads(request):
    torch.set_num_threads(THREADS_OF_BIG_MODELS if request.node.get_closest_marker("smollm2") else 1)


@pytest.fixture(autouse=True)
def as_on_any_cpu(monkeypatch):
    """On CPUs with AVX512-BF16, bitsandbytes packs 4-bit weights: the reference, LoRA, would not merge and train."""
    with contextlib.suppress(ImportError):  # old ones neither pack nor ask
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))


WORDS = [f"w{i}" for i in range(58)]


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "user", "assistant", ":", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}",
    )


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


def tiny_dialogues() -> list[dict]:
    """Answers that follow from the question, so that there is something to learn."""
    rows = []
    for i in range(48):
        question, answer = WORDS[i % 8], " ".join(WORDS[(i % 8 + step) % 58] for step in (3, 7, 11, 20))
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return rows


@pytest.fixture(scope="session")
def dialogues() -> list[dict]:
    return tiny_dialogues()


# ---------------------------------------------------------------------------------------------------------------------
# The support table: `pytest --support-table=docs/support.md`
# ---------------------------------------------------------------------------------------------------------------------

_SUPPORT_HEAD = """\
# What is supported

`make support` writes this page from the outcomes of the tests; each row names the test file. *Refused* means an error
at construction that says what to do. *Not run* means that a package or a device was missing on this machine. CUDA
and DeepSpeed were run elsewhere ([GPU](appendix/cost.md#qlora-on-one-gpu), [DeepSpeed](howto/gpus.md#what-was-run)).

`pytest tests/test_breadth.py --size large` gates and exports the model classes of transformers on the meta device
and compares with what plain PEFT injects. Of 562 classes of transformers 5.23.0, 515 were exact, 1 was exact, but
asked for the model instead of its configuration, 38 were not built from their default configuration, and 8 refused as
by LoRA.
"""


def pytest_addoption(parser):
    parser.addoption("--support-table", type=Path, help="write what the tests marked `support` did to this file")
    parser.addoption("--size", choices=("small", "large"), default="small", help="how many cases of the long tests")


@pytest.fixture
def large(request) -> bool:
    """Whether a long test shall try all of its cases, not a sample."""
    return request.config.getoption("size") == "large"


# the files that take longest start first, so that no process ends long after the others
LONGEST = ["test_cli.py", "test_lost.py", "test_smollm2.py", "test_readme.py", "test_distributed.py", "test_kills.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        for mark in item.iter_markers("support"):
            good = "refused" if mark.kwargs.get("refused") else "supported"
            item.user_properties.append(("support", [*mark.args, good]))  # goes with the reports of other processes


class SupportTable:
    """Collects the outcomes of the tests marked `@pytest.mark.support(section, row, refused=False)`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = defaultdict(lambda: defaultdict(list))

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        for section, row, good in (value for name, value in report.user_properties if name == "support"):
            outcome = {"passed": good, "skipped": "not run", "failed": "**fails**"}[report.outcome]
            self.rows[section][row].append((outcome, report.location[0]))

    def pytest_sessionfinish(self):
        text = _SUPPORT_HEAD
        for section in sorted(self.rows):
            text += f"\n## {section}\n\n| | | tests |\n|---|---|---|\n"
            for row, results in sorted(self.rows[section].items()):
                outcomes = {outcome for outcome, _ in results}
                worst = next(o for o in ("**fails**", "refused", "supported", "not run") if o in outcomes)
                files = ", ".join(sorted({f"`{file}`" for _, file in results}))
                text += f"| {row} | {worst} | {files} |\n"
        self.path.write_text(text, encoding="utf-8")


def pytest_configure(config):
    path = config.getoption("--support-table")
    if path and not hasattr(config, "workerinput"):  # not in the processes of pytest-xdist
        config.pluginmanager.register(SupportTable(path))
