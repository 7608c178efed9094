"""Values inside a structure: as numbers, as names, and whether two are equal. Runs in the worker."""

import re
from functools import lru_cache
from typing import Any

from rewards.math import algebra
from rewards.math.answers import Answer, compare, read_answer
from rewards.math.structure import Node, Value
from rewards.math.tidy import DEGREES

_NAME = re.compile(r"\\?[A-Za-z]+[\w'{}]*\s*(?:\([^()=]*\))?")


@lru_cache(maxsize=2048)
def read_value(text: str) -> Answer:
    """`read_answer`, remembered."""
    return read_answer(text)


def is_settled(answer: Answer) -> bool:
    """Whether an answer can be compared without algebra."""
    return answer.number is not None or answer.digits is not None or answer.phrase is not None


def values_equal(gold: str, answer: str) -> bool:
    """Whether two values are equal, by `answers.compare` or by algebra."""
    wanted, stated = read_value(gold), read_value(answer)
    verdict = compare(wanted, stated)
    if verdict is not None:
        return verdict
    if wanted.unit and stated.unit and wanted.unit != stated.unit:
        return False
    first, second = wanted.latex, stated.latex
    if (DEGREES in first) != (DEGREES in second):
        # The sign for degrees may be left out, as other units may.
        first, second = first.replace(DEGREES, " "), second.replace(DEGREES, " ")
    try:
        a, b = _parsed(wanted, first), _parsed(stated, second)
    except algebra.UnreadableError:
        return False
    return algebra.same(a, b, algebra.tolerance(first, second))


def parse_value(value: Value) -> Any:
    """A value as sympy's. Raises algebra.UnreadableError and TooLargeError."""
    read = read_value(value.text)
    return _parsed(read, read.latex)


def _parsed(answer: Answer, latex: str) -> Any:
    # Mixed numbers are read here alone: to a parser 1 1/2 is a product.
    return algebra.parse(latex) if answer.number is None else algebra.rational(answer.number)


def is_number(node: Node) -> bool:
    """Whether a node is a value without variables."""
    if not isinstance(node, Value):
        return False
    if read_value(node.text).number is not None:
        return True
    try:
        parsed = algebra.parse(read_value(node.text).latex)
    except algebra.UnreadableError:
        return False
    return not parsed.free_symbols


def is_name(value: Value) -> bool:
    """Whether a value is no more than the name of something: x, y_1, f(x), \\theta."""
    return _NAME.fullmatch(value.text.strip()) is not None
