"""`format`: 1.0 when the whole completion has the required form, else 0.0."""

import re
from collections.abc import Callable
from typing import Any

from rewards.completions import completion_text
from rewards.errors import RewardError
from rewards.math.extraction import boxed_contents

# Tempered dots: each position is tried once, so the templates take linear time on any text.
_THINK_ANSWER = re.compile(
    r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>"
    r"\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>\s*",
    re.DOTALL,
)
_HASHES = re.compile(
    r"(?:(?!####).)*(?<![^\n])####[ \t]*(?:(?!####)[^\s])(?:(?!####)[^\n])*\s*", re.DOTALL
)


def _boxed(text: str) -> bool:
    contents = boxed_contents(text)
    return len(contents) == 1 and bool(contents[0].strip()) and text.count(r"\boxed") == 1


TEMPLATES: dict[str, Callable[[str], bool]] = {
    "think_answer": lambda text: _THINK_ANSWER.fullmatch(text) is not None,
    "boxed": _boxed,
    "hashes": lambda text: _HASHES.fullmatch(text) is not None,
}


def format_reward(
    completions: list[Any],
    *,
    pattern: str | None = None,
    template: str | None = None,
    **columns: Any,
) -> list[float]:
    r"""1.0 for each completion that matches as a whole, else 0.0.

    The format reward of DeepSeek-R1 (arXiv 2501.12948, section 2.2.2), for a form of your choice.
    `pattern` is a regular expression of Python's `re` with DOTALL, tried with `fullmatch`.
    `template` is one of
    - `think_answer` (the default): `<think>..</think>` then `<answer>..</answer>`, each tag once,
      nothing but white space around them;
    - `boxed`: exactly one `\boxed{..}`, closed and not empty, anywhere;
    - `hashes`: the last line is `#### x`, and `####` stands nowhere else.

    Known problems. The form says nothing about what is in it: an empty `<think></think>` passes, and
    once a policy has learnt the form, the reward is the same for all. A `pattern` with nested repeats,
    such as `(a+)+b`, can take exponential time on some texts; `load` runs it under a time limit.

    Raises RewardError for both options at once, an unknown template or a faulty pattern.
    """
    matches = _matcher(pattern, template)
    return [1.0 if matches(completion_text(completion)) else 0.0 for completion in completions]


def _matcher(pattern: str | None, template: str | None) -> Callable[[str], bool]:
    if pattern is not None and template is not None:
        raise RewardError("reward 'format': give `pattern` or `template`, not both")
    if pattern is None:
        template = template or "think_answer"
        if template not in TEMPLATES:
            raise RewardError(
                f"reward 'format': unknown template {template!r}; "
                f"use one of {', '.join(TEMPLATES)}, or give `pattern`"
            )
        return TEMPLATES[template]
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise RewardError(f"reward 'format': `pattern` {pattern!r} is faulty: {error}") from None
    return lambda text: compiled.fullmatch(text) is not None
