"""
Run PEFT's own test suites for LoRA and with ILA in its place, and list the cases that differ.

    pip download --no-deps --no-binary :all: --no-build-isolation peft==0.21.2
    tar xzf peft-0.21.2.tar.gz
    python -m benchmarks.peft_suites.run --tests peft-0.21.2/tests --output benchmarks/results/peft_suites.json

The tests run offline, on tiny random stand-ins for the models of the hub. They need the extra `dev`, and
`parameterized`, `scipy`, `attrs` and `scikit-learn`. 40 minutes on 2 cores; `--files test_config test_auto` runs only
these.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.peft_suites.plugin import REFUSED, build_hub
from benchmarks.record import save

FILES = """
    test_custom_models test_decoder_models test_encoder_decoder_models test_feature_extraction_models
    test_seq_classifier test_token_classification_qa test_vision_models test_initialization test_config
    test_low_level_api test_other test_tuners_utils test_mapping test_auto test_lora_conversion test_lora_variants
    test_target_parameters test_trainable_tokens test_torch_compile test_loraplus test_lorafa test_helpers
    test_hub_features test_mixed
""".split()


def run(tests: Path, file: str, method: str, *, hub: Path) -> dict[str, tuple[str, str]]:
    """The outcome of each case ("passed", "failed", "skipped" or "refused") and its message."""
    root = Path(__file__).resolve().parents[2]
    report = hub.parent / f"{file}-{method}.xml"
    path = os.pathsep.join([*map(str, (tests.parent, root)), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PEFT_SUITES_METHOD": method,
        "PYTHONPATH": path,
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    plugins = "-p benchmarks.peft_suites.plugin -p no:cacheprovider"
    options = f"-q {plugins} --tb=short -c {os.devnull} --rootdir {tests.parent}"
    subprocess.run(
        [sys.executable, "-m", "pytest", *options.split(), f"--junitxml={report}", tests / f"{file}.py"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=hub.parent,
    )
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}".removeprefix("tests.")
        name = name.replace("ILAConfig", "LoraConfig").replace("_ILA_", "_Lora_")
        outcome, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                message = child.get("message", "")
                if message.startswith(REFUSED):
                    outcome = "refused"
        outcomes[name] = (outcome, message)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, required=True, help="the folder `tests` of PEFT's sdist")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--files", nargs="+", default=FILES, choices=FILES, metavar="FILE", help="by default all")
    args = parser.parse_args()

    suites, differs = {}, {}
    print("| file | LoRA passed | ILA passed | refused by ILA | differs |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        hub = Path(folder) / "hub"
        build_hub(hub)
        tests = Path(shutil.copytree(args.tests, Path(folder) / "tests"))
        (tests / "__init__.py").touch()  # the sdist leaves it out
        # the one option that ILA refuses in a module's body, where it would take the whole file along
        compiled = tests / "test_torch_compile.py"
        compiled.write_text(re.sub(r'\n    "dora": .*', "", compiled.read_text()))
        for file in args.files:
            with ThreadPoolExecutor() as pool:
                lora, ila = pool.map(partial(run, tests, file, hub=hub), ("LORA", "ILA"))
            passed = [name for name, (outcome, _) in lora.items() if outcome == "passed"]
            then = Counter(ila.get(name, ("missing", ""))[0] for name in passed)
            suites[file] = {
                "LoRA": Counter(outcome for outcome, _ in lora.values()),
                "ILA, of the cases that pass for LoRA": then,
            }
            for name in passed:
                outcome, message = ila.get(name, ("missing", ""))
                if outcome not in ("passed", "refused"):
                    differs[name] = f"{outcome}: {message[:300]}"
            different = len(passed) - then["passed"] - then["refused"]
            print(f"| {file} | {len(passed)} | {then['passed']} | {then['refused']} | {different} |", flush=True)
    for name, message in differs.items():
        print(f"\n{name}\n    {message}")
    if args.output:
        save(args.output, {"suites": suites, "differs": differs})


if __name__ == "__main__":
    main()
