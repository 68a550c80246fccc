"""
Damaged or hostile input is refused with one clear error, and nothing else happens.

    pytest tests/test_fuzz.py                # a sample
    pytest tests/test_fuzz.py --size large   # 24,000 cases, and how many were accepted; 20 ms for each

Each case is a good ranking, adapter, data file, model configuration or command line with a few random changes,
reproducible by seed. Accepted input must give whole output, as PEFT loads it: a ranking converts to a configuration
that targets exactly its selection; an adapter exports to one that has all its weights and computes the same. Refused
input raises an error with a message of one line, exits the command line with 1 or 2, and leaves no file. No input is
executed.

Without the model, `export` cannot know that a file lacks a whole module, since layers may have different modules. PEFT
loads such a file and its export alike: it warns and initialises the module, which then adds nothing. PEFT refuses a
file with the wrong shapes before and after export, unless the mask leaves them out.
"""

import contextlib
import copy
import io
import json
import logging
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_ila import ILAConfig, LayerImportance
from peft_ila.cli import main as command_line
from peft_ila.export.plain import export_adapter
from peft_ila.ranking.table import ranking_table
from peft_ila.workflows.data import load_dataset

REFUSALS = (ValueError, OSError, TypeError)
# fmt: off
ODD = [
    None, True, 0, -0.0, -1, 1.5, 10**12, 10**400, float("nan"), float("inf"), "", "a", "model.layers.0", [], {}, [[]],
    ["a"], {"a": 1}, "../../etc/passwd", "/dev/zero", "Trainer", "HfArgumentParser", "m.(a+)+b.0", "m.la(b.0",
    "$\\frac{", "\x1b[2J", "<script>alert(1)</script>", "a`|b", "a\n## b", "x" * 5000, "٣", "..", "a..b", " ",
    "\ud800", "__import__('os').system('touch PWNED')", "!!python/object/apply:os.system ['touch PWNED']",
    "model.layers.999999999999999999999.mlp",
]
# fmt: on


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Without what libraries say about odd values, and with numbers of any length."""
    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(0)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Good files of every kind."""
    good = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=16,
        initializer_range=0.5,  # so that each module shows in the logits
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(good / "model")
    options = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    model = get_peft_model(LlamaForCausalLM(config), ILAConfig(**options, gate_mode="soft"))
    model.peft_config["default"].init_lora_weights = True  # PEFT's default: what a file lacks adds nothing
    for gate, score in zip(model.gates().values(), (-1.0, 0.0, 1.0)):
        gate.weight.data.fill_(score)
    model.save_pretrained(good / "soft")
    model.apply_mask(["model.layers.0", "model.layers.2"])
    model.save_pretrained(good / "hard")
    for path in good.glob("*/adapter_config.json"):  # PEFT writes a set, in another order in each process
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "target_modules": sorted(content["target_modules"])}))
    importance = model.layer_importance()
    importance.metadata["model"] = str(good / "model")
    importance.spread = [0.1] * 3
    importance.save(good / "importance.json")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": messages}, {"messages": messages}, {"messages": messages[:1]}]
    (good / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return good


# ---- the kinds of cases: each makes one in `work`, checks the outcome, and says whether it was accepted ----


def ranking(chance, good, work):
    path = work / "importance.json"
    path.write_bytes(mutated_json(chance, (good / "importance.json").read_bytes()))
    importance = LayerImportance.load(path)
    config = importance.to_lora_config(top_p=0.5)
    expected = {name for unit in importance.select(top_p=0.5) for name in importance.modules[unit]}
    names = {name for own in importance.modules.values() for name in own} | set(importance.lookalikes)
    parameters = set(importance.parameters)
    hit = {name for name in names - parameters if config.target_modules and check_target_module_exists(config, name)}
    assert hit == expected - parameters and set(config.target_parameters or ()) == expected & parameters
    assert all(character.isprintable() or character == "\n" for character in ranking_table(importance))
    importance.save(work / "out" / "again.json")
    assert LayerImportance.load(work / "out" / "again.json") == importance
    return True


def adapter_configuration(chance, good, work):
    source = shutil.copytree(good / chance.choice(("soft", "hard")), work / "in")
    path = source / "adapter_config.json"
    path.write_bytes(mutated_json(chance, path.read_bytes()))
    return exported(good, source, work)


def adapter_weights(chance, good, work):
    source = shutil.copytree(good / chance.choice(("soft", "hard")), work / "in")
    path = source / SAFETENSORS_WEIGHTS_NAME
    if chance.random() < 0.3:
        path.write_bytes(mutated_bytes(chance, path.read_bytes()))
    else:
        tensors = load_file(path)
        for _ in range(chance.randint(1, 2)):
            change_tensor(chance, tensors)
        save_file(tensors, path)
    return exported(good, source, work)


def data(chance, good, work):
    lines = (good / "data.jsonl").read_bytes().splitlines()
    position = chance.randrange(len(lines))
    lines[position] = mutated_json(chance, lines[position])
    content = b"\n".join(lines)
    if chance.random() < 0.03:
        content = content.decode("utf-8", "replace").encode("utf-16")
    (work / "data.jsonl").write_bytes(content)
    load_dataset(str(work / "data.jsonl"))
    return True


def model_configuration(chance, good, work):
    model = shutil.copytree(good / "model", work / "model")
    path = model / "config.json"
    path.write_bytes(mutated_json(chance, path.read_bytes()))
    ranking, out = str(good / "importance.json"), str(work / "out")
    return ran(["convert", ranking, "--top_k", "1", "--output_dir", out, "--model_name_or_path", str(model)])


def command_lines(chance, good, work):
    ranking, out = str(good / "importance.json"), str(work / "out")
    commands = (
        ["convert", ranking, "--top_k", "1", "--output_dir", out, "--format", "trl", "--lora_r", "4"],
        ["export", str(good / "hard"), "--output_dir", out],
        ["compare", ranking, ranking],
    )
    argv = chance.choice(commands)
    for _ in range(chance.randint(1, 2)):
        position = chance.randrange(len(argv))
        action = chance.randrange(3)
        if action == 0:
            argv[position] = str(chance.choice(ODD))[:200].replace("\0", "")
        elif action == 1:
            del argv[position]
        else:
            argv.insert(position, chance.choice(["--config", "--top_p", "-1", "--help", "nan", "--lora_r"]))
    return ran(argv)


CASES = {ranking: 1200, adapter_configuration: 80, adapter_weights: 100, data: 200}
CASES |= {model_configuration: 40, command_lines: 80}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_damaged_input(good, tmp_path, monkeypatch, capsys, large, kind):
    outcomes = Counter()
    for seed in range(4000 if large else CASES[kind]):
        work = tmp_path / "work"
        work.mkdir()
        monkeypatch.chdir(work)  # a command line may name files here
        try:
            accepted = kind(random.Random(f"{kind.__name__} {seed}"), good, work)
        except REFUSALS as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) <= 3000, seed
            accepted = False
        except Exception as error:
            raise AssertionError(f"case {seed}") from error
        if not accepted:
            assert not [path for path in work.rglob("out/*") if path.is_file()], seed
        assert not list(work.rglob(".*")) + list(work.rglob("PWNED")), seed
        outcomes["accepted" if accepted else "refused"] += 1
        shutil.rmtree(work)
    if large:
        with capsys.disabled():
            print(f"\n{kind.__name__}: {dict(outcomes)}")
    assert len(outcomes) == 2


