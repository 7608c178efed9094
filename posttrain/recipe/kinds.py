"""Checks a value against a field's annotation, which is only read, never evaluated."""

import ast
import difflib
from collections.abc import Collection, Mapping
from typing import Any

Enums = Mapping[str, Collection[str]]

_PLAIN: dict[str, type] = {"str": str, "bool": bool, "dict": dict, "list": list}
_MAPPINGS = ("RopeParameters",)


class Mismatch(Exception):
    """A value that does not fit; its text says what was expected."""


def fit(value: Any, annotation: ast.expr, enums: Enums) -> Any:
    """Return `value` as the annotation wants it: 3 for a float field becomes 3.0, 1e3 for an int field 1000.

    Raises Mismatch. In a union that names an enumeration, a string has to be one of its values, although the
    annotation beside it says `str`.
    """
    options = _options(annotation)
    listed = [option for option in options if _name(option) in enums]
    if listed:
        options = [option for option in options if _name(option) != "str"]
        allowed = [word for option in listed for word in enums[_name(option)]]
        if isinstance(value, str) and value not in allowed:
            raise Mismatch(f"expected {did_you_mean(value, allowed)}, got {value!r}")
    for option in options:
        try:
            return _fit_one(value, option, enums)
        except Mismatch:
            continue
    expected = " or ".join(dict.fromkeys(_describe(option, enums) for option in options))
    raise Mismatch(f"expected {expected}, got {value!r}")


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return the closest known words, or all of them when none is close.

    >>> did_you_mean("linaer", ["linear", "cosine"])
    "'linear'"
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return " or ".join(map(repr, close)) if close else "one of " + ", ".join(sorted(known))


def _fit_one(value: Any, kind: ast.expr, enums: Enums) -> Any:
    name = _name(kind)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "Any":
        return value
    if name == "None" and value is None:
        return None
    if name == "float" and number:
        return float(value)
    if name == "int" and number and float(value).is_integer():
        return int(value)
    if name in enums and isinstance(value, str) and value in enums[name]:
        return value
    if name == "Literal" and isinstance(kind, ast.Subscript):
        words = _literals(kind)
        if value is False and "off" in words:  # what YAML makes of a bare off
            return "off"
        if any(value == word and type(value) is type(word) for word in words):
            return value
    elif isinstance(kind, ast.Subscript) and name in ("list", "dict"):
        return _fit_inside(value, name, kind.slice, enums)
    elif (name in _MAPPINGS and isinstance(value, dict)) or (
        name in _PLAIN and type(value) is _PLAIN[name]
    ):
        return value
    raise Mismatch


def _fit_inside(value: Any, name: str, inner: ast.expr, enums: Enums) -> Any:
    if name == "list" and isinstance(value, list):
        return [fit(item, inner, enums) for item in value]
    if name == "dict" and isinstance(value, dict) and isinstance(inner, ast.Tuple):
        return {key: fit(item, inner.elts[1], enums) for key, item in value.items()}
    raise Mismatch


def _options(annotation: ast.expr) -> list[ast.expr]:
    """Take a union apart."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _options(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.BinOp):
        return [*_options(annotation.left), *_options(annotation.right)]
    if isinstance(annotation, ast.Subscript) and _name(annotation) in ("Union", "Optional"):
        inner = annotation.slice
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        options = [option for part in parts for option in _options(part)]
        return options if _name(annotation) == "Union" else [*options, ast.Constant(None)]
    return [annotation]


def _name(kind: ast.expr) -> str:
    if isinstance(kind, ast.Subscript):
        return _name(kind.value)
    if isinstance(kind, ast.Attribute):
        return kind.attr
    if isinstance(kind, ast.Name):
        return kind.id
    return "None"


def _literals(kind: ast.Subscript) -> list[Any]:
    words = ast.literal_eval(kind.slice)
    return list(words) if isinstance(words, tuple) else [words]


def _describe(kind: ast.expr, enums: Enums) -> str:
    name = _name(kind)
    if name in enums:
        return "one of " + ", ".join(sorted(enums[name]))
    if name == "Literal" and isinstance(kind, ast.Subscript):
        return "one of " + ", ".join(map(str, _literals(kind)))
    words = {
        "str": "a string",
        "bool": "true or false",
        "int": "a whole number",
        "float": "a number",
        "None": "null",
        "dict": "a mapping",
        "RopeParameters": "a mapping",
        "list": "a list",
    }
    return words.get(name, name)
