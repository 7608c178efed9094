r"""`length`: 0 for a completion within bounds, then a penalty that grows to -1 (DAPO)."""

from collections.abc import Sequence
from typing import Any

from rewards.errors import RewardError


def length_reward(
    completions: list[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_length: int | None = None,
    cache: int | None = None,
    **columns: Any,
) -> list[float]:
    r"""The soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), in tokens.

    With $L$ = `max_length` and $C$ = `cache`, a completion of $n$ tokens gets

        0                   if n <= L - C
        ((L - C) - n) / C   if L - C < n <= L
        -1                  if L < n

    `max_length` is the most tokens that a completion can have (`grpo.max_completion_length`), `cache`
    how many before that the penalty begins; by default a fifth of `max_length`, as in the paper
    (20,480 and 4,096). With a cache of 0 only what is longer than `max_length` is punished.

    Known problems. A right and long answer is punished like a wrong one; weigh it below the reward for
    being right. A completion that was cut off at `max_length` gets -1 although it might have ended with
    the next token. The penalty says nothing below `L - C`: it does not make answers short.

    Raises RewardError for options out of range.

    >>> length_reward([""] * 3, [[1] * 80, [1] * 90, [1] * 101], max_length=100)
    [0.0, -0.5, -1.0]
    """
    if type(max_length) is not int or max_length < 1:
        raise RewardError(
            f"reward 'length': `max_length` is {max_length!r}; give the most tokens that a completion "
            "may have, as `grpo.max_completion_length` says"
        )
    if cache is None:
        cache = max_length // 5
    if type(cache) is not int or not 0 <= cache <= max_length:
        raise RewardError(
            f"reward 'length': `cache` is {cache!r}; give a number of tokens from 0 to `max_length` "
            f"{max_length}"
        )
    return [_penalty(len(ids), max_length, cache) for ids in completion_ids]


def _penalty(count: int, longest: int, cache: int) -> float:
    free = longest - cache
    if count <= free:
        return 0.0
    return -1.0 if count > longest else (free - count) / cache


length_reward.top_score = 0.0  # type: ignore[attr-defined]
