"""Sets of real numbers: intervals, unions, inequalities, and whether two are equal. Runs in the worker."""

from typing import Any

import sympy

from rewards.math import algebra
from rewards.math.structure import Items, Join, Node, Relation, Value
from rewards.math.values import is_name, is_number, read_value

FLIPPED = {
    "<": ">",
    ">": "<",
    r"\le": r"\ge",
    r"\ge": r"\le",
    "=": "=",
    r"\ne": r"\ne",
    r"\approx": r"\approx",
}


def is_region(node: Node) -> bool:
    """Whether a node can only be meant as a set of numbers."""
    match node:
        case Join():
            return True
        case Relation(_, signs):
            return not {"=", r"\approx"} & set(signs)
        case Items(opening, closing, items):
            half_open = opening + closing in ("(]", "[)")
            return half_open or any(
                isinstance(item, Value) and r"\infty" in item.text for item in items
            )
        case Value(text):
            return r"\Reals" in text or r"\emptyset" in text
    return False


def region(node: Node) -> Any:
    """The set of real numbers that a node stands for, as sympy's, or None."""
    try:
        return _as_set(node)
    except (algebra.UnreadableError, ValueError, TypeError, NotImplementedError):
        return None


def _as_set(node: Node) -> Any:
    match node:
        case Value(text):
            if text.strip() == r"\Reals":
                return sympy.S.Reals
            if text.strip() == r"\emptyset":
                return sympy.S.EmptySet
            raise algebra.UnreadableError("no set")
        case Items(opening, closing, items) if opening in ("(", "[") and len(items) == 2:
            start, end = map(_bound, items)
            if not start < end:
                raise algebra.UnreadableError("no interval")
            return sympy.Interval(start, end, opening == "(", closing == ")")
        case Items(r"\{", _, items):
            return sympy.FiniteSet(*map(_bound, items))
        case Items("", _, items) if any(isinstance(item, Relation) for item in items):
            parts = [_as_set(item) for item in items]
            excluded = all(isinstance(i, Relation) and i.signs == (r"\ne",) for i in items)
            return sympy.Intersection(*parts) if excluded else sympy.Union(*parts)
        case Join(sign, parts):
            # {1} in a union, written without the backslashes.
            sets = [
                sympy.FiniteSet(_bound(part)) if _is_bound(part) else _as_set(part)
                for part in parts
            ]
            if sign == r"\cup":
                return sympy.Union(*sets)
            return (
                sympy.Intersection(*sets) if sign == r"\cap" else sets[0] - sympy.Union(*sets[1:])
            )
        case Relation(parts, signs):
            return _solutions(parts, signs)
    raise algebra.UnreadableError("no set")


def _solutions(parts: tuple[Node, ...], signs: tuple[str, ...]) -> Any:
    """The numbers that fulfil bound < name < bound, in any direction."""
    names = [place for place, part in enumerate(parts) if not _is_bound(part)]
    if len(names) != 1 or not _is_named(parts[names[0]]):
        raise algebra.UnreadableError("no inequality in one variable")
    pieces = []
    for place, sign in enumerate(signs):
        if names[0] not in (place, place + 1):
            continue
        name_first = place == names[0]
        bound = _bound(parts[place + 1 if name_first else place])
        sign = sign if name_first else FLIPPED[sign]
        pieces.append(
            {
                "<": lambda b: sympy.Interval.open(-sympy.oo, b),
                r"\le": lambda b: sympy.Interval(-sympy.oo, b),
                ">": lambda b: sympy.Interval.open(b, sympy.oo),
                r"\ge": lambda b: sympy.Interval(b, sympy.oo),
                r"\ne": lambda b: sympy.S.Reals - sympy.FiniteSet(b),
                "=": lambda b: sympy.FiniteSet(b),
            }[sign](bound)
        )
    return sympy.Intersection(*pieces)


def _is_named(node: Node) -> bool:
    return isinstance(node, Value) and is_name(node)


def _is_bound(node: Node) -> bool:
    return is_number(node) or (isinstance(node, Value) and r"\infty" in node.text)


def _bound(node: Node) -> Any:
    if not isinstance(node, Value):
        raise algebra.UnreadableError("no bound")
    read = read_value(node.text)
    if read.number is not None:
        return algebra.rational(read.number)
    value = algebra.parse(node.text)
    if value.free_symbols or not (value.is_extended_real or value.is_number):
        raise algebra.UnreadableError("no bound")
    return sympy.nsimplify(value) if value.is_Float else value


def same_region(a: Any, b: Any) -> bool:
    """Unions of intervals whose bounds are equal in value but not in form."""
    pieces = [list(s.args) if isinstance(s, sympy.Union) else [s] for s in (a, b)]
    if len(pieces[0]) != len(pieces[1]) or sympy.S.EmptySet in (a, b):
        return False
    return all(_same_piece(x, y) for x, y in zip(*map(_ordered, pieces), strict=True))


def _ordered(pieces: list[Any]) -> list[Any]:
    return sorted(pieces, key=lambda piece: float(sympy.N(piece.inf)))


def _same_piece(x: Any, y: Any) -> bool:
    if isinstance(x, sympy.Interval) and isinstance(y, sympy.Interval):
        return (
            (x.left_open, x.right_open) == (y.left_open, y.right_open)
            and algebra.same(x.start, y.start)
            and algebra.same(x.end, y.end)
        )
    if isinstance(x, sympy.FiniteSet) and isinstance(y, sympy.FiniteSet) and len(x) == len(y):
        return all(map(algebra.same, sorted(x, key=sympy.N), sorted(y, key=sympy.N)))
    return bool(x == y)
