"""`repetition`: 0 without repeated n-grams, down to -1 the more of a completion repeats itself."""

from collections.abc import Sequence
from typing import Any

from rewards.completions import completion_text
from rewards.errors import RewardError

UNITS = ("tokens", "words")


def repetition_reward(
    completions: list[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    size: int = 3,
    unit: str = "tokens",
    **columns: Any,
) -> list[float]:
    r"""The share of n-grams that repeat an earlier one, as a penalty.

        reward = distinct / total - 1

    with `distinct` and `total` the number of different and of all n-grams of `size` neighbouring tokens
    (`unit="words"`: lower-case words between white space). 0.0 when all differ or the completion is
    shorter than `size`; it tends to -1 for one n-gram over and over. A completion's total of the n-gram
    penalty of "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv 2502.03373, appendix C.2),
    which there is given to the repeated tokens alone; weigh it with the recipe's `weight`.

    Known problems. Text that must repeat is punished too: tables, code, a recurring decimal. Long texts
    repeat more than short ones, so the penalty favours short ones. A repetition with a change every few
    words goes unseen. Words are of no use for languages without spaces, and a policy can learn to leave
    the spaces out; tokens have neither problem.

    Raises RewardError for options out of range, and for tokens without the column `completion_ids`,
    which trainers pass.

    >>> repetition_reward([""] * 2, [[1, 2, 3, 4], [5, 5, 5, 5, 5, 5]])
    [0.0, -0.75]
    """
    if type(size) is not int or size < 1:
        raise RewardError(f"reward 'repetition': `size` is {size!r}; give a whole number from 1")
    if unit not in UNITS:
        raise RewardError(
            f"reward 'repetition': unknown unit {unit!r}; use one of {', '.join(UNITS)}"
        )
    if unit == "words":
        return [_penalty(completion_text(text).lower().split(), size) for text in completions]
    if completion_ids is None and completions:
        raise RewardError(
            "reward 'repetition' needs `completion_ids`, which a trainer passes; pass it along, or "
            "set `unit` to words"
        )
    return [_penalty(ids, size) for ids in completion_ids or ()]


def _penalty(items: Sequence[Any], size: int) -> float:
    total = len(items) - size + 1
    if total < 1:
        return 0.0
    shifted = (items[start:] for start in range(size))
    return len(set(zip(*shifted, strict=False))) / total - 1.0


repetition_reward.top_score = 0.0  # type: ignore[attr-defined]
