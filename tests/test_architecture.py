"""The order of imports, and the size of files and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "normwise"

# A file imports only from files of a lower rank, or of its own package. This table is the one place with the order.
RANKS = {
    "errors": 0,
    "transforms": 0,
    "whereabouts": 0,
    "pointwise": 1,
    "batches": 1,
    "record": 0,
    "pattern": 1,
    "sums": 1,
    "places": 1,
    "console": 1,
    "weight_files": 1,
    "moments": 2,
    "plan": 2,
    "untouched": 2,
    "masks": 3,
    "normalizers": 3,
    "recoveries": 3,
    "memory": 3,
    "elastic": 4,
    "spec": 4,
    "kernels": 4,
    "kernels.geometry": 4,
    "kernels.backends": 5,
    "kernels.reference": 5,
    "kernels.rows": 5,
    "kernels.launch": 5,
    "kernels.closed_form": 6,
    "kernels.gated": 6,
    "kernels.choose": 6,
    "kernels.prepared": 6,
    "kernels.cpu": 7,
    "kernels.short": 8,
    "kernels.gpu": 9,
    "kernels.short_cpu": 9,
    "kernels.prepare": 10,
    "kernels.operator": 11,
    "kernels.run": 12,
    "commit": 6,
    "holder": 7,
    "recalling": 7,
    "state": 8,
    "explain": 8,
    "remembering": 13,
    "norm": 14,
    "named": 15,
    "scan": 15,
    "functional": 15,
    "textbook": 15,
    "modes": 15,
    "layers": 16,
    "recurrent_cells": 16,
    "recurrent": 17,
    "surgery": 18,
    "diagnose": 19,
    "tuning": 20,
    "recipes": 20,
    "report": 21,
    "sources": 21,
    "study": 22,
    "model_commands": 22,
    "lessons": 22,
    "bench": 22,
    "commands": 23,
    "cli": 24,
    "__init__": 25,
}
PACKAGES = (
    "kernels.gpu",
    "surgery",
    "diagnose",
    "tuning",
    "report",
    "lessons",
    "bench",
)  # one rank for all of their files
LONGEST_FILE = 400
LONGEST_FUNCTION = 70

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """The module's name below normwise: "plan", "kernels.reference", "kernels" for a package's __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def known_as(module: str) -> str:
    """The entry of the table that a module falls under."""
    return next((package for package in PACKAGES if module == package or module.startswith(f"{package}.")), module)


def imported(path: Path) -> Iterator[str]:
    """The modules of normwise that a file imports, anywhere in it, except for type checking only."""
    tree = ast.parse(path.read_text())
    for node in _walk(tree):
        if isinstance(node, ast.Import):
            yield from (_below(alias.name) for alias in node.names if alias.name.startswith("normwise"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("normwise"):
            yield from (_resolve(node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path.name} line {node.lineno}: imports are absolute here")


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _walk(child)


def _below(module: str) -> str:
    return module.removeprefix("normwise").lstrip(".") or "__init__"


def _resolve(module: str, name: str) -> str:
    """`from normwise.a import b` imports the module a.b if there is one, and otherwise a name of a."""
    inner = f"{_below(module)}.{name}".removeprefix("__init__.")
    path = PACKAGE / inner.replace(".", "/")
    return inner if path.with_suffix(".py").exists() or path.is_dir() else _below(module)


def test_every_file_has_a_rank() -> None:
    unknown = [module for path in FILES if known_as(module := module_of(path)) not in RANKS]
    assert unknown == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    own = known_as(module_of(path))
    for module in imported(path):
        other = known_as(module)
        if not (other == own and own in PACKAGES):
            assert RANKS[other] < RANKS[own], f"{own} (rank {RANKS[own]}) imports {other} (rank {RANKS[other]})"


def test_the_language_knows_no_torch() -> None:
    tree = ast.parse((PACKAGE / "pattern.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in names | froms if (name or "").startswith("torch")]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    if "kernels" in path.parts:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = _code_lines(node)
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


def _code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return total - ((first.end_lineno or 0) - first.lineno + 1 if documented else 0)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_user_input_is_not_checked_by_assert(path: Path) -> None:
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
