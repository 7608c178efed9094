"""The trainer's state in a form that crosses to another process without the trainer's classes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# A long run's history would cost more to send, with each batch, than the rewards themselves.
NEWEST_LOGS = 100
_PLAIN = (type(None), bool, int, float, str)


def snapshot(state: Any) -> dict[str, Any]:
    """The plain fields of a trainer's state; of `log_history` the newest NEWEST_LOGS entries.

    >>> from types import SimpleNamespace
    >>> snapshot(SimpleNamespace(global_step=3, log_history=[{"loss": 1.0}], hook=print))
    {'global_step': 3, 'log_history': [{'loss': 1.0}]}
    """
    if dataclasses.is_dataclass(state):
        fields = {f.name: getattr(state, f.name, None) for f in dataclasses.fields(state)}
    else:
        fields = dict(state) if isinstance(state, Mapping) else dict(vars(state))
    history = fields.get("log_history")
    if isinstance(history, list):
        fields["log_history"] = history[-NEWEST_LOGS:]
    return {name: value for name, value in fields.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return isinstance(value, _PLAIN)
