"""`load`: a reward's name or path -> a function that is checked before and after each call."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from rewards.checks import check_values
from rewards.errors import RewardError

BUILT_IN: Mapping[str, str] = {
    "math": "rewards.math:math_reward",
    "format": "rewards.format:format_reward",
}

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

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Reward(Protocol):
    """What `load` returns: a function (a coroutine function where the original is one)."""

    __name__: str
    # The columns without which the reward cannot be called; lets a caller check its data early.
    required_columns: tuple[str, ...]

    def __call__(self, completions: list[Any], **columns: Any) -> Any: ...


def load(spec: str, **options: Any) -> Reward:
    """The reward `spec` with `options` bound to its keyword parameters.

    `spec` is a built-in name (a key of BUILT_IN), `package.module:function`, or
    `path/to/file.py:function`. The result takes `completions` and every column by keyword, hands on
    those that the function names (all of them when it has `**columns`), and checks what comes back
    (`check_values`). Its `__name__`, under which trainers log, is the built-in's or the function's.

    Raises RewardError for an unknown name, a missing file, module or function, something that is
    not callable or cannot take `completions`, and an option that the function does not have.
    """
    if spec in BUILT_IN:
        function = _find(BUILT_IN[spec])
        parameters = _parameters(spec, function)
        # A built-in's options are its keyword-only parameters, and never come from a column that
        # happens to have the same name.
        defaults = {
            name: parameter.default
            for name, parameter in parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in FROM_TRAINER
        }
        _check_options(spec, defaults, options)
        reward = _checked(spec, function, parameters, {**defaults, **options})
        # An empty batch makes a built-in check the values of its options before any model loads.
        reward(completions=[], **{column: [] for column in reward.required_columns})
        return reward
    if ":" not in spec:
        raise RewardError(
            f"unknown reward '{spec}'{_did_you_mean(spec, BUILT_IN)}; use {', '.join(BUILT_IN)}, "
            "`package.module:function` or `path/to/file.py:function`"
        )
    function = _find(spec)
    parameters = _parameters(spec, function)
    named = [name for name, p in parameters.items() if p.kind in _NAMED]
    _check_options(spec, [name for name in named if name not in FROM_TRAINER], options)
    return _checked(spec.rpartition(":")[2], function, parameters, options)


def _find(spec: str) -> Callable[..., Any]:
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
            f"reward '{spec}': no function '{name}' in {place}{_did_you_mean(name, functions)}"
        )
    function = getattr(module, name)
    if not callable(function):
        raise RewardError(
            f"reward '{spec}': '{name}' is {type(function).__name__}, not a function; "
            "name a function that takes `completions`"
        )
    return function


def _load_file(spec: str, path: Path) -> ModuleType:
    path = path.expanduser()
    if not path.is_file():
        beside = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise RewardError(
            f"reward '{spec}': no file {path}{_did_you_mean(str(path), beside)} "
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


def _parameters(spec: str, function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
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
    by_keyword = completions is not None and completions.kind in _NAMED
    if not by_keyword and not _takes_any(parameters):
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


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _check_options(spec: str, known: Collection[str], options: Iterable[str]) -> None:
    """Every option must be a named parameter: in `**columns` a misspelt one would vanish."""
    for option in options:
        if option not in known:
            raise RewardError(
                f"reward '{spec}' has no option '{option}'{_did_you_mean(option, known)}; "
                f"it has {', '.join(known) if known else 'none'}"
            )


def _checked(
    name: str,
    function: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    options: Mapping[str, Any],
) -> Reward:
    takes_any = _takes_any(parameters)
    required = tuple(
        key
        for key, p in parameters.items()
        if p.kind in _NAMED
        and p.default is inspect.Parameter.empty
        and key not in FROM_TRAINER
        and key not in options
    )

    def arguments(completions: list[Any], columns: Mapping[str, Any]) -> dict[str, Any]:
        missing = [column for column in required if column not in columns]
        if missing:
            raise RewardError(
                f"reward '{name}' needs column {', '.join(map(repr, missing))}; the data has "
                f"{', '.join(sorted(columns.keys() - FROM_TRAINER)) or 'no columns'}; add it "
                "to the data, or give it as an option"
            )
        taken = columns if takes_any else {k: v for k, v in columns.items() if k in parameters}
        return {"completions": completions, **taken, **options}

    reward: Any
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  (an instance with an async __call__)
    ):

        async def reward(completions: list[Any], **columns: Any) -> list[float | None]:
            values = await function(**arguments(completions, columns))
            return check_values(name, values, len(completions))
    else:

        def reward(completions: list[Any], **columns: Any) -> list[float | None]:
            values = function(**arguments(completions, columns))
            return check_values(name, values, len(completions))

    functools.update_wrapper(reward, function, assigned=("__doc__", "__module__"), updated=())
    # The wrapper's own signature is the one to be called with.
    del reward.__wrapped__
    reward.__name__ = reward.__qualname__ = name
    reward.required_columns = required
    return reward


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
