"""`length`: DAPO's soft overlong punishment."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import load
from rewards.length import length_reward

# Worked out by hand from eq. 13 with L_max = 20480 and L_cache = 4096, the paper's own numbers.
PAPER = [
    (0, 0.0),
    (16384, 0.0),
    (16385, -1 / 4096),
    (18432, -0.5),
    (20479, -4095 / 4096),
    (20480, -1.0),
    (20481, -1.0),
    (10**6, -1.0),
]


@pytest.mark.parametrize(("count", "expected"), PAPER)
def test_paper(count: int, expected: float) -> None:
    ids = [range(count)]
    assert length_reward([""], ids, max_length=20480, cache=4096) == [expected]
    # The paper's cache is the default.
    assert length_reward([""], ids, max_length=20480) == [expected]


def test_without_a_cache_only_what_is_longer() -> None:
    values = length_reward([""] * 3, [[1] * 9, [1] * 10, [1] * 11], max_length=10, cache=0)
    assert values == [0.0, 0.0, -1.0]


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 200), st.data())
def test_falls_evenly_from_zero_to_minus_one(longest: int, data: st.DataObject) -> None:
    cache = data.draw(st.integers(0, longest))
    values = length_reward(
        [""] * (longest + 3),
        [[1] * n for n in range(longest + 3)],
        max_length=longest,
        cache=cache,
    )
    assert values[: longest - cache + 1] == [0.0] * (longest - cache + 1)
    steps = [a - b for a, b in pairwise(values[longest - cache :])]
    assert steps[:cache] == pytest.approx([1 / max(cache, 1)] * cache)
    assert values[longest + 1 :] == [-1.0, -1.0]


def test_loaded_in_tokens_with_ids_from_the_trainer() -> None:
    reward = load("length", max_length=10)
    ids = [[1] * 8, [1] * 9, [1] * 12]
    assert reward(
        completions=["long text " * 9, "a", ""], completion_ids=ids, answer=[1, 2, 3]
    ) == [
        0.0,
        -0.5,
        -1.0,
    ]
    with pytest.raises(ValueError, match="'length' needs 'completion_ids', which a trainer passes"):
        reward(completions=["a"])
    assert reward.top_score == 0.0
