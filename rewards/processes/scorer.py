"""A batch -> parts for the worker processes -> one score for each sample, whatever happens to a part."""

import contextlib
import logging
import math
import os
import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.errors import RewardError
from rewards.processes.batch import Batch, Logged, parts, pickled, units
from rewards.processes.limits import Limits
from rewards.processes.pool import Failure, Job, Pool

MOST_WORKERS = 8
# By what the samples of the batch before took, a part is done in this share of the time limit.
SHARE = 0.25
# The most samples of a part as long as nobody knows how long one takes.
FIRST_PART = 64
# What a process may take to notice and report that calls side by side ran out of time.
SPARE_SECONDS = 1.0

_logger = logging.getLogger("rewards")


@dataclass(frozen=True)
class _Part:
    """Neighbouring units; `apart` as calls side by side, else as one call."""

    units: tuple[range, ...]
    apart: bool = False

    @property
    def rows(self) -> range:
        return range(self.units[0].start, self.units[-1].stop)


class Scorer:
    """Scores batches with one reward in a pool of processes.

    A unit is what stands and falls together: a sample, or for a group-wise reward the samples of one
    prompt. The batch is cut into parts of whole units. A part is one call and has `limits.seconds`,
    times the samples of its largest unit. One that takes longer, raises, or ends its process is tried
    again unit by unit, with the same limit for each (an async reward's units side by side first); a
    unit that fails alone gets `limits.failed`.
    """

    def __init__(
        self,
        spec: str,
        name: str,
        options: Mapping[str, Any],
        limits: Limits,
        group_wise: bool,
        asynchronous: bool,
    ) -> None:
        self._name, self._limits = name, limits
        self._group_wise, self._asynchronous = group_wise, asynchronous
        for option, value in options.items():
            pickled(name, f"option '{option}'", value)
        self._workers = limits.workers or default_workers()
        hello = pickle.dumps((spec, name, pickle.dumps(dict(options))))
        self._pool = Pool(name, hello, self._workers)
        # Seconds that a sample of the batch before took at most; 0 before the first.
        self._pace = 0.0

    def score(
        self,
        completions: Sequence[Any],
        columns: Mapping[str, Any],
        prompts: Sequence[Any] | None,
        log_metric: Callable[[str, float], None] | None,
    ) -> list[float | None]:
        """One checked value for each completion; what the reward logs is logged.

        `log_metric` gets `reward/<name>/timeouts` and `/errors`, the samples lost to each, and
        `/seconds`, the time by the clock. Raises RewardError for a wrong return value.
        """
        started = time.perf_counter()
        batch = Batch(self._name, completions, columns)
        values: list[float | None] = [self._limits.failed] * len(batch)
        logged, pace = Logged(len(batch)), 0.0
        lost: list[tuple[range, Failure]] = []
        with contextlib.closing(self._replies(batch, prompts)) as replies:
            for rows, reply in replies:
                if isinstance(reply, Failure):
                    lost.append((rows, reply))
                    continue
                values[rows.start : rows.stop] = reply["values"]
                logged.take(rows, reply)
                pace = max(pace, reply["seconds"] / len(rows))
        self._pace = pace
        counts = Counter({"timeouts": 0, "errors": 0})
        for rows, failure in lost:
            counts[failure.kind] += len(rows)
        if lost:
            self._warn(counts, *min(lost, key=lambda one: one[0].start))
        logged.hand_on(columns)
        if log_metric is not None:
            for kind, count in counts.items():
                log_metric(f"reward/{self._name}/{kind}", float(count))
            log_metric(f"reward/{self._name}/seconds", time.perf_counter() - started)
        return values

    def _replies(
        self, batch: Batch, prompts: Sequence[Any] | None
    ) -> Generator[tuple[range, dict[str, Any] | Failure], None, None]:
        """Score every unit of the batch; yield rows with their message, or why they are lost."""
        pieces = units(len(batch), self._group_wise, prompts)
        seconds = self._limits.seconds * max(map(len, pieces), default=1)
        jobs: deque[Job] = deque()

        def add(part: _Part) -> None:
            cut = part.units if part.apart else [part.rows]
            limit = seconds + SPARE_SECONDS * part.apart
            # The outer pickle is read by the worker's own loop, the inner one by the reward's.
            payload = pickle.dumps((limit, batch.request(cut, seconds)))
            jobs.append(Job(payload, limit, part))

        for together in parts(pieces, self._part_size(len(batch))):
            add(_Part(together))
        with contextlib.closing(self._pool.serve(jobs)) as done:
            for job, reply in done:
                part: _Part = job.about
                answers: list[tuple[_Part, dict[str, Any] | Failure]] = [(part, reply)]
                if isinstance(reply, dict) and "each" in reply:
                    alone = [_Part((unit,)) for unit in part.units]
                    answers = list(zip(alone, reply["each"], strict=True))
                for piece, answer in answers:
                    outcome = _outcome(answer)
                    if not isinstance(outcome, Failure) or len(piece.units) == 1:
                        yield piece.rows, outcome
                    elif self._asynchronous and not piece.apart:
                        add(_Part(piece.units, apart=True))
                    else:
                        for unit in piece.units:
                            add(_Part((unit,)))

    def _part_size(self, count: int) -> int:
        """Samples a part: all processes at work, but little lost with a part that fails."""
        size = math.ceil(count / self._workers)
        if not self._pace:
            # Two at least: one value too many or too few shows in no batch of one.
            return max(2, min(size, FIRST_PART))
        if not self._asynchronous:
            size = min(size, int(SHARE * self._limits.seconds / self._pace))
        return max(1, size)

    def _warn(self, counts: Mapping[str, int], rows: range, failure: Failure) -> None:
        which = (
            f"sample {rows.start}" if len(rows) == 1 else f"samples {rows.start}-{rows.stop - 1}"
        )
        _logger.warning(
            "reward '%s' lost %d samples of a batch to its time limit and %d to errors; %s: %s%s",
            self._name,
            counts["timeouts"],
            counts["errors"],
            which,
            failure.text,
            f"\n{failure.trace}" if failure.trace else "",
        )


def _outcome(reply: dict[str, Any] | Failure) -> dict[str, Any] | Failure:
    """The message of a call that went well, else a Failure; raises RewardError for a wrong result."""
    if isinstance(reply, Failure) or "values" in reply:
        return reply
    if "wrong" in reply:
        raise RewardError(reply["wrong"])
    if "timeout" in reply:
        return Failure("timeouts", "it took longer than its time limit")
    return Failure("errors", reply["error"], reply["trace"])


def default_workers() -> int:
    """One a processor that this process may use, shared with the other trainers of this machine."""
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    trainers = int(beside) if beside.isdigit() else 1
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // max(1, trainers)))
