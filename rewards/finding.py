"""A reward's spec -> the function it names, and what its signature allows."""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.errors import RewardError

# What the trainer passes besides the columns of the data set.
FROM_TRAINER = frozenset(
    {
        "completions",
        "prompts",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
        "environments",
    }
)

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def find(spec: str) -> Callable[..., Any]:
    """The function that `package.module:function` or `path/to/file.py:function` names.

    Raises RewardError for a missing file, module or function, and one that cannot be called.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise RewardError(
            f"reward '{spec}' is not complete; write `package.module:function` or "
            "`path/to/file.py:function`"
        )
    module = _load_file(spec, Path(place)) if place.endswith(".py") else _load_module(spec, place)
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise RewardError(
            f"reward '{spec}': no function '{name}' in {place}{did_you_mean(name, functions)}"
        )
    function = getattr(module, name)
    if not callable(function):
        raise RewardError(
            f"reward '{spec}': '{name}' is {type(function).__name__}, not a function; "
            "name a function that takes `completions`"
        )
    return function


def absolute(spec: str) -> str:
    """The same spec, valid from any working directory."""
    place, _, name = spec.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{name}" if place.endswith(".py") else spec


def parameters_of(spec: str, function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of `function`; raises RewardError when it cannot be called with a batch."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise RewardError(
            f"reward '{spec}' has no readable signature; wrap it in a Python function "
            "`def reward(completions, **columns)`"
        ) from None
    if isinstance(function, type):
        raise RewardError(
            f"reward '{spec}' is a class; name a function, or an instance that can be called"
        )
    completions = parameters.get("completions")
    by_keyword = completions is not None and completions.kind in NAMED
    if not by_keyword and not takes_any(parameters):
        raise RewardError(
            f"reward '{spec}' cannot take `completions`: its parameters are "
            f"({', '.join(map(str, parameters.values()))}); "
            "write it as `def reward(completions, **columns) -> list[float | None]`"
        )
    for parameter in parameters.values():
        positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        if positional and parameter.default is inspect.Parameter.empty:
            raise RewardError(
                f"reward '{spec}' has the positional-only parameter '{parameter.name}', but "
                "columns are passed by keyword; remove the `/` from its signature"
            )
    return parameters


def takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a function has `**columns`."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def check_options(spec: str, known: Collection[str], options: Iterable[str]) -> None:
    """Every option must be a named parameter: in `**columns` a misspelt one would vanish."""
    for option in options:
        if option not in known:
            raise RewardError(
                f"reward '{spec}' has no option '{option}'{did_you_mean(option, known)}; "
                f"it has {', '.join(known) if known else 'none'}"
            )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _load_file(spec: str, path: Path) -> ModuleType:
    path = path.expanduser()
    if not path.is_file():
        beside = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise RewardError(
            f"reward '{spec}': no file {path}{did_you_mean(str(path), beside)} "
            f"(looked from {Path.cwd()})"
        )
    name = f"rewards_from_file_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise RewardError(f"reward '{spec}': {path} cannot be imported as Python")
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and pickles of the file look their module up there.
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(
            f"reward '{spec}': importing {path} failed with {type(error).__name__}: {error}"
        ) from error
    return module


def _load_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise RewardError(
                f"reward '{spec}': no module '{error.name}'; install it, put its folder on "
                "PYTHONPATH, or give the file: `path/to/file.py:function`"
            ) from None
        raise RewardError(
            f"reward '{spec}': importing {name} failed with {type(error).__name__}: {error}"
        ) from error
