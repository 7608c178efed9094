"""Throughput of the math reward, side by side with math-verify's own verdicts, and its agreement.

    python bench/math_rewards.py [--rows 6000] [--verdicts FILE ...]

Made-up responses in the style of GSM8K and of MATH; the same texts go to both. math-verify runs as its
README shows, `verify(parse(gold), parse(response))`, in one process and without its time limit, which
costs it time and needs the main thread. The last table takes a batch of formulas that never end.
A file of verdicts has one JSON row a line with `response`, `gold` and `expected` (0 or 1).
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import math_verify

import rewards

Rows = tuple[list[str], list[str]]


def gsm8k_rows(count: int) -> Rows:
    """Word-problem answers: three in four right, in the forms that models use."""
    endings = ["#### {:,}", "The answer is {}.", r"So it is $\boxed{{{}}}$.", "A: {}"]
    responses, golds = [], []
    for row in range(count):
        eggs, price = row % 97 + 3, row % 13 + 2
        total = eggs * price
        stated = total + (row % 4 == 0)
        steps = (
            f"She has {eggs + 4} eggs and eats 4, so {eggs + 4} - 4 = <<{eggs + 4}-4={eggs}>>{eggs} "
            f"are left.\nShe sells them at ${price} each, which makes {eggs} * {price} = "
            f"$<<{eggs}*{price}={total}>>{stated}.\n"
        )
        responses.append(steps * 2 + endings[row % 4].format(stated))
        golds.append(str(total))
    return responses, golds


def math_rows(count: int) -> Rows:
    """Formulas: a third each plain numbers, the gold in another form, and nearly the gold."""
    responses, golds = [], []
    for row in range(count):
        a, b = row % 89 + 2, row % 83 + 3
        forms = [
            (
                rf"\frac{{{a}}}{{{b}}}",
                rf"\dfrac{{{2 * a}}}{{{2 * b}}}",
                rf"\frac{{{a + 1}}}{{{b}}}",
            ),
            (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}", rf"{a}\sqrt{{{b + 1}}}"),
            (rf"x^2+{a + b}x+{a * b}", rf"(x+{a})(x+{b})", rf"(x-{a})(x+{b})"),
            (rf"\left({a}, -{b}\right]", rf"({a}, -{b}]", rf"[{a}, -{b}]"),
            (f"{a}, {a + b}", f"{a + b}, {a}", f"{a}, {b}, {a + b}"),
        ]
        gold, same, other = forms[row % len(forms)]
        stated = (gold, same, other)[row // len(forms) % 3]
        responses.append(
            f"Let us see. We set ${a} = n$ and find, after some steps, "
            rf"\[ \boxed{{{stated}}} \] as the final answer."
        )
        golds.append(gold)
    return responses, golds


def by_rewards(responses: list[str], golds: list[str]) -> list[float]:
    """Verdicts of the reward `math`."""
    return rewards.load("math")(completions=responses, answer=golds)


def by_math_verify(responses: list[str], golds: list[str]) -> list[float]:
    """Verdicts of math-verify, each gold in dollars as it wants them."""
    parse = math_verify.parse
    return [
        float(
            math_verify.verify(
                parse(f"${gold}$", parsing_timeout=None),
                parse(response, parsing_timeout=None),
                timeout_seconds=None,
            )
        )
        for response, gold in zip(responses, golds, strict=True)
    ]


def throughput(name: str, rows: Rows, judge: Callable[..., list[float]], label: str) -> None:
    """One row of the table; a first call outside the measurement fills parsers and starts workers."""
    responses, golds = rows
    judge(responses[:30], golds[:30])
    start = time.perf_counter()
    values = judge(responses, golds)
    seconds = time.perf_counter() - start
    print(f"| {name} | {label} | {len(values) / seconds:,.0f} | {sum(values) / len(values):.3f} |")


def hostile(count: int) -> None:
    """A batch in which every formula takes its whole time limit."""
    formulas = [rf"\boxed{{\int_0^1 \sin(\sin(x^x)) e^{{x^{n}}} dx}}" for n in range(2, 2 + count)]
    metrics: dict[str, float] = {}
    rewards.load("math")(completions=formulas, answer=["7"] * count, log_metric=metrics.__setitem__)
    print(
        f"\n{count} formulas that never end: {metrics['reward/math/seconds']:.1f} s, "
        f"{metrics['reward/math/timeouts']:.0f} timeouts"
    )


def agreement(path: Path) -> None:
    """How many of the labels in `path` the reward gives too, and the first rows where it does not."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    values = by_rewards([row["response"] for row in rows], [row["gold"] for row in rows])
    wrong = [n for n, row in enumerate(rows) if values[n] != float(row["expected"])]
    print(f"{path.name}: {len(rows) - len(wrong)} of {len(rows)} agree; others: rows {wrong[:20]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--verdicts", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    print(f"{len(os.sched_getaffinity(0))} processors, {arguments.rows} responses\n")
    print("| responses | verdicts by | a second | rewarded |\n|---|---|---|---|")
    for name, rows in (
        ("GSM8K style", gsm8k_rows(arguments.rows)),
        ("MATH style", math_rows(arguments.rows)),
    ):
        throughput(name, rows, by_rewards, "rewards `math`")
        share = tuple(part[: arguments.rows // 10] for part in rows)
        throughput(name, share, by_math_verify, "math-verify")
    hostile(8)
    for path in arguments.verdicts:
        agreement(path)


if __name__ == "__main__":
    main()
