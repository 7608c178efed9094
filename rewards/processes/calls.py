"""Calls of a reward inside a worker: a part of a batch in, a plain message out."""

import asyncio
import contextlib
import inspect
import pickle
import time
import traceback
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from rewards.checks import check_values
from rewards.errors import RewardError
from rewards.finding import find
from rewards.processes.wire import plain

Message = dict[str, Any]


class Calls:
    """The function of a reward, ready to be called again and again."""

    def __init__(self, spec: str, name: str, options: bytes) -> None:
        self._function = find(spec)
        self._name = name
        self._options: Mapping[str, Any] = pickle.loads(options)
        # One event loop for all calls: clients that an async reward keeps belong to the loop.
        self._loop = asyncio.Runner()

    def answer(self, request: bytes) -> Message:
        """Score the parts of a pickled request `(parts, seconds)`.

        One part, `(first row, completions, columns, names of log functions)`, is one call. Its message
        holds `values`, `seconds`, and what the function logged; or `wrong`, the text of a RewardError,
        which no other try will mend; or `error`, whatever else the function raised. Several parts are
        calls of an async function side by side, each with `seconds`; the message holds theirs in
        `each`, where `timeout` stands for one that took longer.
        """
        try:
            parts, seconds = pickle.loads(request)
        except Exception as error:
            return {
                "wrong": f"reward '{self._name}': its columns cannot be read in its process: "
                f"{_one_line(error)}; their classes must be importable there"
            }
        calls = [_Call(self._name, *part) for part in parts]
        if len(calls) == 1:
            return self._alone(calls[0])
        return {"each": self._loop.run(self._side_by_side(calls, seconds))}

    def _alone(self, call: "_Call") -> Message:
        try:
            result = self._function(**call.arguments, **self._options)
            if inspect.isawaitable(result):
                result = self._loop.run(_awaited(result))
            return call.message(result)
        except BaseException as error:
            return _failure(error)

    async def _side_by_side(self, calls: "Sequence[_Call]", seconds: float) -> list[Message]:
        return await asyncio.gather(*(self._in_time(call, seconds) for call in calls))

    async def _in_time(self, call: "_Call", seconds: float) -> Message:
        try:
            return await asyncio.wait_for(self._awaited(call), seconds)
        except TimeoutError:
            return {"timeout": True}

    async def _awaited(self, call: "_Call") -> Message:
        try:
            return call.message(await self._function(**call.arguments, **self._options))
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            return _failure(error)


class _Call:
    """One call: its arguments, and what the function logs through `log_extra` and `log_metric`."""

    def __init__(
        self,
        name: str,
        first: int,
        completions: list[Any],
        columns: dict[str, Any],
        logs: Sequence[str],
    ) -> None:
        self._name, self._first, self._count = name, first, len(completions)
        self._metrics: list[tuple[str, float]] = []
        self._extra: dict[str, list[Any]] = {}
        self._started = time.perf_counter()
        if columns.get("trainer_state") is not None:
            columns = {**columns, "trainer_state": SimpleNamespace(**columns["trainer_state"])}
        self.arguments = {
            "completions": completions,
            **columns,
            **{log: getattr(self, log) for log in logs},
        }

    def log_metric(self, name: str, value: Any) -> None:
        self._metrics.append((str(name), float(value)))

    def log_extra(self, column: str, values: Any) -> None:
        values = list(values)
        if len(values) != self._count:
            raise RewardError(
                f"reward '{self._name}': log_extra('{column}') got {len(values)} values for "
                f"{self._count} completions; give one for each"
            )
        self._extra[str(column)] = [plain(value) for value in values]

    def message(self, result: Any) -> Message:
        """What goes back; raises RewardError for a wrong result."""
        values = check_values(self._name, result, self._count, self._first)
        seconds = time.perf_counter() - self._started
        return {
            "values": values,
            "seconds": seconds,
            "metrics": self._metrics,
            "extra": self._extra,
        }


async def _awaited(result: Any) -> Any:
    return await result


def _failure(error: BaseException) -> Message:
    if isinstance(error, RewardError):
        return {"wrong": str(error)}
    # Without the frames of this package.
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    return {
        "error": _one_line(error),
        "trace": "".join(traceback.format_tb(trace, limit=-8)),
    }


def _one_line(error: BaseException) -> str:
    text = "no text"
    # An exception of the user's may fail even at this.
    with contextlib.suppress(Exception):
        text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}"
