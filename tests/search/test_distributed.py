"""Two gloo processes on the CPU, started by `accelerate launch`, against one process on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import distributed_script
import pytest
from accelerate.utils import DistributedType
from conftest import tiny_llama
from peft import PeftModel
from trainers import write_model_and_data

from peft_ila import LayerImportance, learn_gates, prune
from peft_ila.cli import main

ENGINES = Path(__file__).parents[2] / "benchmarks" / "engines"


def launch(engine: str, *arguments: str) -> subprocess.CompletedProcess:
    # not by `--cpu`, with which accelerate starts one process whatever the configuration says
    tests = str(Path(__file__).parents[1])
    env = {
        **os.environ,
        "PYTHONPATH": tests,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    options = ["--config_file", str(ENGINES / f"{engine}.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    distributed_script.main(output)
    return json.loads((output / "rank_0.json").read_text())


@pytest.mark.parametrize(
    "engine, name",
    [
        pytest.param("ddp", "DistributedType.MULTI_CPU", marks=pytest.mark.support("Engines", "DDP, both stages")),
        pytest.param("fsdp2", "FSDP2", marks=pytest.mark.support("Engines", "FSDP2, both stages")),
    ],
)
def test_two_processes_equal_one(tmp_path, single, engine, name):
    process = launch(engine, distributed_script.__file__, str(tmp_path))
    assert process.returncode == 0, process.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert first == second  # the same stop and, bit for bit, the same scores
    for mode, result in first.items():
        assert (result["engine"], result["world_size"]) == (name, 2)
        assert result["batch_size"] == single[mode]["batch_size"] == 8
        assert result["stopped_at"] == single[mode]["stopped_at"]
        assert result["loss_closed"] == pytest.approx(single[mode]["loss_closed"], rel=1e-4)
        assert result["scores"] == pytest.approx(single[mode]["scores"], abs=2e-3)
        assert result["untrained"] == pytest.approx(single[mode]["untrained"], abs=2e-3)
        assert result["descent"] == pytest.approx(single[mode]["descent"], abs=2e-2)
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path / mode / "adapter")
        assert model.layer_importance().scores == result["scores"]
    assert first["open"]["stopped_at"] is not None


@pytest.mark.support("Engines", "`accelerate launch` of `peft-ila rank`")
def test_rank_by_accelerate_launch(tmp_path, tokenizer, dialogues):
    write_model_and_data(tmp_path, tokenizer, dialogues)

    def arguments(output, batch):
        data = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data.jsonl")]
        options = "--learning_rate 2e-2 --max_steps 6 --report_to none --disable_tqdm True --lora_r 4 --lora_dropout 0"
        steps = [
            "--per_device_train_batch_size",
            batch,
            "--gate_steps",
            "4",
            "--use_cpu",
            "True",
            "--method",
            "attribution",
        ]
        return ["peft_ila.cli", "rank", *data, "--output_dir", str(tmp_path / output), *options.split(), *steps]

    main(arguments("one", "8")[1:])
    process = launch("ddp", "-m", *arguments("two", "4"))
    assert process.returncode == 0, process.stderr[-4000:]
    one, two = (LayerImportance.load(tmp_path / output / "importance.json") for output in ("one", "two"))
    assert two.metadata["learn_gates"]["batch_size"] == one.metadata["learn_gates"]["batch_size"] == 8
    assert two.scores == pytest.approx(one.scores, abs=2e-3)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "two" / "adapter")
    assert model.layer_importance().scores == two.scores


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("zero2", marks=pytest.mark.support("Engines", "DeepSpeed ZeRO-2, stage 1")),
        pytest.param("zero3", marks=pytest.mark.support("Engines", "DeepSpeed ZeRO-3, stage 1")),
    ],
)
def test_deepspeed_trains_stage_1_and_says_where_stage_2_runs(tmp_path, engine):
    pytest.importorskip("deepspeed")
    process = launch(engine, distributed_script.__file__, str(tmp_path))
    assert process.returncode != 0
    assert "'train_runtime'" in process.stdout
    assert "`learn_gates` and `prune` do not run under DeepSpeed" in process.stderr


@pytest.mark.parametrize(
    "kind, is_fsdp2, message",
    [
        pytest.param(
            DistributedType.DEEPSPEED,
            False,
            "under DeepSpeed",
            marks=pytest.mark.support("Engines", "DeepSpeed, stage 2", refused=True),
        ),
        pytest.param(
            DistributedType.FSDP,
            False,
            "under FSDP1",
            marks=pytest.mark.support("Engines", "FSDP1, stage 2", refused=True),
        ),
    ],
)
def test_engines_without_stage_2(kind, is_fsdp2, message):
    accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=is_fsdp2)
    with pytest.raises(ValueError, match=message):
        learn_gates(SimpleNamespace(accelerator=accelerator))


def test_sharded_adapters_are_not_pruned():
    with pytest.raises(ValueError, match="prune it in one process or under DDP"):
        prune(SimpleNamespace(accelerator=SimpleNamespace(is_fsdp2=True)))
