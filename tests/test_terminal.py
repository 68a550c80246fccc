"""What a user of the terminal sees around the work: start, help, JSON, noise, exit codes, what to type next."""

import importlib
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
import trl
from conftest import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from trainers import ila, write_model_and_data
from transformers import AutoModelForCausalLM

import peft_ila
from peft_ila import LayerImportance
from peft_ila.cli import convert, main, parse
from peft_ila.workflows.arguments import RankArguments, TuneArguments

UNITS = [f"model.layers.{i}" for i in range(4)]
TRAINING = "--per_device_train_batch_size 8 --learning_rate 2e-2 --logging_steps 1 --max_steps 6 --report_to none"
# what no command that trains nothing has any use for
HEAVY = {"torch", "peft", "trl", "datasets", "transformers.trainer", "transformers.training_args", "accelerate"}


def save(path: Path, *scores: float) -> str:
    LayerImportance(UNITS, list(scores)).save(path)
    return str(path)


@pytest.fixture
def rankings(tmp_path):
    return [save(tmp_path / "a.json", 4, 3, 2, 1), save(tmp_path / "b.json", 4, 3, 1, 2)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tokenizer, dialogues):
    """A model, its tokenizer and data on disk."""
    directory = tmp_path_factory.mktemp("terminal")
    write_model_and_data(directory, tokenizer, dialogues)
    return directory


def rank(workspace, output, *extra) -> None:
    data = ["--model_name_or_path", str(workspace / "model"), "--dataset_name", str(workspace / "data.jsonl")]
    stages = ["--method", "attribution", "--gate_steps", "8"]
    main(["rank", *data, "--output_dir", str(output), *TRAINING.split(), *stages, *extra])


def in_a_process(script: str, *arguments: str) -> str:
    """What a script prints that runs as the program `peft-ila` does."""
    process = subprocess.run(
        [sys.executable, "-c", f"import sys\nfrom peft_ila_command import main\n{script}", *arguments],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stderr == ""  # of torchao and others, what they say on each start
    return process.stdout


@pytest.mark.parametrize("last", ["rank --help", "--version", "tune --importance missing.json"])
def test_what_trains_nothing_imports_no_torch(last, rankings, tmp_path):
    script = (
        "main(['compare', *sys.argv[1:]])\n"
        "main(['plot', sys.argv[1], '--output', sys.argv[2] + '.png'])\n"
        f"try: main({last.split()!r})\n"
        "except SystemExit as end: print(end)\n"
        f"print({HEAVY!r} & set(sys.modules))"
    )
    assert in_a_process(script, *rankings).endswith("set()\n")


def test_what_reads_adapters_imports_no_trainer(rankings, tmp_path):
    config = peft_ila.ILAConfig(r=2, target_modules=["q_proj"], gate_mode="open", init_lora_weights=False)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "ila")
    output = in_a_process(
        "main(['export', sys.argv[2] + '/ila', '--output_dir', sys.argv[2] + '/plain'])\n"
        "main(['convert', sys.argv[1], '--top_k', '2', '--output_dir', sys.argv[2] + '/lora'])\n"
        "print({'trl.trainer', 'datasets', 'transformers.trainer'} & set(sys.modules))",
        rankings[0],
        str(tmp_path),
    )
    assert LoraConfig.from_pretrained(tmp_path / "lora").target_modules == set(UNITS[:2])
    wrote, following, *_, trainers = output.splitlines()
    assert wrote == f"Wrote {tmp_path}/plain/adapter_config.json and adapter_model.safetensors."
    (call,) = re.fullmatch(r"Next, in Python: (.*)", following).groups()
    loaded = eval(call, {"PeftModel": PeftModel, "base_model": tiny_llama()})
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert trainers == "set()"


def test_the_import_registers_the_method_but_in_the_program(monkeypatch):
    """Its commands import what they need."""
    calls = []
    monkeypatch.setattr("peft_ila.tuner.registration.register", lambda *classes: calls.append(classes))
    importlib.reload(peft_ila)
    assert calls == [(peft_ila.ILAConfig, peft_ila.ILAModel)]
    monkeypatch.setitem(sys.modules, "peft_ila_command", object())
    importlib.reload(peft_ila)
    assert len(calls) == 1
    assert all(getattr(peft_ila, name) for name in peft_ila.__all__)


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    installed = {module.__name__: module.__version__ for module in (peft, torch, transformers, trl)}
    assert dict(line.split() for line in capsys.readouterr().out.splitlines()) == {
        "peft-ila": peft_ila.__version__,
        **installed,
    }


