"""`load`: a reward's name or path -> a function that is checked before and after each call."""

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from rewards.binding import Binding
from rewards.checks import check_values
from rewards.errors import RewardError
from rewards.finding import (
    FROM_TRAINER,
    NAMED,
    absolute,
    check_options,
    did_you_mean,
    find,
    parameters_of,
)
from rewards.processes.limits import Limits
from rewards.processes.scorer import Scorer

BUILT_IN: Mapping[str, str] = {
    "math": "rewards.math:math_reward",
    "format": "rewards.format:format_reward",
    "length": "rewards.length:length_reward",
    "repetition": "rewards.repetition:repetition_reward",
}


class Reward(Protocol):
    """What `load` returns: a function (a coroutine function where the original is one)."""

    __name__: str
    # The columns without which the reward cannot be called; lets a caller check its data early.
    required_columns: tuple[str, ...]
    # What a right answer gets.
    top_score: float

    def __call__(self, completions: list[Any], **columns: Any) -> Any: ...


def load(spec: str, limits: Limits | None = None, /, **options: Any) -> Reward:
    """The reward `spec` with `options` bound to its keyword parameters.

    `spec` is a built-in name (a key of BUILT_IN), `package.module:function`, or
    `path/to/file.py:function`. The result takes `completions` and every column by keyword, hands on
    those that the function names (all of them when it has `**columns`), and checks what comes back
    (`check_values`). Its `__name__`, under which trainers log, is the built-in's or the function's.

    The function runs in processes of its own under `limits` (default `Limits()`), unless it has the
    attribute `isolated = True`, by which it says that it limits itself: then it runs right here.

    Raises RewardError for an unknown name, a missing file, module or function, something that is
    not callable or cannot take `completions`, an option that the function does not have, and limits
    for a reward that limits itself.
    """
    if spec not in BUILT_IN and ":" not in spec:
        raise RewardError(
            f"unknown reward '{spec}'{did_you_mean(spec, BUILT_IN)}; use {', '.join(BUILT_IN)}, "
            "`package.module:function` or `path/to/file.py:function`"
        )
    place = BUILT_IN.get(spec, spec)
    function = find(place)
    parameters = parameters_of(spec, function)
    if spec in BUILT_IN:
        # A built-in's options are its keyword-only parameters, and never come from a column that
        # happens to have the same name.
        defaults = {
            name: parameter.default
            for name, parameter in parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in FROM_TRAINER
        }
        check_options(spec, defaults, options)
        options = {**defaults, **options}
        # An empty batch makes a built-in check the values of its options before any model loads.
        needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind in NAMED]
        function(**{name: [] for name in needed}, **options)
    else:
        named = [name for name, p in parameters.items() if p.kind in NAMED]
        check_options(spec, [name for name in named if name not in FROM_TRAINER], options)
    name = spec if spec in BUILT_IN else spec.rpartition(":")[2]
    binding = Binding(name, parameters, options, only_named=spec in BUILT_IN)
    if getattr(function, "isolated", False):
        reward = _isolated(binding, function, limits)
    else:
        reward = _in_processes(binding, absolute(place), function, limits or Limits())
    functools.update_wrapper(reward, function, assigned=("__doc__", "__module__"), updated=())
    # The wrapper's own signature is the one to be called with.
    del reward.__wrapped__
    reward.__name__ = reward.__qualname__ = name
    reward.required_columns = binding.required
    reward.top_score = float(getattr(function, "top_score", 1.0))
    return cast(Reward, reward)


def _isolated(binding: Binding, function: Callable[..., Any], limits: Limits | None) -> Any:
    """A reward that runs in this process."""
    if limits is not None and limits != Limits():
        raise RewardError(
            f"reward '{binding.name}' limits itself; leave `seconds`, `failed`, `group_wise` and "
            "`workers` out, and set its own options"
        )
    name = binding.name
    if _is_async(function):

        async def coroutine(completions: list[Any], **columns: Any) -> list[float | None]:
            taken = binding.taken(columns)
            values = await function(**{"completions": completions, **taken, **binding.options})
            return check_values(name, values, len(completions))

        return coroutine

    def reward(completions: list[Any], **columns: Any) -> list[float | None]:
        taken = binding.taken(columns)
        values = function(**{"completions": completions, **taken, **binding.options})
        return check_values(name, values, len(completions))

    return reward


def _in_processes(binding: Binding, spec: str, function: Callable[..., Any], limits: Limits) -> Any:
    """A reward that runs in processes that can be killed."""
    declared = bool(getattr(function, "group_wise", False))
    group_wise = declared if limits.group_wise is None else limits.group_wise
    asynchronous = _is_async(function)
    scorer = Scorer(spec, binding.name, binding.options, limits, group_wise, asynchronous)

    def reward(completions: list[Any], **columns: Any) -> list[float | None]:
        taken = binding.taken(columns)
        return scorer.score(completions, taken, columns.get("prompts"), columns.get("log_metric"))

    if not asynchronous:
        return reward

    async def coroutine(completions: list[Any], **columns: Any) -> list[float | None]:
        # A thread waits for the processes, so that other coroutines go on.
        return await asyncio.to_thread(reward, completions, **columns)

    return coroutine


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  (an instance with an async __call__)
    )
