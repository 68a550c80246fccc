"""
Does a damaged or hostile file ever do more than raise one clear error?

    python -m benchmarks.robustness.fuzz --number 20000 --output benchmarks/results/fuzz.json

Each case is a ranking, adapter, data file, model configuration or command line: a good one with a few random changes,
reproducible by seed. Accepted input must give whole output, as PEFT loads it: a ranking converts to a configuration
that targets exactly its selection; an adapter exports to one that has all its weights and computes the same. Refused
input raises `ValueError` or `OSError` with a message of one line, exits the command line with 1 or 2, and leaves no
file. No input is executed. About 20 ms per case.

Without the model, `export` cannot know that a file lacks a whole module, since layers may have different modules. PEFT
loads such a file and its export alike: it warns and initialises the module, which then adds nothing. PEFT refuses a
file with the wrong shapes before and after export, unless the mask leaves them out.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import save
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
KINDS = ("ranking", "adapter configuration", "adapter weights", "data", "model configuration", "command line")


class Wrong(AssertionError):
    """A case that was neither whole nor refused."""


class Fuzz:
    """Good files of every kind, and cases made from them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.good = directory / "good"
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=16,
            initializer_range=0.5,  # so that each module shows in the logits
        )  # fmt: skip
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(self.good / "model")
        options = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
        model = get_peft_model(LlamaForCausalLM(config), ILAConfig(**options, gate_mode="soft"))
        model.peft_config["default"].init_lora_weights = True  # PEFT's default: what a file lacks adds nothing
        for gate, score in zip(model.gates().values(), (-1.0, 0.0, 1.0)):
            gate.weight.data.fill_(score)
        model.save_pretrained(self.good / "soft")
        model.apply_mask(["model.layers.0", "model.layers.2"])
        model.save_pretrained(self.good / "hard")
        for name in ("soft", "hard"):  # PEFT writes a set, in another order in each process
            path = self.good / name / "adapter_config.json"
            content = json.loads(path.read_text())
            path.write_text(json.dumps({**content, "target_modules": sorted(content["target_modules"])}))
        importance = model.layer_importance()
        importance.metadata["model"] = str(self.good / "model")
        importance.spread = [0.1] * 3
        importance.save(self.good / "importance.json")
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rows = [{"messages": messages}, {"messages": messages}, {"messages": messages[:1]}]
        (self.good / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.tensors = {name: load_file(self.good / name / SAFETENSORS_WEIGHTS_NAME) for name in ("soft", "hard")}

    def case(self, kind: str, seed: int) -> bool:
        """
        One case, which is wrong or not.

        Returns:
            Whether the input was accepted.

        Raises:
            Wrong: Something else than a whole result or a clear refusal.
        """
        work = self.directory / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        chance = random.Random(f"{kind} {seed}")
        run: Callable[..., bool] = getattr(self, "_" + kind.replace(" ", "_"))
        try:
            accepted = run(chance, work)
        except REFUSALS as error:
            if len(str(error).splitlines()) != 1 or len(str(error)) > 3000:
                raise Wrong(f"{kind} {seed}: no clear message: {str(error)[:200]!r}") from error
            accepted = False
        except Wrong as error:
            raise Wrong(f"{kind} {seed}: {error}") from error
        except BaseException as error:
            raise Wrong(f"{kind} {seed}: {type(error).__name__}: {error}") from error
        if not accepted and (left := [p.name for p in work.rglob("*") if p.is_file() and p.parent.name == "out"]):
            raise Wrong(f"{kind} {seed}: refused, but {left} are left")
        if list(work.rglob(".*")) or list(work.rglob("PWNED")) or Path("PWNED").exists():
            raise Wrong(f"{kind} {seed}: left-overs, or executed")
        return accepted

    def _ranking(self, chance: random.Random, work: Path) -> bool:
        path = work / "importance.json"
        path.write_bytes(mutated_json(chance, (self.good / "importance.json").read_bytes()))
        importance = LayerImportance.load(path)
        selected = importance.select(top_p=0.5)
        config = importance.to_lora_config(top_p=0.5)
        expected = {name for unit in selected for name in importance.modules[unit]}
        names = {name for own in importance.modules.values() for name in own} | set(importance.lookalikes)
        parameters = set(importance.parameters)
        hit = {
            name for name in names - parameters if config.target_modules and check_target_module_exists(config, name)
        }
        if hit != expected - parameters or set(config.target_parameters or ()) != expected & parameters:
            raise Wrong(f"the configuration hits {sorted(hit)} instead of {sorted(expected)}")
        if not all(character.isprintable() or character == "\n" for character in ranking_table(importance)):
            raise Wrong("the table holds what does not print")
        importance.save(work / "out" / "again.json")
        if LayerImportance.load(work / "out" / "again.json") != importance:
            raise Wrong("saved and loaded, the ranking is another")
        return True

    def _adapter_configuration(self, chance: random.Random, work: Path) -> bool:
        source = shutil.copytree(self.good / chance.choice(("soft", "hard")), work / "in")
        path = source / "adapter_config.json"
        path.write_bytes(mutated_json(chance, path.read_bytes()))
        return self._export(source, work)

    def _adapter_weights(self, chance: random.Random, work: Path) -> bool:
        name = chance.choice(("soft", "hard"))
        source = shutil.copytree(self.good / name, work / "in")
        path = source / SAFETENSORS_WEIGHTS_NAME
        if chance.random() < 0.3:
            path.write_bytes(mutated_bytes(chance, path.read_bytes()))
        else:
            tensors = dict(self.tensors[name])
            for _ in range(chance.randint(1, 2)):
                change_tensor(chance, tensors)
            save_file(tensors, path)
        return self._export(source, work)

    def _export(self, source: Path, work: Path) -> bool:
        export_adapter(source, work / "out")
        try:
            return self._check_export(source, work)
        except REFUSALS as error:
            raise Wrong(f"exported, but then PEFT: {error}") from error

    def _check_export(self, source: Path, work: Path) -> bool:
        config = LoraConfig.from_pretrained(str(work / "out"))
        before, after = (load_file(directory / SAFETENSORS_WEIGHTS_NAME) for directory in (source, work / "out"))
        model = get_peft_model(self._model(), config)
        own = {name.replace(".default", "") for name, _ in model.named_parameters() if "lora_" in name}
        saved = {key for key in after if "lora_" in key}
        if saved - own or (own - saved) & before.keys() or not all(t.isfinite().all() for t in after.values()):
            raise Wrong("the exported adapter is not whole")
        expected, found = self._computed(source), self._computed(work / "out")
        if expected is None and found is not None:  # the mask leaves the weights of other shapes out
            left_out = before.keys() - after.keys()
            save_file(before | {key: self.tensors["hard"][key] for key in left_out}, source / SAFETENSORS_WEIGHTS_NAME)
            expected = self._computed(source)
        if (expected is None) != (found is None):
            raise Wrong("PEFT reads either the adapter or the exported one, not both")
        # weights of 16 bits are rounded again after a gate was multiplied into them
        rounding = 1e-2 if any(t.element_size() == 2 for t in after.values()) else 1e-4
        if expected is not None:
            atol = rounding * expected.nan_to_num(0, 0, 0).abs().max()  # weights of 1e30 are finite, their logits not
            if not torch.allclose(found, expected, rtol=0, atol=atol, equal_nan=True):
                raise Wrong("the exported adapter computes something else")
        return True

    def _model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig.from_pretrained(self.good / "model"))

    def _computed(self, directory: Path) -> torch.Tensor | None:
        """
        The logits of the model with an adapter that PEFT loads; None if its shapes are not the model's.

        In float64, where no weight of float32 overflows, in whichever order they are multiplied.
        """
        try:
            model = PeftModel.from_pretrained(self._model(), directory)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            return None
        with torch.no_grad():
            return model.eval().double()(torch.arange(8)[None]).logits

    def _data(self, chance: random.Random, work: Path) -> bool:
        path = work / "data.jsonl"
        lines = (self.good / "data.jsonl").read_bytes().splitlines()
        position = chance.randrange(len(lines))
        lines[position] = mutated_json(chance, lines[position])
        data = b"\n".join(lines)
        path.write_bytes(data.decode("utf-8", "replace").encode("utf-16") if chance.random() < 0.03 else data)
        load_dataset(str(path))
        return True

    def _model_configuration(self, chance: random.Random, work: Path) -> bool:
        model = shutil.copytree(self.good / "model", work / "model")
        path = model / "config.json"
        path.write_bytes(mutated_json(chance, path.read_bytes()))
        ranking = str(self.good / "importance.json")
        return self._run(["convert", ranking, "--top_k", "1", "--output_dir", str(work / "out"),
                          "--model_name_or_path", str(model)])  # fmt: skip

    def _command_line(self, chance: random.Random, work: Path) -> bool:
        ranking, out = str(self.good / "importance.json"), str(work / "out")
        argv = chance.choice(
            [
                ["convert", ranking, "--top_k", "1", "--output_dir", out, "--format", "trl", "--lora_r", "4"],
                ["export", str(self.good / "hard"), "--output_dir", out],
                ["compare", ranking, ranking],
            ]
        )
        for _ in range(chance.randint(1, 2)):
            position = chance.randrange(len(argv))
            action = chance.randrange(3)
            if action == 0:
                argv[position] = str(chance.choice(ODD))[:200].replace("\0", "")
            elif action == 1:
                del argv[position]
            else:
                argv.insert(position, chance.choice(["--config", "--top_p", "-1", "--help", "nan", "--lora_r"]))
            if not argv:
                break
        with contextlib.chdir(work) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
            return self._run(argv)

    def _run(self, argv: list[str]) -> bool:
        written = io.StringIO()
        try:
            with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
                command_line(argv)
        except SystemExit as end:
            if isinstance(end.code, str) and ("\n" in end.code or not end.code.startswith("peft-ila ")):
                raise Wrong(f"not one line: {end.code!r}") from end
            if isinstance(end.code, str) and "PEFT_ILA_TRACEBACK" in end.code:
                raise Wrong(f"an error of its own: {end.code!r}") from end
            return end.code in (0, None)
        return True


