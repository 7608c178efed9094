"""`repetition`: the share of n-grams that repeat an earlier one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import load
from rewards.repetition import repetition_reward


@pytest.mark.parametrize(
    ("ids", "size", "expected"),
    [
        ([1, 2, 3, 4, 5], 3, 0.0),
        ([5] * 5, 3, 1 / 3 - 1),
        ([1, 2, 1, 2, 1, 2], 2, 2 / 5 - 1),  # 12 21 12 21 12
        ([1, 2, 3, 1, 2, 3], 3, 3 / 4 - 1),  # 123 231 312 123
        ([1, 1, 2], 1, 2 / 3 - 1),
        ([1, 2], 3, 0.0),
        ([], 3, 0.0),
    ],
)
def test_by_hand(ids: list[int], size: int, expected: float) -> None:
    assert repetition_reward([""], [ids], size=size) == [pytest.approx(expected)]


def test_words() -> None:
    text = "The cat sat. the cat ran"  # the-cat cat-sat. sat.-the the-cat cat-ran
    chat = [{"role": "assistant", "content": text}]
    reward = load("repetition", size=2, unit="words")
    assert reward(completions=[text, chat, "no"]) == [pytest.approx(-1 / 5)] * 2 + [0.0]


def test_tokens_come_from_the_trainer() -> None:
    reward = load("repetition", size=1)
    assert reward(completions=["a b"], completion_ids=[[1, 1]]) == [-0.5]
    with pytest.raises(ValueError, match=r"needs `completion_ids`, .* or set `unit` to words"):
        reward(completions=["a b"])
    assert reward.top_score == 0.0


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 6))
def test_equals_counting_what_came_before(ids: list[int], size: int) -> None:
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    again = sum(gram in grams[:i] for i, gram in enumerate(grams))
    expected = -again / len(grams) if grams else 0.0
    assert repetition_reward([""], [ids], size=size) == [pytest.approx(expected)]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.text(), st.integers(1, 4), st.sampled_from(["words"]))
def test_any_text_is_in_range(text: str, size: int, unit: str) -> None:
    [value] = repetition_reward([text], size=size, unit=unit)
    assert -1.0 < value <= 0.0


def test_agrees_with_trl() -> None:
    from trl.rewards import get_repetition_penalty_reward

    ids = [[i * i % 7 for i in range(n)] for n in range(40)]
    assert repetition_reward([""] * 40, ids) == pytest.approx(get_repetition_penalty_reward()(ids))
