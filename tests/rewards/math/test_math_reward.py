"""The verdicts of `math`, its golds, its options and its metrics."""

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards import RewardError, load

EQUAL = [
    # numbers
    ("5", "5"),
    ("2.5", "2.50"),
    ("-5", "\N{MINUS SIGN}5"),
    ("10,000", "10{,}000"),
    ("10000", r"10,\!000"),
    ("10000", r"10\,000"),
    ("1/2", r"\frac12"),
    ("0.5", r"\dfrac{1}{2}"),
    (r"\frac{2}{4}", r"\frac 1{2}"),
    ("0.333333", r"\frac13"),
    ("2.75", r"2\frac34"),
    ("-2.75", r"-2\frac{3}{4}"),
    ("11/4", "2 3/4"),
    (r"\$32", "32"),
    ("18", r"\$18.00"),
    ("25", r"25\text{ cm}^2"),
    (r"25\text{ cm}^2", "25"),
    ("1.5", "1.5 hours"),
    ("45", "45 miles per hour"),
    ("90", r"90^\circ"),
    ("50", r"50\%"),
    ("0.5", "50%"),
    (r"9\%", "9"),
    ("1101_4", "1101_{4}"),
    ("1101_4", "1101"),
    # phrases
    (r"\text{Friday}", "friday"),
    ("C", r"\text{(C)}"),
    (r"\text{(E)}", "E"),
    ("B, E, G", r"\text{B, G, and E}"),
    ("4:30 p.m.", r"4:30 \text{ pm}"),
    # formulas
    (r"\sqrt{8}", r"2\sqrt2"),
    ("(1,2)", "(1, 2)"),
    ("1,2", "2, 1"),
    (r"\{1,2\}", "1,2"),
    (r"12 \text{ and } 13", "12, 13"),
    (r"\frac{2\pi}{3}", r"\frac{2}{3}\pi"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"[1,\infty)", r"[1, \infty)"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("y=2x+3", "2x+3"),
    (r"3+\sqrt2,3-\sqrt2", r"3\pm\sqrt2"),
    (r"\frac{12}{5,\!525}", r"\frac{24}{11050}"),
    (r"8\sqrt{3} \text { square inches}", r"8\sqrt3"),
    (r"\frac{7}{5} + \frac{1}{5} i.", r"\frac{7+i}{5}"),
]
UNEQUAL = [
    ("5", "6"),
    ("5", ""),
    ("5", "5, 6"),
    ("5", "1,2,3,4,5"),
    ("5", r"\{1,2,3,4,5\}"),
    ("5", "5 or 6"),
    ("5", "x=5, y=6"),
    ("5", "5x"),
    ("5", "5 6"),
    ("5", "5,000"),
    ("1/2", "0.4999"),
    ("1/3", "0.33"),
    ("18", "18.0000001"),
    ("10%", "1000%"),
    ("0.5", "50"),
    ("1101_4", "1101_5"),
    ("1,2", "1,2,3"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "(1,2)"),
    ("C", "A"),
    ("C", "A,B,C,D"),
    (r"\sqrt{2}", "1.414"),
    (r"\pi", "3.14"),
    ("3", "x>3"),
    ("3", r"3\mathrm{i}"),
    ("x", "y"),
    ("2x", "2"),
    (r"\text{Friday}", r"\text{Monday}"),
    (r"\text{Friday}", "5"),
    (r"\infty", "999999999999"),
    ("4:30 p.m.", r"4:30 \text{ a.m.}"),
]


def boxed(answer: str) -> str:
    return rf"So it is \boxed{{{answer}}}."


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold: str, answer: str) -> None:
    assert load("math")(completions=[boxed(answer)], answer=[gold]) == [1.0]


@pytest.mark.parametrize(("gold", "answer"), UNEQUAL)
def test_unequal(gold: str, answer: str) -> None:
    assert load("math")(completions=[boxed(answer)], answer=[gold]) == [0.0]


@pytest.mark.parametrize("gold", sorted({gold for gold, _ in EQUAL}))
def test_gold_equals_itself(gold: str) -> None:
    assert load("math")(completions=[boxed(gold)], answer=[gold]) == [1.0]


@pytest.mark.parametrize(
    ("gold", "value"),
    [
        ("She has 3 + 4 = <<3+4=7>>7 apples.\n#### 7", "7"),
        (r"Adding gives $\boxed{\frac{7}{2}}$.", "3.5"),
        (7, "7"),
        (3.5, "3.5"),
        (1e-07, "0.0000001"),
    ],
)
def test_gold_may_be_a_solution_or_a_number(gold: Any, value: str) -> None:
    reward = load("math")
    assert reward(completions=[boxed(value), boxed("8")], answer=[gold, gold]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "gold",
    [
        "",
        " ",
        "...",
        "???",
        r"\frac{1}{",
        "x^",
        "5 +",
        r"\sqrt",
        r"\foo{1}",
        "$",
        float("nan"),
        [5],
    ],
)
@pytest.mark.parametrize("completion", [boxed("5"), "no answer at all"])
def test_unreadable_gold_names_its_row(gold: Any, completion: str) -> None:
    with pytest.raises(RewardError, match=r"gold answer of row 1 of the batch.*column 'answer'"):
        load("math")(completions=["#### 5", completion], answer=["5", gold])


