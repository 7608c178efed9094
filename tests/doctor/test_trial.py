"""The doctor's own run of engine against trainer, in a process of its own as the command does it."""

import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.doctor import trial as module
from posttrain.doctor.trial import trial

ROOT = Path(__file__).resolve().parents[2]


def test_sides_agree_and_a_fault_is_wrong() -> None:
    """One process, two trials: 1e-4 is kept; no float32 run keeps 1e-9, so that the gate must speak."""
    code = (
        "from posttrain import environment; environment.prepare()\n"
        "from posttrain.doctor.trial import trial\n"
        "for tolerance in (1e-4, 1e-9):\n"
        "    rows, found = trial(tolerance)\n"
        "    print(len([r for r in rows if 'log-probs differ' in r[1]]), [f.kind for f in found])\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert shown.stdout.splitlines()[-2:] == ["2 []", "0 ['wrong']"], shown.stdout + shown.stderr


def test_whatever_is_raised_becomes_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ImportError("libtorch is missing")

    monkeypatch.setattr(module, "_compare", broken)
    rows, found = trial()
    assert rows == []
    assert [f.kind for f in found] == ["wrong"]
    assert "ImportError: libtorch is missing" in found[0].what
