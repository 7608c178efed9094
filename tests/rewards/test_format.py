"""`format`: templates and patterns, matched as a whole."""

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import Limits, RewardError, load
from rewards.format import TEMPLATES, format_reward

CASES = [
    ("think_answer", "<think>a\nb</think>\n<answer>5</answer>\n", 1.0),
    ("think_answer", "<think></think><answer></answer>", 1.0),
    ("think_answer", "Well: <think>a</think><answer>5</answer>", 0.0),
    ("think_answer", "<think>a</think><answer>5</answer> there", 0.0),
    ("think_answer", "<think>a</think><answer>5", 0.0),
    ("think_answer", "<answer>5</answer><think>a</think>", 0.0),
    ("think_answer", "<think>a</think><think>b</think><answer>5</answer>", 0.0),
    ("think_answer", "<think>a</think><answer>5</answer><answer>6</answer>", 0.0),
    ("boxed", r"so \boxed{\frac{1}{2}}.", 1.0),
    ("boxed", r"\boxed{1} or \boxed{2}", 0.0),
    ("boxed", r"\boxed{\boxed{1}}", 0.0),
    ("boxed", r"\boxed{1} or \fbox{2}", 0.0),
    ("boxed", r"\boxed{ }", 0.0),
    ("boxed", r"\boxed{1", 0.0),
    ("boxed", "1", 0.0),
    ("hashes", "3 + 4 = 7\n#### 7", 1.0),
    ("hashes", "#### 7\n", 1.0),
    ("hashes", "so #### 7", 0.0),
    ("hashes", "#### 7\nand so on", 0.0),
    ("hashes", "#### 6\n#### 7", 0.0),
    ("hashes", "#### 6 #### 7", 0.0),
    ("hashes", "3 + 4\n####", 0.0),
]


@pytest.mark.parametrize(("template", "text", "expected"), CASES)
def test_templates(template: str, text: str, expected: float) -> None:
    assert load("format", template=template)(completions=[text]) == [expected]


def test_default_template_is_think_answer() -> None:
    texts = [text for template, text, _ in CASES if template == "think_answer"]
    assert load("format")(completions=texts) == load("format", template="think_answer")(
        completions=texts
    )


def test_pattern_matches_the_whole_text_over_lines() -> None:
    reward = load("format", pattern=r"Answer: .*\.")
    assert reward(completions=["Answer: a\nb.", "Answer: a. So", "So Answer: a."]) == [
        1.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ([{"role": "assistant", "content": r"\boxed{1}"}], 1.0),
        ([{"role": "assistant", "content": [{"type": "text", "text": r"\boxed{1}"}]}], 1.0),
        ([{"role": "assistant", "content": None}], 0.0),
        ([{"role": "tool", "content": r"\boxed{1}"}], 0.0),
        (
            [
                {"role": "assistant", "content": r"\boxed{1}"},
                {"role": "tool", "content": "x"},
                {"role": "assistant", "content": "none"},
            ],
            0.0,
        ),
        ([], 0.0),
    ],
)
def test_chat_completions(completion: Any, expected: float) -> None:
    assert load("format", template="boxed")(completions=[completion]) == [expected]


@pytest.mark.parametrize("completion", [5, None, {"content": "x"}, ["x"], [{"role": "assistant"}]])
def test_what_is_no_completion_is_refused(completion: Any) -> None:
    with pytest.raises(RewardError, match="must be"):
        load("format")(completions=[completion])


@pytest.mark.parametrize("template", ["think_answer", "boxed", "hashes"])
@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 15_000,
        "<think>" + "<" * 100_000,
        "####" * 25_000,
        "#\n" * 50_000,
        "a" * 100_000 + "\n####",
        r"\boxed{" * 15_000,
        "{" * 100_000,
        "\n" * 100_000,
    ],
)
def test_templates_are_linear(template: str, text: str) -> None:
    reward = load("format", template=template)
    start = time.process_time()
    assert reward(completions=[text]) == [0.0]
    # Linear: a few hundredths of a second. Quadratic in 100,000 characters: minutes.
    assert time.process_time() - start < 2.0


@settings(deadline=None, derandomize=True)
@given(st.text(), st.sampled_from(sorted(TEMPLATES)))
def test_any_text_is_in_range(text: str, template: str) -> None:
    assert format_reward([text], template=template) in ([0.0], [1.0])


def test_hostile_text_for_a_pattern_costs_its_own_sample() -> None:
    """`(a+)+b` tries every way to cut 60 letters: longer than anyone waits, inside one C call."""
    reward = load("format", Limits(seconds=1.0, failed=0.0), pattern="(a+)+b")
    metrics: dict[str, float] = {}
    values = reward(completions=["aab", "a" * 60, "ab", "b"], log_metric=metrics.__setitem__)
    assert values == [1.0, 0.0, 1.0, 0.0]
    assert metrics["reward/format/timeouts"] == 1
