"""`math`: 1.0 when the final answer of a completion equals the gold answer, else 0.0."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from rewards.completions import completion_text
from rewards.errors import RewardError
from rewards.math.answers import MAX_LENGTH, Answer, compare, read_answer
from rewards.math.extraction import final_answer
from rewards.math.pool import Outcome, Pool, shared_pool

FALLBACKS = ("none", "last_number")
# Data, unlike a completion, is trusted not to be hostile: a busy machine must not make it "broken".
GOLD_SECONDS = 20.0

Pair = tuple[str, str]


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
    Plain numbers and phrases are compared here, formulas in other processes, side by side, where one
    that takes more than `time_limit` seconds of processor time is 0.0. Through `log_metric` go
    `reward/math/timeouts` and `reward/math/errors`, completions of this batch that reached a limit or
    broke the comparison, and `reward/math/seconds`, the time of the batch.

    Raises RewardError, naming the row, for a gold that cannot be read, and for a wrong option.
    """
    start = time.monotonic()
    _check_options(fallback, time_limit)
    if len(answer) != len(completions):
        raise RewardError(
            f"reward 'math': {len(completions)} completions but {len(answer)} values in column "
            "'answer'; pass one gold answer for each completion"
        )
    pool = shared_pool()
    texts = [None if v is None else _gold_text(v, row) for row, v in enumerate(answer)]
    golds = _read_golds(texts, pool)
    pairs = [
        (text, _stated(completion, fallback)) if text is not None else None
        for completion, text in zip(completions, texts, strict=True)
    ]
    verdicts = _verdicts({pair for pair in pairs if pair is not None}, golds, pool, time_limit)
    counts = Counter(verdicts[pair] for pair in pairs if pair is not None)
    if log_metric is not None:
        log_metric("reward/math/timeouts", float(counts[Outcome.TIMEOUT]))
        log_metric("reward/math/errors", float(counts[Outcome.ERROR]))
        log_metric("reward/math/seconds", time.monotonic() - start)
    return [None if pair is None else float(verdicts[pair] is Outcome.TRUE) for pair in pairs]


# The work on untrusted text is already done in processes that can be killed.
math_reward.isolated = True  # type: ignore[attr-defined]


def _check_options(fallback: str, time_limit: float) -> None:
    if fallback not in FALLBACKS:
        raise RewardError(
            f"reward 'math': unknown fallback {fallback!r}; use one of {', '.join(FALLBACKS)}"
        )
    is_number = isinstance(time_limit, int | float) and not isinstance(time_limit, bool)
    if not is_number or not 0 < time_limit < math.inf:
        raise RewardError(
            f"reward 'math': time_limit is {time_limit!r}; give a number of seconds above 0"
        )


def _stated(completion: Any, fallback: str) -> str | None:
    return final_answer(completion_text(completion), last_number=fallback == "last_number")


def _verdicts(
    pairs: Iterable[tuple[str, str | None]],
    golds: dict[str, Answer],
    pool: Pool,
    seconds: float,
) -> dict[tuple[str, str | None], Outcome]:
    """The outcome for each gold and answer, numbers and phrases here, the rest in the pool."""
    verdicts: dict[tuple[str, str | None], Outcome] = {}
    asked: dict[tuple[str, str | None], Pair] = {}
    for pair in pairs:
        text, stated = pair
        if not stated:
            verdicts[pair] = Outcome.FALSE
        elif len(stated) > MAX_LENGTH:
            # Too long to be tried counts as a limit that was reached.
            verdicts[pair] = Outcome.TIMEOUT
        else:
            gold = golds[text]
            equal = compare(gold, read_answer(stated))
            if equal is None:
                asked[pair] = (_marked(text), stated)
            else:
                verdicts[pair] = Outcome.TRUE if equal else Outcome.FALSE
    outcomes = pool.ask(list(asked.values()), seconds)
    return verdicts | dict(zip(asked, outcomes, strict=True))


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


def _marked(text: str) -> str:
    """The answer in a gold: what a solution marks, else the whole text."""
    marked = final_answer(text)
    return text if marked is None else marked


def _read_golds(texts: Sequence[str | None], pool: Pool) -> dict[str, Answer]:
    """Each gold, read. Raises RewardError with the first row whose gold cannot be read."""
    golds: dict[str, Answer] = {}
    rows: dict[str, int] = {}
    for row, text in enumerate(texts):
        if text is None or text in golds:
            continue
        golds[text] = gold = read_answer(_marked(text))
        if gold.number is None and gold.digits is None and not gold.phrase:
            rows[text] = row
            _check_spelling(gold, text, row)
    outcomes = pool.ask([(_marked(text), None) for text in rows], GOLD_SECONDS)
    for (text, row), outcome in zip(rows.items(), outcomes, strict=True):
        if outcome is Outcome.FALSE:
            raise _unreadable(text, row, "it is no number, phrase or formula")
        if outcome is not Outcome.TRUE:
            raise _unreadable(text, row, f"reading it ended in {outcome.value}")
    return golds


def _check_spelling(gold: Answer, text: str, row: int) -> None:
    if not gold.latex:
        raise _unreadable(text, row, "it is empty")
    if len(gold.latex) > MAX_LENGTH:
        raise _unreadable(text, row, f"it has more than {MAX_LENGTH} characters")
    if gold.latex.count("{") != gold.latex.count("}"):
        raise _unreadable(text, row, "its braces do not match")


def _unreadable(text: str, row: int, why: str) -> RewardError:
    return RewardError(
        f"reward 'math': the gold answer of row {row} of the batch, {text!r:.120}, cannot be read: "
        f"{why}; correct column 'answer' of the data, or leave the row out"
    )
