"""
A part of the tests on each Python, with the oldest packages that `pyproject.toml` allows and with the newest ones.

    make test-matrix                    # all that has not passed yet
    python tests/matrix.py --again 3.12

Oldest is each floor itself, newest is `constraints.txt`. An environment lies in `.matrix/` while its tests run; what
came of it stays there as JSON, beside a log, and all of them together make `docs/versions.md`. The Pythons are pyenv's
or those on the PATH.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import IO

import tomllib

ROOT = Path(__file__).parents[1]
MATRIX = ROOT / ".matrix"
PAGE = ROOT / "docs" / "versions.md"
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
EXTRAS = ["trl", "bitsandbytes", "plot"]
SHOWN = ["torch", "transformers", "peft", "accelerate", "huggingface_hub", "trl", "datasets", "bitsandbytes"]
TESTS = """
tests/tuner/test_registration.py
tests/tuner/test_config.py
tests/tuner/test_layer.py
tests/tuner/test_model.py
tests/tuner/test_peft_parity.py
tests/tuner/test_quantization.py
tests/search/test_gates.py::test_both_stages
tests/search/test_gates.py::test_the_layer_that_was_tuned_wins
tests/search/test_gates.py::test_the_scores_are_what_each_unit_is_worth_at_the_base_model
tests/search/test_gates.py::test_gates_are_learned_on_the_dpo_loss
tests/search/test_untrained.py::test_the_whole_of_rank_without_stage_1
tests/export/test_lora.py::test_an_exported_adapter_is_plain_lora_with_the_same_outputs
tests/export/test_lora.py::test_layers_become_layers_to_transform
tests/export/test_lora.py::test_other_methods_of_peft
tests/export/test_adapters.py
tests/ranking/test_importance.py
tests/ranking/test_plotting.py
tests/test_files.py
tests/test_units.py
tests/test_terminal.py::test_help_fits_two_screens
tests/test_terminal.py::test_exit_codes
tests/test_terminal.py::test_rank_as_json
tests/test_readme.py::test_the_commands_are_known
""".split()
HEAD = """\
# Versions

`make test-matrix` writes this page. It runs a part of the tests on the Pythons of one machine without a GPU, with the
oldest packages that `pyproject.toml` allows and with the newest ones that were verified (`constraints.txt`).
"""


def interpreter(version: str) -> str | None:
    """Pyenv's before the PATH's, where pyenv puts a `python3.10` that may only say that it is not chosen."""
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(installed[-1]) if installed else shutil.which(f"python{version}")


def floors() -> str:
    """The dependencies and `EXTRAS` as constraints, each at its floor."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in EXTRAS for line in project["optional-dependencies"][extra]),
    ]
    return "\n".join(line.replace(">=", "==") for line in wanted if ">=" in line)


def install(python: str, kind: str, place: Path, log: IO[str]) -> str:
    """A new environment with the package; its Python."""
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([python, "-m", "venv", place], check=True)
    python = str(place / "bin" / "python")
    constraints = ROOT / "constraints.txt"
    if kind == "oldest":
        constraints = place / "floors.txt"
        constraints.write_text(floors())
    package = f".[{','.join(EXTRAS)}]"
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--no-compile",
        "-c",
        constraints,
        "-e",
        package,
        "pytest",
        "hypothesis",
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
    return python


def attempt(python: str, report: Path, log: IO[str]) -> dict:
    """The versions in an environment, and what its tests came to."""
    command = [python, "-m", "pytest", f"--junitxml={report}", *TESTS]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
    outcomes = {"passed": [], "failure": [], "error": [], "skipped": []}
    for case in ET.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in outcomes), "passed")
        outcomes[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    packages = json.loads(output(python, "-m", "pip", "list", "--format=json"))
    return {
        "python": output(python, "-c", "import platform; print(platform.python_version())").strip(),
        "versions": {package["name"].replace("-", "_"): package["version"] for package in packages},
        "passed": len(outcomes["passed"]),
        "failed": outcomes["failure"] + outcomes["error"],
        "skipped": len(outcomes["skipped"]),
    }


def output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def table() -> str:
    """What every combination tried so far came to."""
    text = f"| Python | packages | {' | '.join(SHOWN)} | passed | failed | skipped |\n"
    text += "|---" * (len(SHOWN) + 5) + "|\n"
    notes = ""
    for version in PYTHONS:
        for kind in ("oldest", "newest"):
            path = MATRIX / f"{version}-{kind}.json"
            if not path.exists():
                continue
            came = json.loads(path.read_text())
            versions = [came["versions"].get(package, "") for package in SHOWN]
            counts = [str(came["passed"]), str(len(came["failed"])), str(came["skipped"])]
            text += f"| {' | '.join([came['python'], kind, *versions, *counts])} |\n"
            notes += "".join(f"\n- Python {version}, {kind}: `{name}`" for name in came["failed"])
    return text + (f"\nWhat failed:\n{notes}\n" if notes else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", default=PYTHONS, help="for example 3.12; all if none is given")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    args = parser.parse_args()

    MATRIX.mkdir(exist_ok=True)
    bad = []
    for version in args.pythons:
        found = interpreter(version)
        if found is None:
            print(f"Python {version} is not on this machine.")
            continue
        for kind in ("newest", "oldest"):
            name = f"{version}-{kind}"
            place, path, log_path = MATRIX / name, MATRIX / f"{name}.json", MATRIX / f"{name}.log"
            if path.exists() and not json.loads(path.read_text())["failed"] and not args.again:
                continue
            print(f"Python {version}, {kind} packages: {log_path}", flush=True)
            path.unlink(missing_ok=True)
            try:
                with log_path.open("w") as log:
                    came = attempt(install(found, kind, place, log), place / "report.xml", log)
                path.write_text(json.dumps(came))
                if came["failed"]:
                    bad.append(f"{name}: tests failed, {log_path}")
            except (
                subprocess.CalledProcessError,
                FileNotFoundError,
            ) as error:  # no environment, or no report
                bad.append(f"{name}: {error}, {log_path}")
            finally:
                shutil.rmtree(place, ignore_errors=True)
    PAGE.write_text(f"{HEAD}\n{table()}", encoding="utf-8")
    print(table())
    print("\n".join(bad))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
