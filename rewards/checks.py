"""What a reward may return: one finite number, or None, for each completion."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rewards.errors import RewardError


def check_values(name: str, values: Any, count: int, first: int = 0) -> list[float | None]:
    """`values`, returned by reward `name` for `count` completions, as a checked list.

    Numbers become floats (bool, numpy and 0-d tensor scalars too); None passes through and means
    "does not apply". Raises RewardError, naming the reward and the fix, for anything that is not a
    sequence of `count` finite numbers or None. `first` is the number of the first completion, where
    they are a part of a batch.

    >>> check_values("mine", [1, None, True], 3)
    [1.0, None, 1.0]
    """
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise RewardError(
            f"reward '{name}' returned {type(values).__name__} {values!r:.60}; "
            "return a list with one number, or None, for each completion"
        )
    values = list(values)
    if len(values) != count:
        raise RewardError(
            f"reward '{name}' returned {len(values)} values for {count} completions; "
            "return exactly one for each, in the same order (None where it does not apply)"
        )
    return [
        None if value is None else _finite(name, row, value)
        for row, value in enumerate(values, first)
    ]


def _finite(name: str, row: int, value: Any) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RewardError(
            f"reward '{name}' returned {value!r:.60} for completion {row}; "
            "return a number, or None where it does not apply"
        ) from None
    if not math.isfinite(number):
        raise RewardError(
            f"reward '{name}' returned {number} for completion {row}; return a finite number, "
            "or None where it does not apply"
        )
    return number
