"""Text that tries to hang or blow up the verifier: reward 0, in time, whatever the thread."""

import resource
import threading
import time
from typing import Any

import pytest

from rewards import load
from rewards.math.pool import shared_pool

# Each reaches a limit, of time or of size, and is counted.
ENDLESS = {
    "tower of powers": "9^{9^{9^9}}",
    "tower over a fraction": r"\frac{1}{9^{9^{9}}}",
    "factorials of factorials": "((((9!)!)!)!)!",
    "a large factorial": "10000000000!",
    "fractions nested 10,000 deep": r"\frac{" * 10_000 + "1" + "}{2}" * 10_000,
    "100 KB of braces": "{" * 50_000 + "}" * 50_000,
    "lists nested 60 deep": "(" * 60 + "1,2" + ",3)" * 60,
    "binomial": r"\binom{10^9}{5 \cdot 10^8}",
    "integral without closed form": r"\int_0^1 \sin(\sin(x^x)) e^{x^2} dx",
    "indefinite integral": r"\int \frac{\sqrt{1+x^7}}{\ln(\sin(x)+2)} dx",
    "long sum": r"\sum_{k=1}^{10^{12}} \frac{\sin k}{k^k}",
    "long product": r"\prod_{k=1}^{10^9} (k^2+1)",
}
# Each may be judged, or reach a limit: it is wrong and must not hang.
WRONG = {
    "100 KB of open braces": "{" * 100_000,
    "brackets nested 450 deep": "(" * 450 + "1" + ")" * 450,
    "empty fractions": r"\frac{}{}" * 50,
    "fractions nested 60 deep": r"\frac{" * 60 + "1" + "}{2}" * 60,
    "roots nested 120 deep": r"\sqrt{" * 120 + "2" + "}" * 120,
    "many signs": "-" * 900 + "5",
    "many bars": "|" * 900,
    "many factorials": "5" + "!" * 800,
    "many indices": "x_" * 450 + "x",
    "many commas": "1," * 499,
    "many equations": "1=" * 499 + "1",
    "many unions": r"(1,2)\cup" * 100 + "(1,3)",
    "many plus-minus": r"1\pm" * 60 + "1",
    "power of a sum": "(x+y+z+w)^{500}",
    "power of a matrix": r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{10^9}",
    "1,000 digits": "9" * 990,
    "exponents of floats": "1e999999999",
    "no value": r"\frac{5}{0}",
    "no limit": r"\lim_{n\to\infty} (-1)^n",
    "nested sines": r"\sin(" * 90 + "1" + ")" * 90,
    "open groups": r"\left(" * 150,
    "open environments": r"\begin{matrix}" * 60,
    "files": r"\input{/etc/passwd}",
    "code": "__import__('os').system('true')",
    "right to left": "\u202e31\u202c",
    "combining marks": "5" + "\u0301" * 900,
    "a surrogate": "\ud8005",
    "a NUL among signs": "\x00\x01\x02",
    "Cyrillic x": "\u0445=7+1",
    "digits of other scripts": "\u0665",
    "letters that are digits": "\U0001d7d3",
    "emoji": "\U0001f4a5" * 300,
}
GOLDS = ["7", "(x,2]", r"\text{seven}"]


def judge(texts: list[str], **options: Any) -> tuple[list[float], dict[str, float]]:
    """Every text as the answer to every gold, in every place where an answer may stand."""
    completions, answers = [], []
    for text in texts:
        for gold in GOLDS:
            for place in (r"\boxed{%s}", "#### %s", "<answer>%s</answer>", "The answer is %s"):
                completions.append(place % text)
                answers.append(gold)
    metrics: dict[str, float] = {}
    reward = load("math", fallback="last_number", **options)
    values = reward(completions=completions, answer=answers, log_metric=metrics.__setitem__)
    return values, metrics


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    shared_pool().ask([("x", "y")] * 8, 30.0)


@pytest.mark.parametrize("name", ENDLESS)
def test_reward_zero_and_a_counted_timeout(name: str) -> None:
    metrics: dict[str, float] = {}
    start = time.process_time()
    values = load("math", time_limit=0.25)(
        completions=[rf"So it is \boxed{{{ENDLESS[name]}}}."] * 3,
        answer=["7", "7", r"\sqrt{2}"],
        log_metric=metrics.__setitem__,
    )
    assert values == [0.0, 0.0, 0.0]
    assert metrics["reward/math/timeouts"] == 3.0
    assert metrics["reward/math/errors"] == 0.0
    # This process reads text in linear time and waits; what computes is killed from here.
    assert time.process_time() - start < 0.3


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_worth_nothing(name: str) -> None:
    values, metrics = judge([WRONG[name]], time_limit=0.1)
    assert values == [0.0] * len(values)
    # Twelve formulas of a tenth of a second on one processor; ten times that by a busy clock.
    assert metrics["reward/math/seconds"] < 15.0


def test_the_default_limit_is_two_seconds() -> None:
    metrics: dict[str, float] = {}
    answer = rf"\boxed{{{ENDLESS['integral without closed form']}}}"
    values = load("math")(completions=[answer], answer=["7"], log_metric=metrics.__setitem__)
    assert values == [0.0]
    assert metrics["reward/math/timeouts"] == 1.0
    # Two seconds of processor time, up to ten times that by the clock of a busy machine.
    assert 1.9 < metrics["reward/math/seconds"] < 21.0


def test_off_the_main_thread_with_a_good_answer_among_them() -> None:
    found: list[list[float]] = []

    def run() -> None:
        answers = [*list(ENDLESS.values())[-3:], r"\frac{14}{2\sqrt{1}}"]
        found.append(
            load("math", time_limit=0.3)(
                completions=[rf"\boxed{{{answer}}}" for answer in answers], answer=["7"] * 4
            )
        )

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    assert found == [[0.0, 0.0, 0.0, 1.0]]


def test_this_process_does_not_grow() -> None:
    judge(list(WRONG.values())[:2], time_limit=0.1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    texts = ["{" * 900_000, r"\boxed{" * 120_000]
    assert load("math", time_limit=0.1)(completions=texts, answer=["7", "7"]) == [0.0, 0.0]
    # In kilobytes on Linux: a hundred or so bytes for each open brace, nothing that grows faster.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.slow
def test_a_batch_full_of_endless_formulas() -> None:
    """64 of them: on two processors 64 s of the default limit, not 64 times two after each other."""
    answers = [rf"\boxed{{\int_0^1 \sin(\sin(x^x)) e^{{x^{{{n}}}}} dx}}" for n in range(2, 66)]
    metrics: dict[str, float] = {}
    values = load("math", time_limit=1.0)(
        completions=answers, answer=["7"] * 64, log_metric=metrics.__setitem__
    )
    assert values == [0.0] * 64
    assert metrics["reward/math/timeouts"] == 64.0
    waited = 64.0 / shared_pool().children
    # With free processors; ten times that beside others.
    assert metrics["reward/math/seconds"] < 10.0 * waited
