"""Whether an answer equals the gold: structure by structure, values by `algebra`. Runs in the worker."""

import re
from functools import lru_cache
from typing import Any

import sympy

from rewards.math import algebra
from rewards.math.answers import read_answer
from rewards.math.regions import FLIPPED, is_region, region, same_region
from rewards.math.structure import Items, Join, Matrix, Node, Relation, Value, read_structure
from rewards.math.tidy import tidy
from rewards.math.values import (
    is_name,
    is_number,
    is_settled,
    parse_value,
    read_value,
    values_equal,
)

MAX_ITEMS = 60
# How far, relative to values above 1, the two sides of an "about equal" may be from each other.
ROUNDED = sympy.Rational(1, 100)


def readable(gold: str) -> bool:
    """Whether every part of a gold is a number, a phrase or a formula."""
    return _readable(_read(gold))


def equal(gold: str, answer: str) -> bool:
    """Whether `answer` says the same as `gold`, both as they were extracted."""
    return _equal(_read(gold), _read(answer))


@lru_cache(maxsize=512)
def _read(text: str) -> Node:
    found = read_answer(text)
    if is_settled(found):
        return Value(text)
    return read_structure(tidy(text) if found.phrase else found.latex)


def _readable(node: Node) -> bool:
    match node:
        case Value(text):
            if is_settled(read_value(text)) or region(node) is not None:
                return True
            try:
                parse_value(node)
            except algebra.UnreadableError:
                return False
            return True
        case Items(_, _, items):
            return all(map(_readable, items))
        case Matrix(rows):
            return bool(rows) and all(_readable(cell) for row in rows for cell in row)
        case Relation(parts, _) | Join(_, parts):
            return all(map(_readable, parts))


def _equal(gold: Node, answer: Node) -> bool:
    if gold == answer:
        return True
    if isinstance(gold, Value) and isinstance(answer, Items) and "," in gold.text:
        # 100,200 may be a number or a list: as the answer has it.
        gold = read_structure(tidy(gold.text))
    elif isinstance(answer, Value) and isinstance(gold, Items) and "," in answer.text:
        answer = read_structure(tidy(answer.text))
    if is_region(gold) or is_region(answer):
        gold_region, answer_region = region(gold), region(answer)
        if gold_region is not None and answer_region is not None:
            return bool(gold_region == answer_region) or same_region(gold_region, answer_region)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _relations_equal(gold, answer)
    if isinstance(gold, Items | Matrix) and isinstance(answer, Items | Matrix):
        return _collections_equal(gold, answer)
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):
        return _matrices_equal(gold, answer)
    if isinstance(gold, Items) and len(gold.items) == 1:
        return _equal(gold.items[0], answer)
    if isinstance(answer, Items) and len(answer.items) == 1:
        return _equal(gold, answer.items[0])
    if isinstance(gold, Value) and isinstance(answer, Value):
        return values_equal(gold.text, answer.text)
    return False


def _collections_equal(gold: Items | Matrix, answer: Items | Matrix) -> bool:
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        return [len(row) for row in gold.rows] == [len(row) for row in answer.rows] and all(
            _equal(wanted, cell)
            for row, other in zip(gold.rows, answer.rows, strict=True)
            for wanted, cell in zip(row, other, strict=True)
        )
    wanted, stated = _entries(gold), _entries(answer)
    if wanted is None or stated is None or max(len(wanted), len(stated)) > MAX_ITEMS:
        return False
    brackets = [_brackets(gold), _brackets(answer)]
    if set(brackets) <= {"", r"\{"}:
        # \{1, 1, 2\} is \{1, 2\}; a list says how often.
        both = brackets == [r"\{", r"\{"]
        return _same_items(*(tuple(dict.fromkeys(n)) if both else n for n in (wanted, stated)))
    if r"\{" in brackets or len(wanted) != len(stated):
        return False
    # (1, 2) and [1, 2] differ as intervals; with more entries, or fewer brackets, they are tuples.
    if len(wanted) == 2 and "" not in brackets and brackets[0] != brackets[1]:
        return False
    return all(map(_equal, wanted, stated))


def _matrices_equal(gold: Node, answer: Node) -> bool:
    """A matrix and an expression with matrices in it."""
    matrices = []
    for node in (gold, answer):
        try:
            matrices.append(_as_matrix(node))
        except (algebra.UnreadableError, sympy.ShapeError, ValueError):
            return False
    return algebra.same(*matrices)


def _as_matrix(node: Node) -> Any:
    if isinstance(node, Value):
        return parse_value(node)
    if not isinstance(node, Matrix):
        raise algebra.UnreadableError("no matrix")
    return sympy.Matrix([[_cell(cell) for cell in row] for row in node.rows])


def _cell(node: Node) -> Any:
    if not isinstance(node, Value):
        raise algebra.UnreadableError("no value")
    return parse_value(node)


def _entries(node: Items | Matrix) -> tuple[Node, ...] | None:
    """The entries in order; of a matrix only when it is a single row or column."""
    if isinstance(node, Items):
        return node.items
    if len(node.rows) == 1:
        return node.rows[0]
    return tuple(row[0] for row in node.rows) if all(len(row) == 1 for row in node.rows) else None


