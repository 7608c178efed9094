"""Scoring gold answers: times, histogram, and the rows below the top score."""

from typing import Any

import pytest

from rewards import Limits, RewardError, gold, load
from rewards.gold import Scored


def test_each_row_with_its_value_and_what_went_wrong(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "def mine(completions, answer):\n"
        "    for c in completions:\n"
        "        time.sleep(60 if c == 'hang' else 0.05 if c == 'slow' else 0)\n"
        "        assert c != 'raise'\n"
        "    return [float(c == a) if a != 'nan' else a for c, a in zip(completions, answer)]\n"
    )
    reward = load(f"{tmp_path}/mine.py:mine", Limits(seconds=0.5))
    texts = ["x", "y", "slow", "hang", "raise", "z"]
    answers = ["x", "x", "slow", "hang", "raise", "nan"]
    scored = list(gold.score(reward, texts, {"answer": answers}))
    assert [(one.row, one.value) for one in scored] == [
        (0, 1.0),
        (1, 0.0),
        (2, 1.0),
        (3, None),
        (4, None),
        (5, None),
    ]
    assert [one.note for one in scored[:5]] == ["", "", "", "timed out", "failed"]
    assert "returned 'nan' for completion 0" in scored[5].note
    assert 0.05 <= scored[2].seconds < 0.5 <= scored[3].seconds
    assert [one.row for one in gold.below(scored, 1.0)] == [1, 3, 4, 5]
    lines = gold.report(scored, 1.0).splitlines()
    assert lines[:3] == ["row 1: 0", "row 3: none (timed out)", "row 4: none (failed)"]
    assert lines[4:8] == [
        "top score 1: 2 of 6 rows",
        "              0        1  #############",
        "              1        2  ###########################",
        "           none        3  ########################################",
    ]
    assert lines[9].startswith("slowest: row 3 5")


def test_error_of_a_reward_that_limits_itself_is_its_rows(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "def mine(completions):\n    return [1 / len(c) for c in completions]\nmine.isolated = True\n"
    )
    scored = list(gold.score(load(f"{tmp_path}/mine.py:mine"), ["a", ""], {}))
    assert [one.value for one in scored] == [1.0, None]
    assert scored[1].note.startswith("ZeroDivisionError: ")


def test_many_scores_become_ranges() -> None:
    scored = [Scored(row, row / 99, 0.0) for row in range(100)]
    rows = gold.histogram(scored)
    assert [number for _, number, _ in rows] == [10] * 10
    assert (rows[0][0], rows[-1][0]) == ("0..0.1", "0.9..1")


def test_no_rows() -> None:
    assert gold.report([], 1.0) == "top score 1: 0 of 0 rows"


def test_trial_of_a_reward_that_scores_something(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "async def one(completions, answer, trainer_state, log_extra, log_metric, prompts=None):\n"
        "    log_extra('x', completions)\n"
        "    log_metric('y', trainer_state.global_step)\n"
        "    return [1 / len(c) for c in completions]\n"
    )
    reward = load(f"{tmp_path}/mine.py:one")
    gold.trial(reward, ["a", ""], {"answer": [1, 2]})
    with pytest.raises(RewardError, match=r"'one' scores none of 2 samples .* 0 take .* 2 fail"):
        gold.trial(reward, ["", ""], {"answer": [1, 2]})
    with pytest.raises(RewardError, match="'one' needs column 'answer'; the data has level"):
        gold.trial(reward, ["a"], {"level": [1]})
