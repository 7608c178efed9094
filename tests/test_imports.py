"""Which room may import which, and what may be imported without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "posttrain").rglob("*.py"), *(ROOT / "rewards").rglob("*.py")])

# A room imports only from rooms above it in this list ...
ROOMS = [
    "environment",
    "report",
    "recipe",
    "tasks",
    "gold",
    "preflight",
    "policy",
    "rollout",
    "footprint",
    "evaluate",
    "mismatch",
    "training",
    "dryrun",
    "doctor",
    "cli",
    "__main__",
]
# ... and these from fewer still: the policy stands alone, the engine knows the policy only.
FEWER = {"policy": set(), "rollout": {"environment", "policy"}}
NO_REWARDS = {"environment", "report", "policy", "rollout"}

HEAVY = {"torch", "transformers", "trl", "vllm", "accelerate", "peft"}
LIGHT = {"environment", "report", "recipe"}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write imports absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "rewards" if parts[0] == "rewards" else parts[1]


def allowed(room: str) -> set[str]:
    above = FEWER.get(room, set(ROOMS[: ROOMS.index(room)]))
    return above | {room}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        assert not [name for name in imported(path) if name.startswith("posttrain")]
        return
    assert room in {*ROOMS, "rewards"}, f"{room} is not a room yet: add it to ROOMS, in its place"
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package == "posttrain":
            assert room != "rewards", f"rewards must not import {name}"
            other = rest.partition(".")[0]
            assert other in allowed(room), f"{room} must not import {name}"
        if package == "rewards":
            assert room not in NO_REWARDS, f"{room} must not import {name}"
        if package in HEAVY:
            assert room not in {*LIGHT, "rewards"}, f"{room} must do without {name}"


def test_every_room_stands() -> None:
    missing = [
        room
        for room in ROOMS
        if not (ROOT / "posttrain" / room).is_dir()
        and not (ROOT / "posttrain" / f"{room}.py").is_file()
    ]
    assert not missing, f"no such room any more: {missing}"


@pytest.mark.parametrize("module", ["posttrain.recipe", "posttrain.cli", "rewards.math"])
def test_imports_without_torch(module: str) -> None:
    """Not by way of a third package either: a wrong recipe is refused before anything heavy loads."""
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == []
