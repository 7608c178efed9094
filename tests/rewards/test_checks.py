"""`check_values`: what a reward may return."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from rewards import RewardError, check_values, load


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 0.5, True], [1.0, 0.5, 1.0]),
        ((None, -2.0, None), [None, -2.0, None]),
        (np.array([1.0, 2.0, 3.0], dtype=np.float32), [1.0, 2.0, 3.0]),
        ((float(x) for x in range(3)), [0.0, 1.0, 2.0]),
        ([Fraction(1, 4), np.int64(2), np.float32(0.5)], [0.25, 2.0, 0.5]),
    ],
)
def test_numbers_and_none_pass(values: Any, expected: list[float | None]) -> None:
    checked = check_values("mine", values, 3)
    assert checked == expected
    assert all(value is None or type(value) is float for value in checked)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "returned 2 values for 3 completions; return exactly one for each"),
        ([1.0] * 4, "returned 4 values for 3 completions"),
        ([1.0, math.nan, 1.0], "returned nan for completion 1; return a finite number, or None"),
        ([1.0, 1.0, -math.inf], "returned -inf for completion 2"),
        ([1.0, "high", 1.0], "returned 'high' for completion 1; return a number"),
        ([1.0, "1.0", 1.0], "returned '1.0' for completion 1"),
        ([1.0, [1.0], 1.0], r"returned \[1\.0\] for completion 1"),
        (1.0, "returned float 1.0; return a list"),
        (None, "returned NoneType None; return a list"),
        ("abc", "returned str 'abc'"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "returned dict"),
        ([10**400, 0, 0], "for completion 0"),
    ],
)
def test_anything_else_is_refused_by_name(values: Any, message: str) -> None:
    with pytest.raises(RewardError, match=f"reward 'mine' .*{message}"):
        check_values("mine", values, 3)


def test_loaded_reward_is_checked(tmp_path: Any) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def short(completions, **columns):\n    return [1.0]\n")
    with pytest.raises(RewardError, match="reward 'short' returned 1 values for 2 completions"):
        load(f"{path}:short")(completions=["a", "b"])