# ---- what comes of a case ----


def ran(argv) -> bool:
    """Whether the command line accepts the arguments; it must end by a result or one line."""
    written = io.StringIO()
    try:
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            command_line(argv)
    except SystemExit as end:
        if isinstance(end.code, str):
            assert end.code.startswith("peft-ila ") and "\n" not in end.code
            assert "PEFT_ILA_TRACEBACK" not in end.code  # an error of its own
        return end.code in (0, None)
    return True


def exported(good, source, work) -> bool:
    export_adapter(source, work / "out")
    try:
        check_export(good, source, work / "out")
    except REFUSALS as error:
        raise AssertionError("exported, but then PEFT does not read it") from error
    return True


def check_export(good, source, exported):
    before, after = (load_file(directory / SAFETENSORS_WEIGHTS_NAME) for directory in (source, exported))
    model = get_peft_model(base(good), LoraConfig.from_pretrained(str(exported)))
    own = {name.replace(".default", "") for name, _ in model.named_parameters() if "lora_" in name}
    saved = {key for key in after if "lora_" in key}
    assert saved <= own and not (own - saved) & before.keys() and all(t.isfinite().all() for t in after.values())
    expected, found = computed(good, source), computed(good, exported)
    if expected is None and found is not None:  # the mask leaves the weights of other shapes out
        whole = load_file(good / "hard" / SAFETENSORS_WEIGHTS_NAME)
        save_file(
            before | {key: whole[key] for key in before.keys() - after.keys()}, source / SAFETENSORS_WEIGHTS_NAME
        )
        expected = computed(good, source)
    assert (expected is None) == (found is None), "PEFT reads either the adapter or the exported one, not both"
    if expected is not None:
        # weights of 16 bits are rounded again after a gate was multiplied into them
        rounding = 1e-2 if any(t.element_size() == 2 for t in after.values()) else 1e-4
        atol = rounding * expected.nan_to_num(0, 0, 0).abs().max()  # weights of 1e30 are finite, their logits not
        assert torch.allclose(found, expected, rtol=0, atol=atol, equal_nan=True), "it computes something else"


