"""The arithmetic problems are right, bounded, reproducible and in one split each."""

import doctest
import importlib.util
import re
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

import rewards

FILE = Path(__file__).parents[2] / "data" / "arithmetic" / "problems.py"


@pytest.fixture(scope="module")
def problems() -> ModuleType:
    """The script, loaded by its path as the recipe loads it."""
    spec = importlib.util.spec_from_file_location("arithmetic_problems", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def formula(prompt: str) -> str:
    """Return the expression inside a prompt."""
    return re.search(r"\d[\d +*-]*\d|\d", prompt).group()


@pytest.mark.parametrize("split", ["sft", "train", "curve", "eval"])
def test_answers_are_what_python_computes(problems: ModuleType, split: str) -> None:
    for row in problems.rows(split, 400, seed=3):
        text = formula(row["prompt"])
        assert row["answer"] == str(eval(text))
        assert row["operations"] == sum(text.count(sign) for sign in "+-*")


def test_sums_and_differences_stay_in_bounds(problems: ModuleType) -> None:
    for row in problems.rows("train", 1000, seed=0):
        terms = re.split(r" (?=[+-] )", formula(row["prompt"]))
        for end in range(2, len(terms) + 1):
            assert 0 <= eval(" ".join(terms[:end])) <= problems.LARGEST_TOTAL


def test_no_problem_is_in_two_splits(problems: ModuleType) -> None:
    """Also across seeds: the split is a property of the problem."""
    found = {
        split: {
            formula(row["prompt"]) for seed in (0, 1) for row in problems.rows(split, 2000, seed)
        }
        for split in problems.SPLITS
    }
    for one, other in combinations(found, 2):
        assert not found[one] & found[other], f"{one} and {other} share a problem"


def test_problems_of_one_call_are_all_different(problems: ModuleType) -> None:
    texts = [formula(row["prompt"]) for row in problems.rows("eval", 2000, seed=0)]
    assert len(set(texts)) == len(texts)


def test_rows_follow_from_the_seed(problems: ModuleType) -> None:
    first = problems.rows("sft", 50, seed=7)
    assert problems.rows("sft", 50, seed=7) == first
    assert problems.rows("sft", 80, seed=7)[:50] == first
    assert problems.rows("sft", 50, seed=8) != first


def test_first_rows_are_pinned(problems: ModuleType) -> None:
    """A change here changes every figure that the recipe's head and the docs report."""
    assert problems.rows("eval", 2, seed=0) == [
        {"prompt": "Compute 7 - 2 + 8 - 3 + 5 - 8.", "answer": "7", "operations": 5},
        {"prompt": "How much is 3 * 4 + 4 - 2 * 2 - 9?", "answer": "3", "operations": 5},
    ]


def test_working_is_true_line_by_line_and_ends_in_the_answer(problems: ModuleType) -> None:
    for row in problems.rows("sft", 1000, seed=1):
        *lines, last = row["completion"].split("\n")
        assert last == f"#### {row['answer']}"
        for line in lines:
            left, right = line.split(" = ")
            assert eval(left) == int(right)
        assert len(lines) in (0, row["operations"])


def test_short_problems_are_worked_and_a_share_of_the_long_ones(problems: ModuleType) -> None:
    rows = problems.rows("sft", 4000, seed=2)
    assert all("=" in row["completion"] for row in rows if row["operations"] <= problems.SHORT)
    long = [row for row in rows if row["operations"] > problems.SHORT]
    share = sum("=" in row["completion"] for row in long) / len(long)
    # Four standard deviations of a binomial with about 2,000 draws.
    assert abs(share - problems.WORKED_SHARE) < 0.04


def test_every_length_and_phrasing_occurs(problems: ModuleType) -> None:
    rows = problems.rows("eval", 500, seed=0)
    assert {row["operations"] for row in rows} == set(problems.OPERATIONS)
    shapes = {row["prompt"].replace(formula(row["prompt"]), "{}") for row in rows}
    assert shapes == set(problems.PHRASINGS)


def test_math_reward_reads_the_gold_completion(problems: ModuleType) -> None:
    """The gold answer must score 1, a wrong one 0."""
    rows = problems.rows("sft", 100, seed=5)
    reward = rewards.load("math")
    completions = [[{"role": "assistant", "content": row["completion"]}] for row in rows]
    right = [row["answer"] for row in rows]
    wrong = [str(int(answer) + 1) for answer in right]
    assert reward(completions, answer=right) == [1.0] * len(rows)
    assert reward(completions, answer=wrong) == [0.0] * len(rows)


@pytest.mark.parametrize(("split", "size"), [("test", 5), ("eval", 0)])
def test_bad_arguments_are_refused(problems: ModuleType, split: str, size: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        problems.rows(split, size, seed=0)


def test_examples_in_the_docstrings_hold(problems: ModuleType) -> None:
    assert doctest.testmod(problems).failed == 0
