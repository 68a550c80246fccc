"""
How long does it take to use a ranking of 10,000 units?

    python -m benchmarks.cost.scale --output benchmarks/results/scale.json

CPU seconds of one thread, and the memory that the heatmap adds to the process. Half a minute.
"""

import argparse
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401  not timed as part of the drawing

from benchmarks.record import save
from peft_ila import LayerImportance
from peft_ila.ranking.table import ranking_table

LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEAR += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def rankings() -> dict[str, LayerImportance]:
    """1,429 layers of 7 modules, 10,000 layers, and 1,000 modules outside every stack of layers."""
    modules = {
        "1,429 × 7 modules": {f"model.layers.{i}.{name}": [] for i in range(1429) for name in LINEAR},
        "10,000 layers": {f"model.layers.{i}": [f"model.layers.{i}.{name}" for name in LINEAR] for i in range(10_000)},
        "1,000 names": {f"head_{i}": [] for i in range(1000)},
    }
    chance = random.Random(0)
    return {
        name: LayerImportance(
            list(own),
            [chance.gauss(0, 1) for _ in own],
            modules={unit: names or [unit] for unit, names in own.items()},
            spread=[0.1] * len(own),
        )
        for name, own in modules.items()
    }


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    for name, importance in rankings().items():
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "importance.json"
            importance.save(path)
            actions: dict[str, Callable[[], Any]] = {
                "load": lambda path=path: LayerImportance.load(path),
                "select": lambda importance=importance: importance.select(top_p=0.3),
                "probability": lambda importance=importance: importance.probability(top_p=0.3),
                "table": lambda importance=importance: ranking_table(importance),
                "conversion": lambda importance=importance: importance.to_lora_config(top_p=0.3),
                "heatmap": lambda importance=importance, path=path: importance.plot(path.with_suffix(".png")),
            }
            own: dict[str, float] = {}
            for action, run in actions.items():
                before, start = peak(), time.process_time()
                run()
                own[action] = time.process_time() - start
            own["bytes of the heatmap"] = peak() - before
        figures[name] = own
        seconds = ", ".join(f"{action} {own[action]:.2f} s" for action in actions)
        print(f"{name}: {seconds}, {own['bytes of the heatmap'] / 1e6:.0f} MB")
    if args.output:
        save(args.output, figures)


if __name__ == "__main__":
    main()
