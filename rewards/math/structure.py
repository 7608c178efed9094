r"""The outer structure of a formula: lists, tuples, intervals, sets, matrices, relations, unions.

What is left inside are values, which `algebra` compares. All searches are linear in the length of the
text for each level of nesting, and the nesting is bounded.
"""

import re
from dataclasses import dataclass

from rewards.math.tidy import TEXT_COMMAND

MAX_DEPTH = 25
_TOKEN = re.compile(
    r"\\begin\s*\{[a-z]*\*?\}|\\end\s*\{[a-z]*\*?\}|\\[A-Za-z]+|\\.|[()\[\]{}]|[^\\()\[\]{}]",
    re.DOTALL,
)
_OPENING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
_CLOSING = frozenset(_OPENING.values())
_MATRIX = re.compile(
    r"\\begin\s*\{(?:([pbBv]?)matrix|smallmatrix|array)\}\s*(?:\{[lcr|\s]*\})?(.*)"
    r"\\end\s*\{(?:[pbBv]?matrix|smallmatrix|array)\}",
    re.DOTALL,
)
_RELATIONS = ("=", "<", ">", r"\le", r"\ge", r"\ne", r"\approx")
_NAME_IS = re.compile(
    r"\\?[A-Za-z]+[\w'{}]*(?:\([A-Za-z0-9, ]*\))?\s*(=|\\in(?![a-z])|\\ne(?![a-z]))\s*(?=[^=]*$)"
)
_TEXT_ONLY = re.compile(TEXT_COMMAND + r"\{[^{}]*\}")
_SETTING = re.compile(r"\\(?:mid|vert)(?![A-Za-z])|[|:]")


class TooDeepError(ValueError):
    """A formula is nested more than MAX_DEPTH levels deep."""


@dataclass(frozen=True, slots=True)
class Value:
    """A formula without outer structure."""

    text: str


