"""`math`: 1.0 when the final answer of a completion equals the gold answer, else 0.0."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from rewards.completions import completion_text
from rewards.errors import RewardError
from rewards.math.answers import Answer, compare, read_answer
from rewards.math.comparison import (
    Algebra,
    ComparisonFailedError,
    ComparisonTimeoutError,
    shared_algebra,
)
from rewards.math.extraction import final_answer

FALLBACKS = ("none", "last_number")
# Data, unlike a completion, is trusted not to be hostile: a busy machine must not make it "broken".
GOLD_SECONDS = 20.0


def math_reward(
    completions: list[Any],
    answer: Sequence[Any],
    *,
    fallback: str = "none",
    time_limit: float = 2.0,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 for each completion whose final answer equals the gold of column `answer`, else 0.0.

    The final answer is looked for as `extraction.final_answer` says. `fallback="last_number"` takes
    the last number of a completion that marks no answer; with "none", the default, that is 0.0.
    A gold may be the bare answer or a whole solution that marks it; a gold of None gives None.
    Plain numbers and phrases are compared here, formulas by math-verify in another process, where a
    comparison that takes more than `time_limit` seconds of processor time is 0.0. Through `log_metric` go
    `reward/math/timeouts` and `reward/math/errors`, counts over this batch.

    Raises RewardError, naming the row, for a gold that cannot be read, and for a wrong option.
    """
    if fallback not in FALLBACKS:
        raise RewardError(
            f"reward 'math': unknown fallback {fallback!r}; use one of {', '.join(FALLBACKS)}"
        )
    if isinstance(time_limit, bool) or not isinstance(time_limit, int | float) or time_limit <= 0:
        raise RewardError(
            f"reward 'math': time_limit is {time_limit!r}; give a number of seconds above 0"
        )
    if len(answer) != len(completions):
        raise RewardError(
            f"reward 'math': {len(completions)} completions but {len(answer)} values in column "
            "'answer'; pass one gold answer for each completion"
        )
    algebra = shared_algebra()
    counts: Counter[str] = Counter()
    # The samples of a group share their gold and often their answer.
    golds: dict[str, Answer] = {}
    verdicts: dict[tuple[Answer, Answer], float] = {}
    rewards: list[float | None] = []
    for row, (completion, gold_value) in enumerate(zip(completions, answer, strict=True)):
        if gold_value is None:
            rewards.append(None)
            continue
        key = _gold_text(gold_value, row)
        if key not in golds:
            golds[key] = _read_gold(key, row, algebra)
        stated = final_answer(completion_text(completion), last_number=fallback == "last_number")
        if stated is None:
            rewards.append(0.0)
            continue
        pair = (golds[key], read_answer(stated))
        if pair not in verdicts:
            verdicts[pair] = _verdict(*pair, algebra, time_limit, counts)
        rewards.append(verdicts[pair])
    if log_metric is not None:
        for name in ("timeouts", "errors"):
            log_metric(f"reward/math/{name}", float(counts[name]))
    return rewards


# Formulas are compared in a process that is killed when it takes too long.
math_reward.isolated = True  # type: ignore[attr-defined]


def _verdict(
    gold: Answer, answer: Answer, algebra: Algebra, seconds: float, counts: Counter[str]
) -> float:
    equal = compare(gold, answer)
    if equal is None:
        try:
            equal = algebra.equal(gold.latex, answer.latex, seconds)
        except ComparisonTimeoutError:
            counts["timeouts"] += 1
        except ComparisonFailedError:
            counts["errors"] += 1
    return 1.0 if equal else 0.0


def _gold_text(value: Any, row: int) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and math.isfinite(value):
        # Never 1e-07: written out.
        return f"{Decimal(repr(value)):f}" if isinstance(value, float) else str(value)
    raise RewardError(
        f"reward 'math': the gold answer of row {row} of the batch is {value!r:.120}; "
        "column 'answer' must hold text or finite numbers (None where there is no answer)"
    )


def _read_gold(text: str, row: int, algebra: Algebra) -> Answer:
    marked = final_answer(text)
    gold = read_answer(text if marked is None else marked)
    if gold.number is not None or gold.digits is not None or gold.phrase:
        return gold
    why = "it is no number, phrase or formula"
    if not gold.latex:
        why = "it is empty"
    elif gold.latex.count("{") != gold.latex.count("}"):
        why = "its braces do not match"
    else:
        try:
            if algebra.readable(gold.latex, GOLD_SECONDS):
                return gold
        except ComparisonTimeoutError:
            why = f"reading it took more than {GOLD_SECONDS:g} s"
        except ComparisonFailedError as error:
            why = f"reading it failed ({error})"
    raise RewardError(
        f"reward 'math': the gold answer of row {row} of the batch, {text!r:.120}, cannot be read: "
        f"{why}; correct column 'answer' of the data, or leave the row out"
    )
