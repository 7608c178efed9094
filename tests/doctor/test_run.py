"""The report and its exit code."""

from dataclasses import replace

import pytest

from posttrain import doctor
from posttrain.doctor.findings import Finding
from posttrain.doctor.machine import Machine


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine, its findings and the trial replaced: sound unless a test says otherwise."""
    machine = replace(Machine.look(), environ={})
    monkeypatch.setattr(doctor.Machine, "look", classmethod(lambda cls: machine))
    monkeypatch.setattr(doctor, "trial_run", lambda: ([("as loaded", "1e-06 nats")], []))
    monkeypatch.setattr(doctor, "findings", lambda _: iter([Finding("slow", "no GPU")]))
    return machine


def test_sound(here: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run() == 0
    shown = capsys.readouterr().out
    assert f"torch {here.packages['torch']}" in shown
    assert "slow here\n  - no GPU\n" in shown
    assert shown.endswith("nothing is wrong\n")


def test_wrong(
    here: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor, "trial_run", lambda: ([], [Finding("wrong", "they differ", "look")])
    )
    assert doctor.run() == 1
    shown = capsys.readouterr().out
    assert shown.endswith("wrong\n  - they differ\n    remedy: look\n1 wrong\n")
