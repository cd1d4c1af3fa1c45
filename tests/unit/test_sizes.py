"""Nothing grows out of what a reader can hold: files, classes, functions, calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for room in ("db", "workers", "orchestrator")
    for path in (ROOT / room).rglob("*.py")
    if "migrations" not in path.parts  # a table is a statement, however long
)
MOST_LINES_OF_A_FILE = 350
MOST_LINES_OF_A_CLASS = 200
MOST_LINES_OF_A_BODY = 45  # a command's options stand above its body
MOST_POSITIONAL = 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_its_classes_and_functions_stay_readable(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    own_names = {definition.name for definition in functions(tree)}

    assert source.count("\n") <= MOST_LINES_OF_A_FILE
    assert [c.name for c in ast.walk(tree) if isinstance(c, ast.ClassDef) and lines(c) > MOST_LINES_OF_A_CLASS] == []
    assert [f.name for f in functions(tree) if body_lines(f) > MOST_LINES_OF_A_BODY] == []
    assert [f"{path.name}:{call.lineno}" for call in long_calls(tree, own_names)] == []


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def body_lines(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.body[0].lineno + 1


def long_calls(tree: ast.AST, own_names: set[str]) -> Iterator[ast.Call]:
    """Calls of the file's own functions with too many positional arguments, those that take any number left out."""
    any_number = {f.name for f in functions(tree) if f.args.vararg}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in own_names - any_number:
                yield node