@pytest.mark.parametrize("command", ["rank", "convert", "tune", "export", "prune", "compare", "plot", "plan", "demo"])
def test_help_fits_two_screens(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        lines = capsys.readouterr().out.splitlines()
        assert exit_.value.code == 0
        assert len(lines) <= 100 and max(map(len, lines[:-1])) <= 80
        assert f"usage: peft-ila {command}" in lines[0] or f"    {command} " in "\n".join(lines)
        assert "130 Ctrl-C." in " ".join(lines)


@pytest.mark.parametrize("command, own", [("rank", RankArguments), ("tune", TuneArguments)])
def test_settings_in_help(command, own, capsys):
    """Our own, and behind `--help_all` also TRL's."""
    shown = {}
    for option in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as exit_:
            main([command, option])
        assert exit_.value.code == 0
        shown[option] = set(re.findall(r"^  (--\w+)", capsys.readouterr().out, flags=re.M))
    assert {f"--{name}" for name in own.__dataclass_fields__} <= shown["--help"]
    assert shown["--help"] - {"--help_all"} < shown["--help_all"] and len(shown["--help_all"]) > 150


def test_compare_as_json(rankings, capsys):
    main(["compare", "--json", *rankings])
    a, b = (LayerImportance.load(path) for path in rankings)
    assert json.loads(capsys.readouterr().out) == {
        "pairs": [
            {
                "a": rankings[0],
                "b": rankings[1],
                "overlap_75": a.overlap(b, 0.75),
                "overlap_30": a.overlap(b, 0.3),
                "spearman": a.spearman(b),
            }
        ]
    }


def test_compare_draws_what_overlaps(tmp_path, rankings, capsys):
    picture = tmp_path / "overlap.svg"
    main(["compare", *rankings, "--output", str(picture)])
    assert capsys.readouterr().out.splitlines()[-2:] == ["(by chance: 0.60 and 0.18)", f"Wrote {picture}."]
    assert "top 30 % (by chance 0.18)" in picture.read_text()
    picture.unlink()
    main(["compare", *rankings, "--json", "--output", str(picture)])
    result = json.loads(capsys.readouterr().out)
    assert result["written"] == [str(picture)] and len(result["pairs"]) == 1 and picture.exists()


def test_plot_outlines_a_selection(tmp_path, rankings, capsys):
    picture = tmp_path / "heatmap.svg"
    (tmp_path / "config.yaml").write_text("top_p: 0.5\n")
    config = str(tmp_path / "config.yaml")
    for selection in (["--top_k", "2"], ["--threshold", "0.9"], ["--config", config], [f"--config={config}"]):
        main(["plot", rankings[0], *selection, "--output", str(picture)])
        assert capsys.readouterr().out == f"Wrote {picture}.\n"
        number = len(LayerImportance.load(rankings[0]).select(threshold=0.9)) if "--threshold" in selection else 2
        assert f"selected: {number} of 4" in picture.read_text()
    main(["plot", rankings[0], "--output", str(picture)])
    assert "selected" not in picture.read_text()
    with pytest.raises(SystemExit, match="exactly one of `top_p`"):
        main(["plot", rankings[0], "--top_k", "2", "--top_p", "0.3", "--output", str(picture)])


def test_an_undefined_correlation_is_null(tmp_path, rankings, capsys):
    level = save(tmp_path / "level.json", 1, 1, 1, 1)
    assert math.isnan(LayerImportance.load(level).spearman(LayerImportance.load(rankings[0])))
    main(["compare", rankings[0], level, "--json"])
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["pairs"][0]["spearman"] is None


def test_convert_as_json(rankings, tmp_path, capsys):
    main(["convert", "--json", rankings[1], "--top_k", "3", "--output_dir", str(tmp_path), "--format", "trl"])
    assert json.loads(capsys.readouterr().out) == {
        "written": [str(tmp_path / "trl.yaml")],
        "format": "trl",
        "units": [UNITS[0], UNITS[1], UNITS[3]],
    }


def test_plot_and_export_as_json(rankings, tmp_path, capsys):
    picture = str(tmp_path / "a.png")
    main(["plot", "--json", rankings[0], "--output", picture])
    assert json.loads(capsys.readouterr().out) == {"written": [picture]}
    config = peft_ila.ILAConfig(r=2, target_modules=["q_proj"], gate_mode="open", init_lora_weights=False)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "ila")
    main(["export", str(tmp_path / "ila"), "--json", "--output_dir", str(tmp_path / "plain")])
    (written,) = json.loads(capsys.readouterr().out).values()
    assert sorted(written) == sorted(str(path) for path in (tmp_path / "plain").iterdir())


