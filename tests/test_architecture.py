"""The house rules: imports go one way, functions are short, each module says what it is for."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "peft_ila"
# Each may import from those before it and from itself; docs/architecture.md says why.
ORDER = [
    "version",
    "choices",
    "files",
    "units",
    "measure",
    "embedded",
    "export",
    "ranking",
    "tuner",
    "search",
    "workflows",
    "cli",
    "__main__",
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path) -> set[Path]:
    """The modules of the package that a module imports, lazily or not, for types or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for target in [base, *(base / alias.name for alias in node.names)]:
                found |= {file for file in (target.with_suffix(".py"), target / "__init__.py") if file.exists()}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any((name or "").startswith("peft_ila") for name in names), "imports within are relative"
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    assert room(path) in ORDER
    later = {str(other) for other in imported(path) if ORDER.index(room(other)) > ORDER.index(room(path))}
    assert not later


def test_there_is_no_circle_within_a_room():
    graph = {path: imported(path) - {path} for path in MODULES}
    while graph:  # remove modules that import nothing that is left
        free = [path for path, others in graph.items() if not others & graph.keys()]
        assert free, f"a circle among {sorted(map(str, graph))}"
        for path in free:
            del graph[path]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_say_what_they_are_for_and_functions_are_short(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno + 1 <= 60, node.name
