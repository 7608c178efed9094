"""`Limits`: what it refuses, and how many processes there are."""

from typing import Any

import pytest

from rewards import Limits, RewardError
from rewards.processes import scorer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": 0}, "`seconds` is 0; give a number of seconds above 0"),
        ({"seconds": float("inf")}, "`seconds` is inf"),
        ({"seconds": True}, "`seconds` is True"),
        ({"seconds": "2"}, "`seconds` is '2'"),
        ({"failed": float("nan")}, "`failed` is nan; give a finite number"),
        ({"failed": "0"}, "`failed` is '0'"),
        ({"workers": 0}, "`workers` is 0; give a whole number of at least 1"),
        ({"workers": 1.5}, "`workers` is 1.5"),
    ],
)
def test_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Limits(**fields)


@pytest.mark.parametrize(
    ("processors", "trainers", "expected"), [(2, "", 2), (64, "", 8), (64, "16", 4), (4, "8", 1)]
)
def test_default_workers(
    monkeypatch: pytest.MonkeyPatch, processors: int, trainers: str, expected: int
) -> None:
    monkeypatch.setattr(scorer.os, "sched_getaffinity", lambda pid: set(range(processors)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", trainers)
    assert scorer.default_workers() == expected