@pytest.mark.parametrize("extra, trained", [([], "lora_"), (["--full"], "model.layers.0.")])
def test_tune_as_json(workspace, rankings, tmp_path, extra, trained, capsys):
    data = ["--model_name_or_path", str(workspace / "model"), "--dataset_name", str(workspace / "data.jsonl")]
    ranking = ["--importance", str(tmp_path / "ranking.json"), "--top_k", "1"]
    importance = ila().layer_importance()
    importance.scores = [1.0, 0.0, -1.0]
    importance.save(tmp_path / "ranking.json")
    main(["tune", *data, *ranking, "--json", "--output_dir", str(tmp_path / "out"), *TRAINING.split(), *extra])
    result = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trainable = sum(value.numel() for name, value in model.named_parameters() if trained in name)
    total = sum(value.numel() for value in model.parameters())
    assert result == {"written": [str(tmp_path / "out")], "trainable": trainable, "total": total, "steps": 6}


@pytest.mark.parametrize("flags", [["--load_in_4bit"], ["--gradient-checkpointing", "no", "--load_in_4bit=True"]])
def test_values_of_flags(flags):
    run, (args,) = parse(["convert", "a.json", *flags, "--top-k", "2"])
    assert run is convert and args.load_in_4bit is True and args.top_k == 2
    assert args.gradient_checkpointing is (len(flags) == 1)


