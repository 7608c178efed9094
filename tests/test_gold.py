"""`posttrain rewards check`: gold answers of a file, in whatever columns and form they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain import cli, gold, tasks
from posttrain.recipe import DataSource, RewardSection

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write(*rows: dict[str, Any]) -> str:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "rows.jsonl"

    return write


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    code = cli.main(["rewards", "check", *words])
    printed = capsys.readouterr()
    return code, (printed.out + printed.err).splitlines()


@pytest.mark.parametrize(
    ("row", "words", "head"),
    [
        ({"question": "q", "answer": "4 + 3 = 7\n#### 7"}, [], "column `answer`"),
        (
            {"problem": "p", "solution": r"so \boxed{7}"},
            [],
            "column `solution`, compared with column `solution`",
        ),
        (
            {"prompt": "p", "answer": "7"},
            [],
            "column `answer`, written as '\\\\boxed{..}' (--completion sets another form)",
        ),
        (
            {"question": "q", "rationale": "3 + 4", "correct": "7"},
            ["--completion", "{rationale}\n#### {correct}", "--answer={correct}"],
            "'{rationale}\\n#### {correct}'",
        ),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": "#### 7", "answer": "7"},
            [],
            "column `completion`",
        ),
    ],
)
def test_columns_and_forms(
    rows: Any,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, Any],
    words: list[str],
    head: str,
) -> None:
    code, lines = check(capsys, "math", "--data", rows(row, row), *words)
    assert (code, lines[0]) == (0, f"math on rows.jsonl: gold answers from {head}")
    assert lines[1] == "top score 1: 2 of 2 rows"
    assert lines[3].startswith("time a sample: mean ")
    assert lines[4].startswith("slowest: row ")


def test_what_does_not_get_the_top_score_is_listed(
    rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {"answer": "#### 7", "question": "q"}
    file = rows(right, {"answer": "seven or so", "question": "q"}, right)
    code, lines = check(capsys, "format", "--data", file, "template=hashes")
    assert code == cli.FAILED
    assert lines[1:3] == ["row 1: 0", "top score 1: 2 of 3 rows"]


def test_form_stays_when_none_is_better(rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["format", "--data", rows({"answer": "7", "question": "q"}), "pattern=none"]
    code, lines = check(capsys, *words)
    assert code == cli.FAILED
    assert lines[0] == "format on rows.jsonl: gold answers from column `answer`"


def test_row_without_an_answer_is_listed(rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = rows({"answer": "#### 7"}, {"answer": None}, {"answer": 7})
    code, lines = check(capsys, "math", "--data", file)
    assert code == cli.FAILED
    assert lines[1:3] == ["row 1: none", "top score 1: 2 of 3 rows"]


def test_gold_that_cannot_be_read_is_a_listed_row(
    rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = rows({"answer": "#### 7"}, {"answer": "#### "})
    code, lines = check(capsys, "math", "--data", file)
    assert code == cli.FAILED
    assert lines[1].startswith("row 1: none (reward 'math': the gold answer of row 0")


def test_options_limits_and_own_reward(rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(
        "import time\ndef mine(completions, word='', pause=0.0):\n    time.sleep(pause)\n"
        "    return [float(word in c[0]['content']) for c in completions]\n"
    )
    file = rows({"completion": "a word", "prompt": "p"})
    words = ["mine.py:mine", "--data", file, "word=word"]
    assert check(capsys, *words)[0] == 0
    code, lines = check(capsys, *words, "pause=5.0", "--seconds", "0.5")
    assert code == cli.FAILED
    assert "row 0: none (timed out)" in lines


def test_tokens(rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = rows({"completion": "1 + 2 = 3", "prompt": "p"})
    words = ["length", "--data", file, "--tokenizer", str(ROOT / "data/arithmetic/tokenizer")]
    assert check(capsys, *words, "max_length=100")[0] == 0
    assert check(capsys, *words, "max_length=4")[0] == cli.FAILED


@pytest.mark.parametrize(
    ("row", "words", "message"),
    [
        ({"question": "q"}, ["math"], "no column completion, solution, code"),
        ({"completion": "c"}, ["math", "--data", "none.jsonl"], "none.jsonl: there is no such"),
        ({"completion": "c"}, ["mth"], r"unknown reward 'mth' (did you mean 'math'?)"),
        ({"code": "c"}, ["math"], "the reward math reads the column answer; the data has code"),
        ({"completion": "c"}, ["format", "colour=red"], "has no option 'colour'"),
        ({"completion": "c"}, ["math", "--seconds", "1"], "'math' limits itself"),
        ({"answer": "7"}, ["math", "--completion={gold}"], "no column `gold`"),
        (
            {"answer": "7"},
            ["math", "--data", str(ROOT / "data/arithmetic/problems.py"), "--answer={answer}"],
            "a script's rows are used as they are",
        ),
    ],
)
def test_refused(
    rows: Any,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, Any],
    words: list[str],
    message: str,
) -> None:
    code, lines = check(capsys, "--data", rows(row), *words)
    assert code == cli.WRONG
    assert message in "\n".join(lines)


def test_default_of_make(capsys: pytest.CaptureFixture[str]) -> None:
    """`make check-reward`, with the numbers of answers that the data's own test checks."""
    code, lines = check(capsys, "math", "--data", str(ROOT / "data/arithmetic/problems.py"))
    assert (code, lines[1]) == (0, "top score 1: 500 of 500 rows")


def test_trial_takes_what_gold_there_is(rows: Any) -> None:
    """A completion, else the answer; never nothing, which no reward can read."""
    Path("mine.py").write_text(
        "def mine(completions, completion_ids, prompts, level):\n"
        "    seen = [c[0]['content'] for c in completions]\n"
        "    assert seen == ['c', 'c', '2', '2'], seen\n"
        "    assert all(completion_ids)\n"
        "    assert prompts[0] == prompts[1] != prompts[2]\n"
        "    return [1] * 4\n"
    )
    file = rows(
        {"prompt": "p", "completion": "c", "answer": "1", "level": 1},
        {"prompt": "q", "completion": None, "answer": "2", "level": 2},
        {"prompt": "r", "completion": "c", "answer": "3", "level": 3},
    )
    reward = RewardSection("mine.py:mine", workers=1, group_wise=False).load()
    gold.trial([reward], tasks.load(DataSource(path=file)))


def test_limits_of_a_recipe_reach_the_reward(rows: Any) -> None:
    Path("mine.py").write_text(
        "def mine(completions):\n    return [1 / len(c) for c in completions]\n"
    )
    section = RewardSection("mine.py:mine", failed=-2.0, seconds=3.0, workers=1, group_wise=True)
    assert section.load()(completions=["ab", ""], prompts=["p", "p"]) == [-2.0, -2.0]
