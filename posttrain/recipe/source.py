"""Reads a recipe's YAML into plain values and remembers the line of each."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every fault with its file and line."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core scalars: `1e-4` is a number, `no` and `12:30` are strings."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_SCALARS = {
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    "float": (
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
}
for _name, (_pattern, _first) in _SCALARS.items():
    # PyYAML takes a match at the start for a whole one: the end has to be in the pattern.
    _whole = re.compile(rf"(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _whole, _first)


@dataclass
class Source:
    """The values of a recipe, the place of each, and the faults found so far."""

    file: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    bad: set[Key] = field(default_factory=set)

    def place(self, key: Key) -> str:
        """Return where `key` is written, or the closest part around it that is."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.file)

    def fault(self, key: Key, message: str) -> None:
        """Note a fault of the field at `key`."""
        name = ".".join(map(str, key))
        self.bad.add(key)
        self.faults.append(f"{self.place(key)}: {f'{name}: ' if name else ''}{message}")

    def sound(self, *keys: str) -> bool:
        """Return whether no fault was noted at, in or around the fields named `section.field`."""
        bad = [tuple(map(str, key)) for key in self.bad if key]
        wanted = [tuple(key.split(".")) for key in keys]
        return not any(b[: len(key)] == key or key[: len(b)] == b for key in wanted for b in bad)

    def raise_faults(self) -> None:
        """Raise RecipeError when there are any."""
        if self.faults:
            many = f"{len(self.faults)} faults" if len(self.faults) > 1 else "1 fault"
            faults = sorted(self.faults, key=_by_line)
            raise RecipeError("\n  ".join([f"{self.file}: {many}", *faults]))


def read(path: Path, overrides: Sequence[str] = ()) -> Source:
    """Read the recipe and put `key.key=value` overrides over it.

    Faults of the text (syntax, a key given twice) and of the overrides are noted in the result; a file that cannot
    be read at all, or whose YAML does not parse, raises RecipeError.
    """
    source = Source(str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {_reason(error)}") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{_syntax_place(path, error)}: not valid YAML: {_syntax(error)}"
        ) from None
    if node is None:
        raise RecipeError(f"{path}: the recipe is empty")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}:1: a recipe is a mapping of sections, such as `policy:`")
    source.values = _value(node, (), source, lambda n: f"{path}:{n.start_mark.line + 1}")
    for override in overrides:
        _override(source, override)
    return source


def key_values(words: Sequence[str]) -> dict[str, Any]:
    """Read words such as `limit=60` as a recipe's overrides are read; raises RecipeError."""
    source = Source("options")
    for word in words:
        _override(source, word)
    source.raise_faults()
    return source.values


def _override(source: Source, text: str) -> None:
    name, equals, value = text.partition("=")
    place = f"override {text!r}"
    if not equals or not all(name.split(".")):
        source.faults.append(f"{place}: an override is written section.field=value")
        return
    try:
        node = yaml.compose(value, Loader=_Loader)
    except yaml.YAMLError as error:
        source.faults.append(f"{place}: the value is not valid YAML: {_syntax(error)}")
        return
    key: Key = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    at: Any = source.values
    for depth, part in enumerate(key[:-1]):
        if isinstance(at, dict) and at.get(part) is None:
            at[part] = {}
        try:
            at = at[part]
        except (KeyError, IndexError, TypeError):
            at = None
        if not isinstance(at, dict | list):
            owner = ".".join(map(str, key[: depth + 1]))
            source.faults.append(f"{place}: {owner} holds no fields to override")
            return
    for known in [k for k in source.places if k[: len(key)] == key]:
        del source.places[known]
    source.places[key] = place
    new = None if node is None else _value(node, key, source, lambda _: place)
    try:
        at[key[-1]] = new
    except (IndexError, TypeError):
        where = ".".join(map(str, key[:-1]))
        source.faults.append(
            f"{place}: {where} is a list of {len(at)} items, there is no item {key[-1]}"
        )


def _value(node: yaml.Node, key: Key, source: Source, place: Any) -> Any:
    """Turn a YAML node into plain values and note the place of every part."""
    source.places.setdefault(key, place(node))
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            here = (*key, name)
            if name in mapping:
                source.faults.append(
                    f"{place(name_node)}: {'.'.join(map(str, here))}: given twice, first at {source.place(here)}"
                )
                continue
            source.places[here] = place(name_node)
            mapping[name] = _value(value_node, here, source, place)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*key, i), source, place) for i, item in enumerate(node.value)]
    return _scalar(node, key, source)


def _scalar(node: yaml.Node, key: Key, source: Source) -> Any:
    text, kind = str(node.value), node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text.replace("_", ""), 0 if text[:2] in ("0x", "0o") else 10)
    if kind == "float":
        return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    if node.tag.startswith("!") and node.tag != "!":
        source.fault(key, f"the tag {node.tag} is not known here; write a plain value")
    return text


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _syntax_place(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{path}:{mark.line + 1}" if mark else str(path)


def _syntax(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error)


def _by_line(fault: str) -> tuple[bool, int, str]:
    """Order faults as the file does, those of overrides last."""
    found = re.match(r".*?:(\d+): ", fault)
    return (found is None, int(found[1]) if found else 0, fault)
