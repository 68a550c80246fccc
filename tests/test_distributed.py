"""Two gloo processes on the CPU against one process on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "distributed_script.py"


def run(output: Path, processes: int, mode: str) -> list[dict]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    )
    command = [sys.executable, *launcher, str(SCRIPT), str(output), mode]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((output / f"rank_{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("mode", ["open", "joint"])
def test_two_processes_equal_one(tmp_path, mode):
    (single,) = run(tmp_path / "one", 1, mode)
    first, second = run(tmp_path / "two", 2, mode)
    assert first["world_size"] == 2 and first["batch_size"] == single["batch_size"] == 8
    assert first == second  # the same stop and, bit for bit, the same scores
    assert first["stopped_at"] == single["stopped_at"] is not None
    assert first["penalty"] == pytest.approx(single["penalty"], rel=1e-3)
    assert first["scores"] == pytest.approx(single["scores"], abs=2e-3)
