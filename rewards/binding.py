"""Which of the things that a trainer passes reach a reward's function."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewards.errors import RewardError
from rewards.finding import FROM_TRAINER, NAMED, takes_any


@dataclass(frozen=True)
class Binding:
    """A reward's name, its function's parameters and the options bound to some of them."""

    name: str
    parameters: Mapping[str, inspect.Parameter]
    options: Mapping[str, Any]
    # Leaves out what `**columns` would swallow unread.
    only_named: bool = False

    @property
    def required(self) -> tuple[str, ...]:
        """The columns of the data that the function cannot do without."""
        return tuple(key for key in self._needed() if key not in FROM_TRAINER)

    def taken(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that the function takes: those it names, or all when it has `**columns`.

        An option stands before a column of the same name. The trainer's `environments` are live
        objects, which go only to a function that names them.
        Raises RewardError when one that it needs is missing.
        """
        missing = [key for key in self._needed() if key not in columns]
        if missing:
            names = ", ".join(map(repr, missing))
            if set(missing) <= FROM_TRAINER:
                raise RewardError(
                    f"reward '{self.name}' needs {names}, which a trainer passes; pass it along"
                )
            raise RewardError(
                f"reward '{self.name}' needs column {names}; the data has "
                f"{', '.join(sorted(columns.keys() - FROM_TRAINER)) or 'no columns'}; add it "
                "to the data, or give it as an option"
            )
        every = takes_any(self.parameters) and not self.only_named
        return {
            key: value
            for key, value in columns.items()
            if key not in self.options
            and (key in self.parameters or (every and key != "environments"))
        }

    def _needed(self) -> list[str]:
        return [
            key
            for key, parameter in self.parameters.items()
            if parameter.kind in NAMED
            and parameter.default is inspect.Parameter.empty
            and key != "completions"
            and key not in self.options
        ]
