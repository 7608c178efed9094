"""The doctor's own run of the engine against the trainer."""

import pytest

from posttrain.doctor import trial
from posttrain.doctor.trial import trial_run


def test_sides_agree() -> None:
    rows, found = trial_run()
    assert found == []
    said = dict(rows)
    assert {"as loaded", "after a sync", "rotary embedding"} <= said.keys()
    assert int(said["drafting"].split()[0]) > 0


@pytest.mark.slow
def test_a_difference_is_wrong() -> None:
    """No two float32 programs agree to 1e-9, so the gate must speak."""
    rows, found = trial_run(tolerance=1e-9)
    assert [finding.kind for finding in found] == ["wrong"]
    assert "ParityError" in found[0].what
    assert "as loaded" not in dict(rows)


def test_whatever_is_raised_becomes_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ImportError("libtorch is missing")

    monkeypatch.setattr(trial, "_compare", broken)
    rows, found = trial_run()
    assert rows == []
    assert [finding.kind for finding in found] == ["wrong"]
    assert "ImportError: libtorch is missing" in found[0].what
