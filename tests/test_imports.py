"""Imports run downwards only: a room may use those below it, never one above or beside it."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (
    ("config", "interrupt", "versions"),
    ("environment", "storage"),
    ("hardware", "parallel"),
    ("kernels",),
    ("layers", "data"),
    ("models",),
    ("objectives",),
    ("step",),
    ("inference",),
    ("evaluation",),
    ("planner", "interop"),
    ("train",),
    ("doctor", "launch", "report", "search", "transfer"),
    ("bench",),
    ("cli",),
    ("__init__", "__main__"),
)
"""The house, from the ground up. Rooms of one floor do not know each other."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


@cache
def modules() -> list[tuple[str, str, ast.AST]]:
    """Room, file and tree of every module."""
    return list(_modules())


def _modules() -> Iterator[tuple[str, str, ast.AST]]:
    for path in sorted((ROOT / "stack").rglob("*.py")):
        parts = path.relative_to(ROOT / "stack").with_suffix("").parts
        yield parts[0], str(path.relative_to(ROOT)), ast.parse(path.read_text("utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of Stack that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "stack")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stack":
            assert node.level == 0, "imports are absolute"
            if node.module == "stack":
                yield from (f"stack.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_room_is_on_a_floor():
    assert {room for room, _, _ in modules()} == FLOOR_OF.keys()


@pytest.mark.parametrize("room", FLOOR_OF)
def test_imports_run_downwards_only(room):
    upward = [
        f"{file} imports {name}"
        for own, file, tree in modules()
        if own == room
        for name in imported(tree)
        if name.split(".")[1] != room and FLOOR_OF[name.split(".")[1]] >= FLOOR_OF[room]
    ]
    assert not upward


def test_an_import_that_runs_upwards_is_seen():
    tree = ast.parse(
        "def load():\n    from stack.train.trainer import Trainer\n    import stack.planner.plan"
    )
    assert list(imported(tree)) == ["stack.train.trainer", "stack.planner.plan"]
    assert all(FLOOR_OF[name.split(".")[1]] > FLOOR_OF["step"] for name in imported(tree))


@pytest.mark.parametrize(
    ("folder", "limit"), [("stack/models", 300), ("stack", 500), ("tests", 500), ("benchmarks", 500)]
)
def test_files_can_be_read_in_one_sitting(folder, limit):
    sizes = {path: path.read_text("utf-8").count("\n") for path in (ROOT / folder).rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > limit}


def test_the_trainer_is_short_and_knows_no_feature_by_name():
    text = (ROOT / "stack" / "train" / "trainer.py").read_text("utf-8")
    assert text.count("\n") <= 400
    for name in ("trigram", "nats_per_byte", "Comparison", "predict", "mfu", "MetricsLog", "Speedometer"):
        assert name not in text, name
