"""Gold answers as completions: a reward must give them its top score, or it teaches something else."""

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rewards.errors import RewardError
from rewards.loading import Reward

BINS = 10
BAR = 40
SLOWEST = 5


@dataclass(frozen=True)
class Scored:
    """What the gold answer of a row got, in how many seconds, and what went wrong on the way."""

    row: int
    value: float | None
    seconds: float
    note: str = ""


def score(
    reward: Reward, completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> Iterator[Scored]:
    """Score the completions one by one, in order; what is wrong with a row is noted, not raised.

    The time is that of a call with this sample alone; the reward's processes are started before.
    """
    if completions:
        _score(reward, 0, completions, columns)
    for row in range(len(completions)):
        yield _score(reward, row, completions, columns)


def trial(reward: Reward, completions: list[Any], columns: Mapping[str, Sequence[Any]]) -> None:
    """Call the reward once on a few rows, as a trainer will.

    Raises RewardError for a missing column, a wrong number of values, NaN and infinity, and when
    each of the rows hangs, raises or crashes.
    """
    lost: Counter[str] = Counter()

    def log_metric(name: str, value: float) -> None:
        lost[name] += int(value)

    _call(reward, completions, columns, log_metric)
    late, failed = (lost[f"reward/{reward.__name__}/{kind}"] for kind in ("timeouts", "errors"))
    if completions and late + failed >= len(completions):
        raise RewardError(
            f"reward '{reward.__name__}' scores none of {len(completions)} samples that hold the gold "
            f"answer: {late} take longer than its time limit, {failed} fail; the log says how"
        )


def report(scored: Sequence[Scored], top: float) -> str:
    """The rows below the top score, each on a line, then the histogram and the times."""
    lines = [
        f"row {one.row}: {_shown(one.value)}{f' ({one.note})' if one.note else ''}"
        for one in below(scored, top)
    ]
    count = len(scored)
    lines.append(f"top score {top:g}: {count - len(lines):,} of {count:,} rows")
    lines += [f"  {name:>13} {number:>8,}  {bar}" for name, number, bar in histogram(scored)]
    if count:
        times = sorted(one.seconds for one in scored)
        mean, p99 = sum(times) / count, times[min(count - 1, int(0.99 * count))]
        lines.append(
            f"time a sample: mean {_ms(mean)}, median {_ms(times[count // 2])}, 99% {_ms(p99)}, "
            f"most {_ms(times[-1])}"
        )
        slowest = sorted(scored, key=lambda one: -one.seconds)[:SLOWEST]
        lines.append(
            "slowest: " + ", ".join(f"row {one.row} {_ms(one.seconds)}" for one in slowest)
        )
    return "\n".join(lines)


def below(scored: Sequence[Scored], top: float) -> list[Scored]:
    """The rows whose gold answer does not get the top score."""
    return [one for one in scored if one.value is None or one.value < top]


def histogram(scored: Sequence[Scored]) -> list[tuple[str, int, str]]:
    """Score, number of rows and bar; of more than BINS different scores, ranges.

    >>> histogram([Scored(0, 1.0, 0.0), Scored(1, 0.0, 0.0), Scored(2, 1.0, 0.0)])[1]
    ('1', 2, '########################################')
    """
    values = [one.value for one in scored if one.value is not None]
    counts = Counter(values)
    rows = [(f"{value:g}", counts[value]) for value in sorted(counts)]
    if len(rows) > BINS:
        low, high = min(values), max(values)
        step = (high - low) / BINS
        places = Counter(min(BINS - 1, int((value - low) / step)) for value in values)
        rows = [
            (f"{low + i * step:.3g}..{low + (i + 1) * step:.3g}", places[i]) for i in range(BINS)
        ]
    if len(values) < len(scored):
        rows.append(("none", len(scored) - len(values)))
    most = max((number for _, number in rows), default=1)
    return [(name, number, "#" * round(BAR * number / most)) for name, number in rows]


def _score(
    reward: Reward, row: int, completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> Scored:
    lost: dict[str, float] = {}
    value, note = None, ""
    started = time.perf_counter()
    try:
        one = {name: [values[row]] for name, values in columns.items()}
        [value] = _call(reward, [completions[row]], one, lost.__setitem__)
    except RewardError as error:
        note = str(error)
    except Exception as error:  # of a reward that limits itself
        note = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - started
    for kind, text in (("timeouts", "timed out"), ("errors", "failed")):
        if lost.get(f"reward/{reward.__name__}/{kind}"):
            note = text
    return Scored(row, value, seconds, note)


def _call(
    reward: Reward, completions: list[Any], columns: Mapping[str, Any], log_metric: Any
) -> list[float | None]:
    state = SimpleNamespace(epoch=0.0, global_step=0, max_steps=0, log_history=[])
    values = reward(
        completions=completions,
        **columns,
        trainer_state=state,
        log_metric=log_metric,
        log_extra=lambda column, values: None,
    )
    if inspect.iscoroutine(values):
        values = asyncio.run(values)
    return list(values)


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
