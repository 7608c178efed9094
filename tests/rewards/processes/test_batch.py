"""Cutting a batch: every sample once, units whole, and what is logged put together again."""

import pickle
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.processes.batch import Batch, Logged, parts, units
from rewards.processes.wire import plain


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 20), st.booleans())
def test_parts_hold_every_sample_once(prompts: list[str], size: int, group_wise: bool) -> None:
    pieces = units(len(prompts), group_wise, prompts)
    cut = parts(pieces, size)
    assert [row for part in cut for unit in part for row in unit] == list(range(len(prompts)))
    assert [unit for part in cut for unit in part] == pieces
    for part in cut[:-1]:
        assert sum(map(len, part)) >= size > sum(map(len, part[:-1]))
    if group_wise:
        for unit in pieces:
            assert len({prompts[row] for row in unit}) == 1
        borders = [unit.start for unit in pieces[1:]]
        assert all(prompts[row - 1] != prompts[row] for row in borders)


def test_without_prompts_the_batch_is_one_group() -> None:
    assert units(3, True, None) == [range(3)]


def test_request_slices_lists_and_keeps_the_rest_whole() -> None:
    columns = {"answer": ("a", "b", "c"), "level": 7, "word": "abc", "log_metric": print}
    request = Batch("mine", ["x", "y", "z"], columns).request([range(1, 3)], 2.0)
    whole = {"level": 7, "word": "abc"}
    expected = [(1, ["y", "z"], {"answer": ["b", "c"], **whole}, ["log_metric"])]
    assert pickle.loads(request) == (expected, 2.0)


def test_metrics_are_weighted_by_samples() -> None:
    logged = Logged(4)
    logged.take(range(3), {"extra": {"x": [1, 2, 3]}, "metrics": [["m", 1.0]]})
    logged.take(range(3, 4), {"extra": {}, "metrics": [["m", 5.0], ["n", 2.0]]})
    seen: dict[str, Any] = {}
    logged.hand_on({"log_extra": seen.__setitem__, "log_metric": seen.__setitem__})
    assert seen == {"x": [1, 2, 3, None], "m": 2.0, "n": 2.0}


def test_what_is_no_json_becomes_its_text() -> None:
    import numpy as np

    assert plain({"a": np.float32(0.5), "b": np.arange(2)}) == {"a": 0.5, "b": [0, 1]}
    assert plain({(1, 2): 3}) == "{(1, 2): 3}"
    assert plain(ValueError("x")) == "x"
