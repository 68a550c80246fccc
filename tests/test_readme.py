"""What the README and the quick start show, runs; the commands of all pages are known."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import tiny_llama, tiny_tokenizer
from peft import PeftConfig

from peft_ila import LayerImportance
from peft_ila.cli import parse

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture
def printed_last(tmp_path, monkeypatch, capsys):
    """Runs an example as it stands, but on a small model of as many layers in SmolLM2's place."""
    model = tiny_llama(layers=30, vocab_size=len(tiny_tokenizer()))
    directory = tmp_path / "cache" / "SmolLM2-135M-Instruct"
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    monkeypatch.setenv("PEFT_ILA_CACHE", str(directory.parent))
    monkeypatch.chdir(tmp_path)

    def run(example):
        exec(example, {})
        return capsys.readouterr().out.splitlines()[-1]

    return run


def test_the_python_example_runs(printed_last, tmp_path):
    (example,) = blocks("python")
    kept, layers = printed_last(example).removesuffix("]").split(" [")
    assert kept.startswith("Kept(share=0.1, ")
    assert layers.count(",") == 8  # nine of thirty layers
    assert PeftConfig.from_pretrained(str(tmp_path / "SMALL")).peft_type == "LORA"


def test_the_example_of_the_quick_start_runs(printed_last, tmp_path):
    example, _ = blocks("python", DOCS / "quickstart.md")
    last = printed_last(example)
    assert "['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']" in last
    assert last.split("]")[0].count(",") == 8
    assert (tmp_path / "importance.json").exists() and (tmp_path / "importance.png").exists()


def test_the_commands_are_known(monkeypatch):
    ranking = LayerImportance([f"model.layers.{i}" for i in range(30)], list(map(float, range(30))))
    monkeypatch.setattr("peft_ila.cli.LayerImportance.load", lambda path: ranking)
    text = "\n".join(code for page in [README, *DOCS.rglob("*.md")] for code in blocks("bash", page))
    text = text.replace("\\\n", " ").replace("tune ... ", "tune --importance R --top_p 0.3 ... ")
    text = text.replace(" ... ", " --model_name_or_path M --dataset_name D ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines()]
    commands = [command for command in commands if command[:1] == ["peft-ila"]]
    assert {command[1] for command in commands} >= {"rank", "convert", "tune", "export", "compare", "plot", "plan"}
    for command in commands:
        parse(command[1:])


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.M)
    assert targets == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_pythons_that_the_package_names_were_seen():
    project = (ROOT / "pyproject.toml").read_text()
    page = (ROOT / "docs" / "versions.md").read_text()
    rows = re.findall(r"^\| (3\.\d+)\.\d+ \|.* \| (\d+) \| \d+ \|$", page, flags=re.M)
    assert {failed for _, failed in rows} == {"0"}
    named = re.findall(r"Python :: (3\.\d+)", project)
    assert named == list(dict.fromkeys(version for version, _ in rows))
    assert f'requires-python = ">={named[0]}"' in project


def test_every_file_is_on_the_map():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "peft_ila").rglob("*.py"):
        assert path.stem.startswith("__") or f"`{path.stem}`" in page or f"{path.name}`" in page, path.name


def headings(document: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    return re.findall(r"^#+ (.+)$", text, flags=re.M)


def test_links_inside_the_repository_resolve():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    for document in documents:
        for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]+))?\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                path = document.parent / target if target else document
                assert path.exists(), f"{document.name}: {target}"
                # as GitHub and MkDocs make them of headings
                anchors = (
                    [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings(path)] if anchor else []
                )
                assert not anchor or anchor in anchors or path.parent.name == "reference", f"{document.name}: {anchor}"


def test_what_pages_include_exists():
    marks = [
        mark for page in (ROOT / "docs").glob("*.md") for mark in re.findall("<!-- include (.+) -->", page.read_text())
    ]
    assert len(marks) == 8
    for file, _, heading in (mark.partition(": ") for mark in marks):
        assert not heading or heading in headings(ROOT / file), f"{file}: {heading}"