def _brackets(node: Items | Matrix) -> str:
    """How the entries are held; a vector is held as by round brackets."""
    if isinstance(node, Matrix):
        return "()"
    return node.opening if node.opening in ("", r"\{") else node.opening + node.closing


def _same_items(gold: tuple[Node, ...], answer: tuple[Node, ...]) -> bool:
    wanted, left = list(gold), list(answer)
    if len(wanted) != len(left):
        return False
    for item in wanted:
        match = item if item in left else next((one for one in left if _equal(item, one)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _relations_equal(gold: Node, answer: Node) -> bool:
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _same_relation(gold, answer) or _same_equation(gold, answer)
    if isinstance(answer, Relation):
        return any(_equal(gold, value) for value in _stated_values(answer))
    assert isinstance(gold, Relation)
    # x = 5 may be answered by 5, but x + y = 5 may not.
    left = gold.parts[0]
    if set(gold.signs) != {"="} or not (isinstance(left, Value) and is_name(left)):
        return False
    return _equal(gold.parts[-1], answer)


def _stated_values(relation: Relation) -> list[Node]:
    """What an equation says its left side is; nothing when it says nothing or contradicts itself.

    1/3 \\approx 0.333 says both, if they are near each other.
    """
    if not set(relation.signs) <= {"=", r"\approx"}:
        return []
    *before, last = relation.parts
    if isinstance(last, Value) and _is_unknown(last) and len(before) == 1 and is_number(before[0]):
        return before
    cut = relation.signs.index(r"\approx") if r"\approx" in relation.signs else len(before)
    exact, rounded = relation.parts[: cut + 1], relation.parts[cut + 1 :]
    stated = exact[-1]
    if any(is_number(part) and not _equal(part, stated) for part in exact[:-1]):
        return []
    if not rounded:
        return [stated]
    if isinstance(stated, Value) and _is_unknown(stated):
        return [last] if len(rounded) == 1 else []
    return [stated, last] if all(_near(stated, part) for part in rounded) else []


def _near(exact: Node, rounded: Node) -> bool:
    if not (isinstance(exact, Value) and isinstance(rounded, Value)):
        return False
    if not (is_number(exact) and is_number(rounded)):
        return False
    return algebra.same(parse_value(exact), parse_value(rounded), ROUNDED)


def _is_unknown(value: Value) -> bool:
    return is_name(value) and not is_number(value)


def _same_relation(gold: Relation, answer: Relation) -> bool:
    """Part by part, in this or the opposite direction."""
    if len(gold.parts) != len(answer.parts):
        return False
    if gold.signs == answer.signs and all(map(_equal, gold.parts, answer.parts)):
        return True
    flipped = tuple(FLIPPED[sign] for sign in reversed(answer.signs))
    return gold.signs == flipped and all(map(_equal, gold.parts, reversed(answer.parts)))


def _same_equation(gold: Relation, answer: Relation) -> bool:
    """Two equations with the same solutions: left minus right differ by a constant factor."""
    if len(gold.signs) == len(answer.signs) == 1 and gold.signs != ("=",):
        return _same_inequality(gold, answer)
    if gold.signs != ("=",) or answer.signs != ("=",):
        # y = ... = 2x + 1: what the last says.
        chain = len(answer.signs) > 1 and set(answer.signs) == {"="}
        return bool(
            chain
            and gold.signs == ("=",)
            and _same_equation(gold, Relation((answer.parts[0], answer.parts[-1]), ("=",)))
        )
    if not all(isinstance(part, Value) for part in (*gold.parts, *answer.parts)):
        names = _equal(gold.parts[0], answer.parts[0])
        return names and _equal(gold.parts[1], answer.parts[1])
    left, other = gold.parts[0], answer.parts[0]
    assert isinstance(left, Value)
    assert isinstance(other, Value)
    function = [
        bool(re.fullmatch(r"y|[a-z]\([a-z]\)", part.text.strip())) for part in (left, other)
    ]
    if all(function):
        return _equal(gold.parts[1], answer.parts[1])
    try:
        first, second = (_difference(relation) for relation in (gold, answer))
    except algebra.UnreadableError:
        return False
    return algebra.proportional(first, second)


def _same_inequality(gold: Relation, answer: Relation) -> bool:
    """Two inequalities whose sides differ by the same but for a factor: x < 1 and -x > -1."""
    if gold.signs[0] not in (answer.signs[0], FLIPPED[answer.signs[0]]):
        return False
    if not all(isinstance(part, Value) for part in (*gold.parts, *answer.parts)):
        return False
    try:
        first, second = _difference(gold), _difference(answer)
    except algebra.UnreadableError:
        return False
    if gold.signs[0] == r"\ne":
        return algebra.proportional(first, second)
    second = second if gold.signs == answer.signs else -second
    return algebra.proportional(first, second, positive=True)


def _difference(relation: Relation) -> Any:
    left, right = (parse_value(side) for side in relation.parts if isinstance(side, Value))
    if isinstance(left, sympy.MatrixBase) or isinstance(right, sympy.MatrixBase):
        raise algebra.UnreadableError("an equation of matrices")
    return left - right