def test_gold_that_equals_the_completion_must_still_be_readable() -> None:
    with pytest.raises(RewardError, match="row 0"):
        load("math")(completions=[boxed("???")], answer=["???"])


def test_gold_of_none_does_not_apply() -> None:
    assert load("math")(completions=["#### 5", "#### 5"], answer=[None, "5"]) == [None, 1.0]


def test_missing_or_short_answer_column() -> None:
    reward = load("math")
    assert reward.required_columns == ("answer",)
    with pytest.raises(RewardError, match="needs column 'answer'; the data has solution"):
        reward(completions=["#### 5"], solution=["5"])
    with pytest.raises(RewardError, match="2 completions but 1 values in column 'answer'"):
        reward(completions=["#### 5", "#### 5"], answer=["5"])


def test_fallback() -> None:
    batch = {"completions": ["2 + 3 makes 5", "2 + 3 makes 6"], "answer": ["5", "5"]}
    assert load("math")(**batch) == [0.0, 0.0]
    assert load("math", fallback="last_number")(**batch) == [1.0, 0.0]


def test_chat_completions() -> None:
    completion = [{"role": "assistant", "content": boxed("5")}]
    assert load("math")(completions=[completion], answer=["5"]) == [1.0]


def test_time_limit_scores_zero_and_is_counted() -> None:
    metrics: dict[str, float] = {}
    reward = load("math", time_limit=0.5)
    values = reward(
        completions=[boxed("9^{9^{9^9}}"), boxed("9^{9^{9^9}}"), boxed(r"\sqrt{4}")],
        answer=["5", "5", "2"],
        log_metric=metrics.__setitem__,
    )
    # Each completion that lost its reward counts; the next pair is judged all the same.
    assert values == [0.0, 0.0, 1.0]
    assert metrics.pop("reward/math/seconds") > 0.0
    assert metrics == {"reward/math/timeouts": 2.0, "reward/math/errors": 0.0}


def test_metrics_are_logged_when_nothing_happened() -> None:
    metrics: dict[str, float] = {}
    load("math")(completions=["#### 5"], answer=["5"], log_metric=metrics.__setitem__)
    assert metrics.pop("reward/math/seconds") > 0.0
    assert metrics == {"reward/math/timeouts": 0.0, "reward/math/errors": 0.0}


@pytest.mark.parametrize(
    "answer",
    [
        r"\frac{" * 10_000 + "1" + "}{2}" * 10_000,
        "{" * 100_000,
        "1" * 5_000,
        "(" * 200 + "1" + ")" * 200,
        r"\frac{1}{0}",
        "1/0",
        "\ud800",
        "\x00\u202e5",
        "\\",
        "$$$$",
        "x" * 999,
    ],
)
def test_hostile_answers_score_zero(answer: str) -> None:
    values = load("math", time_limit=0.5)(
        completions=[boxed(answer), f"#### {answer}", f"The answer is {answer}"],
        answer=["7", "7", r"\text{seven}"],
    )
    assert values == [0.0, 0.0, 0.0]


pieces = st.sampled_from(
    [
        *[r"\boxed{", r"\frac", r"\sqrt", r"\text{", r"\left(", r"\pi", r"\begin{matrix}"],
        *["<answer>", "</answer>", "</think>"],
        *["#### ", "the answer is ", "A: ", "and ", "1,000", "\n"],
        *r"7x{}$\^_&,=%/-+()[]:.!| ",
    ]
)
texts = st.one_of(st.text(max_size=200), st.lists(pieces, max_size=25).map("".join))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.one_of(texts, texts.map(boxed)),
    gold=st.sampled_from(
        [
            *["7", "1/2", r"\sqrt{2}", "(1,2)", r"\text{even}", "x+1", "11_2", "(1,2]", "x = 7"],
            *[
                r"\pm 2",
                r"\begin{pmatrix} 7 \\ 1 \end{pmatrix}",
                "C",
                r"7\text{ cm}",
                r"7\%",
                "7:1",
            ],
        ]
    ),
    fallback=st.sampled_from(["none", "last_number"]),
)
def test_any_text_gets_a_number_in_range(text: str, gold: str, fallback: str) -> None:
    metrics: dict[str, float] = {}
    reward = load("math", fallback=fallback, time_limit=1.0)
    values = reward(completions=[text], answer=[gold], log_metric=metrics.__setitem__)
    assert values in ([0.0], [1.0])


@settings(max_examples=100, deadline=None)
@given(gold=texts)
def test_any_gold_is_read_or_refused(gold: str) -> None:
    try:
        outcome = str(load("math")(completions=["none"], answer=[gold]))
    except RewardError as error:
        outcome = str(error)
    assert outcome == "[0.0]" or "row 0 of the batch" in outcome


def test_plain_numbers_are_fast() -> None:
    count = 1000
    completions = [
        f"She sells {i} eggs at $2, which makes {i} * 2 = <<{i}*2={2 * i}>>{2 * i}.\n#### {2 * i:,}"
        for i in range(count)
    ]
    reward = load("math")
    seconds = []
    for _ in range(3):
        start = time.process_time()
        values = reward(completions=completions, answer=[str(2 * i) for i in range(count)])
        seconds.append(time.process_time() - start)
        assert values == [1.0] * count
    # 14,000 a second on an idle core, 5,000 beside busy neighbours; 2,000 on two cores is promised.
    # Processor time, best of three: what others do on this machine should not matter.
    assert count / min(seconds) > 2000
