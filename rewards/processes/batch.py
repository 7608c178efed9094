"""A batch of completions with their columns, and how it is cut."""

import pickle
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rewards.errors import RewardError
from rewards.processes.state import snapshot

_LOGS = ("log_extra", "log_metric")


class Batch:
    """The completions and columns that a reward takes, in a form that crosses to another process."""

    def __init__(self, name: str, completions: Sequence[Any], columns: Mapping[str, Any]) -> None:
        self._name = name
        self._completions = list(completions)
        self._logs = [log for log in _LOGS if columns.get(log) is not None]
        self._lists: dict[str, list[Any]] = {}
        self._whole: dict[str, Any] = {}
        for key, value in columns.items():
            if key == "trainer_state":
                self._whole[key] = None if value is None else snapshot(value)
            elif key in _LOGS:
                continue
            elif _is_list(value):
                self._lists[key] = list(value)
                if len(self._lists[key]) != len(self._completions):
                    raise RewardError(
                        f"reward '{name}': column '{key}' has {len(self._lists[key])} values for "
                        f"{len(self._completions)} completions; pass one for each"
                    )
            else:
                self._whole[key] = value

    def __len__(self) -> int:
        return len(self._completions)

    def request(self, parts: Iterable[range], seconds: float) -> bytes:
        """The rows of each part, pickled; raises RewardError for a column that cannot be."""
        cut = [
            (
                part.start,
                self._completions[part.start : part.stop],
                {k: v[part.start : part.stop] for k, v in self._lists.items()} | self._whole,
                self._logs,
            )
            for part in parts
        ]
        try:
            return pickle.dumps((cut, seconds))
        except Exception:
            for key, value in {**self._lists, **self._whole}.items():
                pickled(self._name, f"column '{key}'", value)
            raise


class Logged:
    """What the parts of a batch logged, put together again."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._extra: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[tuple[float, int]]] = {}

    def take(self, rows: range, message: Mapping[str, Any]) -> None:
        """Add what the call for these rows logged."""
        for column, values in message["extra"].items():
            whole = self._extra.setdefault(column, [None] * self._count)
            whole[rows.start : rows.stop] = values
        for name, value in message["metrics"]:
            self._metrics.setdefault(name, []).append((value, len(rows)))

    def hand_on(self, columns: Mapping[str, Any]) -> None:
        """Call the trainer's own log functions.

        A column is whole, with None for a lost sample; a metric is the mean over the calls, each
        weighted by its samples.
        """
        for column, values in self._extra.items():
            columns["log_extra"](column, values)
        for name, parts in self._metrics.items():
            total = sum(value * weight for value, weight in parts)
            columns["log_metric"](name, total / sum(weight for _, weight in parts))


def units(count: int, group_wise: bool, prompts: Sequence[Any] | None) -> list[range]:
    """What stands and falls together: each sample, or the neighbours that share a prompt.

    >>> units(4, True, ["a", "a", "b", "b"])
    [range(0, 2), range(2, 4)]
    """
    if not group_wise:
        return [range(i, i + 1) for i in range(count)]
    if prompts is None:
        return [range(count)]
    found = []
    for _, rows in groupby(range(count), key=lambda row: prompts[row]):
        same = list(rows)
        found.append(range(same[0], same[-1] + 1))
    return found


def parts(of: Sequence[range], size: int) -> list[tuple[range, ...]]:
    """Neighbouring units together until each part has at least `size` samples.

    >>> parts([range(0, 2), range(2, 4), range(4, 6)], 3)
    [(range(0, 2), range(2, 4)), (range(4, 6),)]
    """
    found: list[tuple[range, ...]] = []
    part: tuple[range, ...] = ()
    for unit in of:
        part = (*part, unit)
        if unit.stop - part[0].start >= size:
            found.append(part)
            part = ()
    return [*found, part] if part else found


def pickled(name: str, what: str, value: Any) -> bytes:
    """`value` as bytes; raises RewardError, saying what it is, when it cannot be."""
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise RewardError(
            f"reward '{name}': {what} cannot be handed to its process: {error}; leave it out, or "
            "name in the function's parameters only the columns that it needs, without `**columns`"
        ) from None


def _is_list(value: Any) -> bool:
    if isinstance(value, str | bytes | bytearray | Mapping):
        return False
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and _has_length(value)


def _has_length(value: Any) -> bool:
    try:
        len(value)
    except TypeError:  # an array without dimensions
        return False
    return True