def base(good) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig.from_pretrained(good / "model"))


def computed(good, directory) -> torch.Tensor | None:
    """
    The logits of the model with an adapter that PEFT loads; None if its shapes are not the model's.

    In float64, where no weight of float32 overflows, in whichever order they are multiplied.
    """
    try:
        model = PeftModel.from_pretrained(base(good), directory)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        return None
    with torch.no_grad():
        return model.eval().double()(torch.arange(8)[None]).logits


# ---- damage ----


def mutated_bytes(chance, content: bytes) -> bytes:
    """Cut, with a byte changed, or with some in it."""
    position = chance.randrange(len(content))
    action = chance.randrange(3)
    if action == 0:
        return content[:position]
    inserted = bytes([chance.randrange(256)]) if action == 1 else chance.randbytes(8)
    return content[:position] + inserted + content[position + (action == 1) :]


def mutated_json(chance, text: bytes) -> bytes:
    """With values replaced, deleted or doubled, or not JSON any more."""
    how = chance.random()
    if how < 0.1:
        return mutated_bytes(chance, text)
    if how < 0.12:
        return b"[" * 100_000
    content = json.loads(text)
    for _ in range(chance.randint(1, 3)):
        all_places = list(places(content))
        if not all_places:
            break
        parent, key = chance.choice(all_places)
        action = chance.randrange(4)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif action == 2 and isinstance(parent, dict):
            parent[chance.choice(all_places)[1] if chance.random() < 0.5 else "odd"] = chance.choice(ODD)
        else:
            parent[key] = copy.deepcopy(chance.choice(ODD))
    return json.dumps(content, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def places(content):
    if isinstance(content, (dict, list)):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from places(content[key])


def change_tensor(chance, tensors):
    key = chance.choice(sorted(tensors))
    tensor = tensors[key]
    action = chance.randrange(7)
    if action == 0:
        del tensors[key]
    elif action == 1:
        tensors[key] = torch.full(tensor.shape, chance.choice([float("nan"), float("inf")]))
    elif action == 2:
        tensors[key] = torch.randn([chance.randint(0, 3) for _ in range(chance.randint(0, 3))])
    elif action == 3:
        tensors[key] = tensor.nan_to_num(0, 0, 0).to(chance.choice([torch.int8, torch.float16, torch.float64]))
    elif action == 4:
        name = chance.choice(["evil.weight", key + ".odd", key.replace("lora_A", "lora_C"), key[5:]])
        tensors[name] = tensor.clone()
    elif action == 5:
        tensors[key.replace("layers.0", "layers.7")] = tensors.pop(key)
    else:
        tensors[key] = tensor.flatten()[:-1].clone()


# ---- the check itself ----

MODULE = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
UP = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: [tensors.pop(f"{MODULE}{part}.weight") for part in "AB"],
        lambda tensors: tensors.pop(f"{MODULE}A.weight"),
        lambda tensors: tensors.update({UP: tensors[UP] * 1.1}),
        lambda tensors: tensors.update({UP.replace("layers.2", "layers.7"): torch.zeros(16, 2)}),
        lambda tensors: tensors.update({UP: tensors[UP][:3].clone()}),
    ],
)
def test_a_wrong_export_is_found(good, tmp_path, damage):
    source = shutil.copytree(good / "hard", tmp_path / "in")
    assert exported(good, source, tmp_path)
    path = tmp_path / "out" / SAFETENSORS_WEIGHTS_NAME
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(AssertionError):
        check_export(good, source, tmp_path / "out")