def mutated_bytes(chance: random.Random, data: bytes) -> bytes:
    """Cut, with bytes changed, or with some in it."""
    position = chance.randrange(len(data))
    action = chance.randrange(3)
    if action == 0:
        return data[:position]
    if action == 1:
        return data[:position] + bytes([chance.randrange(256)]) + data[position + 1 :]
    return data[:position] + chance.randbytes(8) + data[position:]


def mutated_json(chance: random.Random, data: bytes) -> bytes:
    """With values of a JSON text replaced, deleted or doubled, or not JSON any more."""
    how = chance.random()
    if how < 0.1:
        return mutated_bytes(chance, data)
    if how < 0.12:
        return b"[" * 100_000
    content = json.loads(data)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(content))
        parent, key = chance.choice(places)
        action = chance.randrange(4)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif action == 2 and isinstance(parent, dict):
            parent[chance.choice(places)[1] if chance.random() < 0.5 else "odd"] = chance.choice(ODD)
        else:
            parent[key] = copy.deepcopy(chance.choice(ODD))
        if not list(_places(content)):
            break
    sys.set_int_max_str_digits(0)
    return json.dumps(content, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def _places(content: Any) -> Any:
    if isinstance(content, (dict, list)):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


def change_tensor(chance: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    """One change of an adapter's weights."""
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
        tensors[chance.choice(["evil.weight", key + ".odd", key.replace("lora_A", "lora_C"), key[5:]])] = (
            tensor.clone()
        )
    elif action == 5:
        tensors[key.replace("layers.0", "layers.7")] = tensors.pop(key)
    else:
        tensors[key] = tensor.flatten()[:-1].clone()
    if not tensors:
        tensors["x"] = torch.zeros(1)


@contextlib.contextmanager
def quiet() -> Any:
    """Without what libraries say about odd values."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(level)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first case")
    parser.add_argument("--number", type=int, default=20000)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--output", type=Path, help="a JSON file for the counts")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory, quiet():
        fuzz = Fuzz(Path(directory))
        for seed in range(args.seed, args.seed + args.number):
            kind = args.kinds[seed % len(args.kinds)]
            try:
                counts[f"{kind}: {'accepted' if fuzz.case(kind, seed) else 'refused'}"] += 1
            except Wrong as error:
                counts[f"{kind}: wrong"] += 1
                print(error, flush=True)
    for outcome, count in sorted(counts.items()):
        print(f"{count:>6} {outcome}")
    if args.output:
        save(args.output, {"seed": args.seed, "counts": counts})


if __name__ == "__main__":
    main()