@dataclass(frozen=True, slots=True)
class Items:
    r"""Several formulas in brackets; `opening` is "" for a bare list, `\{` for a set."""

    opening: str
    closing: str
    items: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of formulas."""

    rows: tuple[tuple["Node", ...], ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """`parts[0] signs[0] parts[1] signs[1] ...`."""

    parts: tuple["Node", ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Join:
    r"""Sets joined by one of `\cup`, `\cap`, `\setminus`."""

    sign: str
    parts: tuple["Node", ...]


Node = Value | Items | Matrix | Relation | Join


def read_structure(text: str, depth: int = 0) -> Node:
    r"""The structure of tidied LaTeX. Raises TooDeepError beyond MAX_DEPTH levels.

    >>> read_structure("(1, 2]")
    Items(opening='(', closing=']', items=(Value(text='1'), Value(text='2')))
    """
    text = text.strip()
    if depth > MAX_DEPTH:
        raise TooDeepError(f"nested more than {MAX_DEPTH} levels deep")
    matrix = _MATRIX.fullmatch(text)
    if matrix is not None and matrix[1] != "v" and r"\begin" not in matrix[2]:
        return _read_matrix(matrix[2], depth)
    pieces = _split(text, (",", ";"))[0]
    if len(pieces) > 1:
        return _read_list(pieces, depth)
    parts, signs = _split(text, _RELATIONS)
    if len(parts) > 1:
        return _read_relation(parts, signs, depth)
    parts = _split(text, (r"\in",))[0]
    if len(parts) == 2 and parts[0].strip():
        return read_structure(parts[1], depth + 1)
    for sign in (r"\cup", r"\cap", r"\setminus"):
        parts = _split(text, (sign,))[0]
        if len(parts) > 1:
            return Join(sign, tuple(read_structure(part, depth + 1) for part in parts))
    if (r"\pm" in text or r"\mp" in text) and not text.startswith(("{", r"\{")):
        upper = re.sub(r"\\pm(?![a-z])", "+", re.sub(r"\\mp(?![a-z])", "-", text))
        lower = re.sub(r"\\pm(?![a-z])", "-", re.sub(r"\\mp(?![a-z])", "+", text))
        return Items("", "", (read_structure(upper, depth + 1), read_structure(lower, depth + 1)))
    return _read_brackets(text, depth)


def _read_matrix(body: str, depth: int) -> Matrix:
    body = re.sub(r"\\hline(?![a-z])", "", body)
    rows = [row for row in re.split(r"\\\\(?:\s*\[[^\]]*\])?|\\cr(?![a-z])", body) if row.strip()]
    return Matrix(
        tuple(tuple(read_structure(cell, depth + 1) for cell in row.split("&")) for row in rows)
    )


def _read_list(pieces: list[str], depth: int) -> Items:
    # "x = 1, 2": the name stands before the whole list.
    first = _NAME_IS.match(pieces[0].strip())
    if first is not None and not any(_split(piece, _RELATIONS)[1] for piece in pieces[1:]):
        pieces = [pieces[0].strip()[first.end() :], *pieces[1:]]
        if first[1] == r"\ne":
            # x \ne 1, 2: neither.
            pieces = [first.group() + piece for piece in pieces]
    return Items("", "", _read_items(pieces, depth))


def _read_items(pieces: list[str], depth: int) -> tuple[Node, ...]:
    items: list[Node] = []
    for piece in filter(str.strip, pieces):
        node = read_structure(piece, depth + 1)
        # 1, 2 ± 3: three items.
        bare = isinstance(node, Items) and not node.opening
        items.extend(node.items if bare and isinstance(node, Items) else [node])
    return tuple(items)


def _read_relation(parts: list[str], signs: list[str], depth: int) -> Node:
    if not all(part.strip() for part in parts):
        return Value(_joined(parts, signs))
    nodes = [read_structure(part, depth + 1) for part in parts]
    last = nodes[-1]
    if set(signs) == {"="} and isinstance(last, Items) and not last.opening and len(nodes) == 2:
        # x = 1 ± 2: two equations, or two values.
        if _NAME_IS.fullmatch(parts[0].strip() + " = "):
            return last
        pairs = [Relation((nodes[0], item), ("=",)) for item in last.items]
        return Items("", "", tuple(pairs))
    return Relation(tuple(nodes), tuple(signs))


def _read_brackets(text: str, depth: int) -> Node:
    opening, closing, inner = _outer_brackets(text)
    if not opening:
        return Value(text)
    items = _split(inner, (",", ";"))[0]
    if opening == r"\{":
        built = _SETTING.split(inner, maxsplit=1)
        if len(built) == 2 and _split(built[1], _RELATIONS)[1]:
            # {x : 1 < x < 2}
            return read_structure(built[1], depth + 1)
    if len(items) == 1 and opening != r"\{":
        if (opening, closing) in (("{", "}"), ("(", ")")) and inner.strip():
            return read_structure(inner, depth + 1)
        return Value(text)
    if opening == "{":
        opening, closing = r"\{", r"\}"
    return Items(opening, closing, _read_items(items, depth))


def _outer_brackets(text: str) -> tuple[str, str, str]:
    """Opening, closing and inside of the brackets around all of `text`; empty without any."""
    opening = next((sign for sign in (r"\{", "(", "[", "{") if text.startswith(sign)), "")
    if not opening:
        return "", "", text
    level = 0
    for token in _TOKEN.finditer(text):
        word = token.group()
        level += (word in _OPENING) - (word in _CLOSING)
        if level == 0:
            closed_by_end = token.end() == len(text) and word in _CLOSING
            # (1, 2] is an interval; \{1, 2) is nothing.
            fits = word == _OPENING[opening] or {opening, word} in ({"(", "]"}, {"[", ")"})
            if closed_by_end and fits:
                return opening, word, text[len(opening) : token.start()]
            break
    return "", "", text


def _split(text: str, signs: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """`text` cut at `signs` outside all brackets, and the signs found there."""
    if not any(sign in text for sign in signs):
        return [text], []
    parts, found, level, start = [], [], 0, 0
    for token in _TOKEN.finditer(text):
        word = token.group()
        if word in _OPENING or word.startswith(r"\begin"):
            level += 1
        elif word in _CLOSING or word.startswith(r"\end"):
            level -= 1
        elif level == 0 and word in signs:
            parts.append(text[start : token.start()])
            found.append(word)
            start = token.end()
    return [*parts, text[start:]], found


def _joined(parts: list[str], signs: list[str]) -> str:
    return parts[0] + "".join(sign + part for sign, part in zip(signs, parts[1:], strict=True))
