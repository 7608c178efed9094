"""`rewards.load`: names, paths, options, columns, and what it refuses."""

import asyncio
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rewards
from rewards import Limits, RewardError, load


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(
        """
def length(completions, factor=1.0, **columns):
    return [factor * len(c) for c in completions]

def named(completions, answer, prompts=None):
    return [float(c == a) for c, a in zip(completions, answer)]

async def slow(completions, **columns):
    return [None for _ in completions]

def everything(**columns):
    return [len(columns) for _ in columns["completions"]]

class Scorer:
    async def __call__(self, completions, **columns):
        return [1 for _ in completions]

scorer = Scorer()

def no_completions(texts):
    return texts

def positional(completions, answer, /):
    return answer

def raises(completions, **columns):
    raise KeyError("the user's own fault")

constant = 3.0
"""
    )
    return path


def test_function_of_a_file_with_options(file: Path) -> None:
    reward = load(f"{file}:length", factor=0.5)
    assert reward(completions=["abcd", ""], anything=[1, 2]) == [2.0, 0.0]
    assert reward.__name__ == "length"
    assert reward.required_columns == ()


def test_function_of_a_module() -> None:
    reward = load("rewards.format:format_reward", template="boxed")
    assert reward(completions=[r"\boxed{1}", "1"]) == [1.0, 0.0]
    assert reward.__name__ == "format_reward"


@pytest.mark.parametrize("name", sorted(rewards.BUILT_IN))
def test_built_in_is_named_after_itself(name: str) -> None:
    needed = {"length": {"max_length": 10}}
    assert load(name, **needed.get(name, {})).__name__ == name


def test_only_named_columns_reach_a_function_without_kwargs(file: Path) -> None:
    reward = load(f"{file}:named")
    assert reward.required_columns == ("answer",)
    assert reward(completions=["a", "b"], answer=["a", "x"], level=[1, 2], log_metric=print) == [
        1.0,
        0.0,
    ]


def test_all_columns_reach_kwargs(file: Path) -> None:
    assert load(f"{file}:everything")(completions=["a"], x=[1], prompts=["p"]) == [3.0]


def test_missing_column_is_named(file: Path) -> None:
    with pytest.raises(
        RewardError, match=r"'named' needs column 'answer'; the data has gold, level"
    ):
        load(f"{file}:named")(completions=["a"], gold=["a"], level=[1], prompts=["p"])


@pytest.mark.parametrize("function", ["slow", "scorer"])
def test_async_stays_async(file: Path, function: str) -> None:
    reward = load(f"{file}:{function}")
    assert inspect.iscoroutinefunction(reward)
    expected = [None, None] if function == "slow" else [1.0, 1.0]
    assert asyncio.run(reward(completions=["a", "b"])) == expected


def test_error_of_the_function_itself_is_shown(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(f"{file}:raises")(completions=["a"]) == [None]
    assert 'sample 0: KeyError: "the user\'s own fault"' in caplog.text
    assert 'raise KeyError("the user' in caplog.text


def test_reward_that_limits_itself_runs_here(file: Path) -> None:
    file.write_text(
        """
import os

def here(completions, **columns):
    if columns.get("fail"):
        raise KeyError("the user's own fault")
    return [os.getpid() for _ in completions]

here.isolated = True

async def here_too(completions):
    return here(completions)

here_too.isolated = True
"""
    )
    assert load(f"{file}:here")(completions=["a"]) == [os.getpid()]
    assert asyncio.run(load(f"{file}:here_too")(completions=["a"])) == [os.getpid()]
    with pytest.raises(KeyError, match="the user's own fault"):
        load(f"{file}:here")(completions=["a"], fail=[True])
    with pytest.raises(RewardError, match="'here' limits itself; leave `seconds`"):
        load(f"{file}:here", Limits(seconds=1))


def test_column_does_not_become_an_option_of_a_built_in() -> None:
    reward = load("format", template="boxed")
    assert reward(completions=[r"\boxed{1}"], pattern=["x"]) == [1.0]


REFUSED = [
    ("mth", {}, r"unknown reward 'mth' \(did you mean 'math'\?\)"),
    ("", {}, "unknown reward"),
    ("module:", {}, "not complete"),
    ("nosuchpackage.module:f", {}, "no module 'nosuchpackage'"),
    ("rewards.format:format_rewards", {}, r"did you mean 'format_reward'\?"),
    ("rewards.format:TEMPLATES", {}, "'TEMPLATES' is dict, not a function"),
    ("{folder}/mime.py:length", {}, r"no file .*did you mean '.*mine\.py'\?"),
    ("{folder}/mine.py:lenght", {}, r"no function 'lenght' .*did you mean 'length'\?"),
    ("{folder}/mine.py:constant", {}, "'constant' is float, not a function"),
    ("{folder}/mine.py:Scorer", {}, "is a class"),
    ("{folder}/mine.py:no_completions", {}, "cannot take `completions`"),
    ("{folder}/mine.py:positional", {}, "cannot take `completions`"),
    ("{folder}/mine.py:length", {"fator": 2}, r"no option 'fator' \(did you mean 'factor'\?\)"),
    ("{folder}/mine.py:everything", {"x": 2}, "no option 'x'; it has none"),
    ("{folder}/mine.py:length", {"completions": []}, "no option 'completions'"),
    ("math", {"falback": "none"}, r"no option 'falback' \(did you mean 'fallback'\?\)"),
    ("math", {"answer": "5"}, "no option 'answer'"),
    ("math", {"fallback": "first"}, "unknown fallback 'first'; use one of none, last_number"),
    ("math", {"time_limit": 0}, "time_limit is 0"),
    ("format", {"pattern": "("}, "`pattern` '\\(' is faulty"),
    ("format", {"template": "bxed"}, "unknown template 'bxed'; use one of think_answer"),
    ("format", {"template": "boxed", "pattern": "x"}, "not both"),
    ("length", {}, "`max_length` is None; give the most tokens"),
    ("length", {"max_length": 10, "cache": 11}, "`cache` is 11; give a number of tokens from 0"),
    ("repetition", {"size": 0}, "`size` is 0; give a whole number from 1"),
    ("repetition", {"unit": "letters"}, "unknown unit 'letters'; use one of tokens, words"),
    ("{folder}/mine.py:length", {"factor": lambda: 1}, "option 'factor' cannot be handed to its"),
]


@pytest.mark.parametrize(("spec", "options", "message"), REFUSED)
def test_refused_with_the_remedy(
    file: Path, spec: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        load(spec.format(folder=file.parent), **options)


def test_file_that_fails_to_import_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import json\njson.nosuch\n")
    with pytest.raises(RewardError, match=r"importing .*broken\.py failed with AttributeError"):
        load(f"{tmp_path}/broken.py:f")


def test_module_with_a_missing_dependency_names_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match="No module named 'not_installed_here'"):
        load("needs_more:f")


def test_reward_error_is_a_value_error() -> None:
    assert issubclass(RewardError, ValueError)


def test_package_needs_neither_torch_nor_the_trainer() -> None:
    code = (
        "import sys, rewards\n"
        "rewards.load('math')(completions=[r'\\boxed{\\sqrt4}'], answer=['2'])\n"
        "rewards.load('format')\n"
        "heavy = {'torch', 'transformers', 'trl', 'numpy', 'posttrain', 'sympy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
