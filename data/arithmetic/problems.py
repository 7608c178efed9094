"""Arithmetic problems with worked solutions, made from a seed; standard library only.

A problem is a chain of `operations` additions, subtractions and products of small numbers, such as
`7 + 9 - 3 * 5`. Products come first, as usual; read from left to right, no addition takes the running total
above 20 and no subtraction below 0. The solution works down the chain, one operation a line:

    What is 7 + 9 - 3 * 5?

    7 + 9 = 16
    3 * 5 = 15
    16 - 15 = 1
    #### 1

The rows of the `sft` split show the working for every short problem, but only for a share of the long ones; the
other long ones have the bare answer. A policy that imitates them answers long problems in its head and is often
wrong: reinforcement learning has to find out that writing the working down pays.

No problem is in two splits: a hash of the expression says which split it belongs to, whatever the seed and the size.
"""

import hashlib
import random
from collections.abc import Iterator

Term = tuple[int, ...]  # (n,) is a number, (a, b) is the product a * b
Chain = list[tuple[str, Term]]  # each term with the sign before it; the first sign is "+"

OPERATIONS = range(2, 6)
LARGEST_TOTAL = 20
LARGEST_ADDEND = 9
FACTORS = range(2, 6)

SHORT = 3  # up to this many operations a row of `sft` always shows the working
WORKED_SHARE = 0.4  # of the longer ones

PHRASINGS = (
    "What is {}?",
    "How much is {}?",
    "Calculate {}.",
    "Compute {}.",
    "Work out {}.",
    "Please evaluate {}.",
    "Find the value of {}.",
    "{} = ?",
)

# Upper ends of the splits' shares of a hash in 0..99.
SPLITS = {"eval": 10, "curve": 15, "train": 50, "sft": 100}


def rows(split: str, size: int, seed: int) -> list[dict[str, str | int]]:
    """Return `size` rows of a split, all different problems, the same ones for the same arguments.

    As they differ, a large call runs out of short ones and holds more of the long: there are some 2,000 with two
    operations. Every row has `prompt`, `answer` (the digits of the result) and `operations`; those of `sft` also have
    `completion`. Splits: `sft`, `train` (for reinforcement learning), `curve` (to watch a run) and `eval` (for the
    final score, drawn on by nothing else).

    Raises ValueError for an unknown split or a size below 1.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    rng = random.Random(f"{split} {seed}")
    seen: set[str] = set()
    made: list[dict[str, str | int]] = []
    while len(made) < size:
        operations = rng.choice(OPERATIONS)
        chain = draw_chain(rng, operations)
        text = expression(chain)
        if text in seen or split_of(text) != split:
            continue
        seen.add(text)
        steps, total = solve(chain)
        row: dict[str, str | int] = {
            "prompt": rng.choice(PHRASINGS).format(text),
            "answer": str(total),
            "operations": operations,
        }
        if split == "sft":
            worked = operations <= SHORT or rng.random() < WORKED_SHARE
            row["completion"] = "\n".join([*(steps if worked else []), f"#### {total}"])
        made.append(row)
    return made


def split_of(text: str) -> str:
    """Return the one split that an expression belongs to, from its SHA-256 alone.

    >>> split_of("7 + 9 - 3 * 5")
    'sft'
    """
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return next(split for split, end in SPLITS.items() if bucket < end)


def expression(chain: Chain) -> str:
    """Write a chain as a formula.

    >>> expression([("+", (7,)), ("+", (9,)), ("-", (3, 5))])
    '7 + 9 - 3 * 5'
    """
    (_, first), *rest = chain
    return "".join([product(first), *(f" {sign} {product(term)}" for sign, term in rest)])


def product(term: Term) -> str:
    """Write a term: `7`, or `3 * 5`."""
    return " * ".join(map(str, term))


def solve(chain: Chain) -> tuple[list[str], int]:
    """Return the lines of the working, one an operation, and the result.

    >>> solve([("+", (7,)), ("+", (9,)), ("-", (3, 5))])
    (['7 + 9 = 16', '3 * 5 = 15', '16 - 15 = 1'], 1)
    """
    lines: list[str] = []
    total = 0
    for position, (sign, term) in enumerate(chain):
        value = term[0]
        if len(term) == 2:
            value = term[0] * term[1]
            lines.append(f"{product(term)} = {value}")
        before, total = total, total + (value if sign == "+" else -value)
        if position > 0:
            lines.append(f"{before} {sign} {value} = {total}")
    return lines, total


def draw_chain(rng: random.Random, operations: int) -> Chain:
    """Draw a chain with this many operations whose additions and subtractions stay within 0..LARGEST_TOTAL."""
    while True:
        products = rng.randint(0, (operations + 1) // 2)
        kinds = [True] * products + [False] * (operations + 1 - 2 * products)
        rng.shuffle(kinds)
        chain = list(_draw_terms(rng, kinds))
        if len(chain) == len(kinds):
            return chain


def _draw_terms(rng: random.Random, kinds: list[bool]) -> Iterator[tuple[str, Term]]:
    """Yield signed terms, a product where `kinds` says so; stop early where neither sign keeps the bounds."""
    total = 0
    for position, is_product in enumerate(kinds):
        if is_product:
            term: Term = (rng.choice(FACTORS), rng.choice(FACTORS))
            value = term[0] * term[1]
        else:
            term = (rng.randint(1, LARGEST_ADDEND),)
            value = term[0]
        fits = [
            sign
            for sign, moved in (("+", total + value), ("-", total - value))
            if 0 <= moved <= LARGEST_TOTAL
        ]
        if position == 0:
            fits = ["+"]
        if not fits:
            return
        sign = rng.choice(fits)
        total += value if sign == "+" else -value
        yield sign, term