def test_json_of_a_config_file(rankings, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("json: true\n")
    main(["compare", *rankings, "--config", str(tmp_path / "config.yaml")])
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 1


@pytest.mark.parametrize("progress", ["True", "False"])
def test_rank_as_json(workspace, tmp_path, progress, capsys):
    """The trainer's logs go to stderr, which it prints by one way or the other."""
    rank(workspace, tmp_path, "--json", "--disable_tqdm", progress)
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    importance = LayerImportance.load(tmp_path / "importance.json")
    probability = importance.probability(top_p=0.3)
    of_unit = {unit: i for i, unit in enumerate(importance.units)}
    assert result.pop("units") == [
        {
            "unit": unit,
            "score": importance.scores[of_unit[unit]],
            "gate": importance.gates[of_unit[unit]],
            "spread": importance.spread[of_unit[unit]],
            "probability_top_30": probability[unit],
        }
        for unit in importance.ranking()
    ]
    assert result == {
        "written": [str(tmp_path / name) for name in ("importance.json", "importance.png", "adapter")],
        "url": None,
        "stage_1": {"steps": 6, "stable": False},
        "learn_gates": importance.metadata["learn_gates"],
    }
    assert all(Path(path).exists() for path in json.loads(captured.out)["written"])
    assert "'loss'" in captured.err


def test_rank_shows_progress_and_what_to_type_next(workspace, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rank(workspace, tmp_path / "out 1")
    captured = capsys.readouterr()
    bars = captured.err.replace("\r", "\n").splitlines()
    # tqdm's "n/total [elapsed<left"
    assert [line for line in bars if re.search(r"\b[1-5]/6 \[\d\d:\d\d<\d\d:\d\d", line)]
    assert [line for line in bars if re.search(r"^Stage 2: .*\b[1-7]/8 \[\d\d:\d\d<\d\d:\d\d", line)]
    stage_2 = [line for line in captured.out.splitlines() if line.startswith("{'step'")]
    assert len(stage_2) == 8 and not any("learning_rate" in line for line in stage_2)
    assert "nan" not in captured.out + captured.err

    wrote, tune, convert = captured.out.splitlines()[-3:]
    assert wrote == f"Wrote {tmp_path}/out 1/importance.json, importance.png and adapter/."
    tuning = [*TRAINING.split(), "--eval_dataset_name", str(workspace / "data.jsonl"), "--eval_strategy", "epoch"]
    for line, start in ((convert, "  or: "), (tune, "Next: ")):
        program, *arguments = shlex.split(line.removeprefix(start))
        assert line.startswith(start) and program == "peft-ila"
        main([*arguments, *(tuning if arguments[0] == "tune" else [])])
    output = capsys.readouterr().out
    assert "Next, in Python: get_peft_model(base_model, LoraConfig.from_pretrained('LORA'))\n" in output
    assert re.search(r"^The last held-out loss was \d\.\d{4}\.\nWrote a LoRA adapter to TUNED", output, flags=re.M)
    assert output.endswith("Next, in Python: PeftModel.from_pretrained(base_model, 'TUNED')\n")
    config = LoraConfig.from_pretrained("LORA")
    assert config.layers_to_transform == LoraConfig.from_pretrained("TUNED").layers_to_transform
    get_peft_model(tiny_llama(), config)


def test_tune_is_told_what_rank_was(workspace, tmp_path, capsys, monkeypatch):
    """All that was passed and that both share, as a flag or from YAML; not where the results go."""
    importance = LayerImportance(UNITS, [4, 3, 2, 1], metadata={"stage_1": {}, "learn_gates": {"method": "descent"}})
    monkeypatch.setattr("peft_ila.workflows.sft.rank_by_sft", lambda *arguments: (importance, None))
    flags = (
        "--model_name_or_path M --dataset_name D --dataset_config C --max_length 32 --gradient_checkpointing False "
        "--trust_remote_code True --dtype bfloat16 --load_in_4bit True --bnb_4bit_quant_type fp4 --use_rslora True "
        "--use_dora True --lora_dropout 0.0 --loss_type dft --eos_token <eos> --learning_rate 0.001 --seed 7 "
        "--dataset_text_field body --eval_strategy epoch --eval_dataset_name E --lora_modules_to_save lm_head embed"
    )
    (tmp_path / "config.yaml").write_text("lora_r: 8\nlr_scheduler_kwargs: {num_cycles: 2}\ngate_steps: 9\n")
    own = (
        f"--config {tmp_path / 'config.yaml'} --output_dir {tmp_path / 'out'} --method descent --budget 0.5 "
        "--granularity module --lora_target_modules q_proj --lora_target_parameters experts.up_proj --run_name R "
        "--push_to_hub --hub_token SECRET --hub_model_id me/M --resume_from_checkpoint True"
    )
    main(["rank", *flags.split(), *own.split()])
    output = capsys.readouterr().out
    assert f"Wrote {tmp_path}/out/importance.json and adapter/." in output  # there is no picture here
    (line,) = [line for line in output.splitlines() if line.startswith("Next: ")]
    program, command, *passed = shlex.split(line.removeprefix("Next: "))
    assert (program, command) == ("peft-ila", "tune")
    start = ["--importance", f"{tmp_path}/out/importance.json", "--top_p", "0.3"]
    assert passed[:4] == start and passed[-2:] == ["--output_dir", "TUNED"]

    def options(arguments):
        return set(re.findall(r"--\w+(?: (?!--)\S+)*", " ".join(arguments)))

    assert options(passed[4:-2]) == options(flags.split()) | {'--lr_scheduler_kwargs {"num_cycles": 2}', "--lora_r 8"}
    importance.save(tmp_path / "out" / "importance.json")
    _, tuned = parse(["tune", *passed])
    assert tuned[1].lr_scheduler_kwargs == {"num_cycles": 2} and tuned[2].lora_modules_to_save == ["lm_head", "embed"]
    main(["rank", *flags.split(), *own.split(), "--json"])
    written = json.loads(capsys.readouterr().out)["written"]
    assert written == [f"{tmp_path}/out/{name}" for name in ("importance.json", "adapter")]


@pytest.mark.parametrize(
    "program, next_",
    [
        ("axolotl", "copy its lines into YOUR.yaml, then axolotl train YOUR.yaml"),
        ("llamafactory", "copy its lines into YOUR.yaml, then llamafactory-cli train YOUR.yaml"),
        ("trl", "trl sft --config {} --model_name_or_path MODEL --dataset_name DATA --output_dir TUNED"),
    ],
)
def test_what_to_do_with_a_recipe(rankings, tmp_path, program, next_, capsys):
    main(["convert", rankings[0], "--top_k", "2", "--output_dir", str(tmp_path), "--format", program])
    file = tmp_path / f"{program}.yaml"
    assert capsys.readouterr().out == f"Wrote {file}.\nNext: {next_.format(file)}\n"


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["compare", "--version", "a"], 2),
        (["plot", "a.json", "--outputs", "b.png"], 2),
        (["rank", "--granularity", "head"], 2),
        (["compare", "missing.json", "missing.json"], 1),
        (["convert", "missing.json", "--config", "missing.yaml"], 1),
    ],
)
def test_exit_codes(arguments, code, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    captured = capsys.readouterr()
    start = f"peft-ila {arguments[0]}: error: "
    assert captured.out == ""
    if code == 1:  # which is Python's for a text, that it prints
        assert exit_.value.code.startswith(start) and "\n" not in exit_.value.code
    else:
        assert exit_.value.code == code
        assert captured.err.startswith(f"usage: peft-ila {arguments[0]}")
        assert captured.err.splitlines()[-1].startswith(start)


def test_a_setting_of_a_config_file_that_is_unknown(rankings, tmp_path):
    (tmp_path / "config.yaml").write_text("outputs: b.png\n")
    with pytest.raises(SystemExit, match="config.* has unknown settings: outputs"):
        main(["plot", rankings[0], "--config", str(tmp_path / "config.yaml")])


def test_exit_codes_are_documented():
    page = (Path(__file__).parent.parent / "docs" / "terminal.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", page, flags=re.M))
    assert set(rows) == {"0", "1", "2", "130"}
