"""Builds a checked recipe out of a file and overrides."""

import ast
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from posttrain.recipe import limits, rules
from posttrain.recipe.fields import Schema, policy_schema, trainer_schema
from posttrain.recipe.kinds import Mismatch, fit
from posttrain.recipe.sections import Recipe, RewardSection
from posttrain.recipe.source import Key, Source, read


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe, put overrides such as `grpo.learning_rate=1e-6` over it, and check all of it.

    Paths in a recipe are looked up in the working directory first, then beside the recipe and in the folder above.

    Raises RecipeError whose message lists every fault with its file and line.
    """
    path = Path(path)
    source = read(path, overrides)
    source.values.setdefault("name", path.stem)
    recipe: Recipe = _section(Recipe, source.values, (), source)
    if recipe.rollout.dtype == "auto":
        recipe.rollout.dtype = recipe.policy.dtype
    rules.check(recipe, source, path)
    source.raise_faults()
    return recipe


def _section(cls: type, values: Any, key: Key, source: Source) -> Any:
    """Build the dataclass `cls` out of a mapping; what is at fault is noted and keeps its default."""
    if not isinstance(values, dict):
        source.fault(key, f"expected a mapping of fields, got {values!r}")
        values = {}
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("internal")}
    kinds = get_type_hints(cls)
    built: dict[str, Any] = {}
    for name, value in values.items():
        if name in fields:
            built[name] = _field(kinds[name], fields[name], value, (*key, name), source)
        else:
            limits.unknown(source, (*key, name), fields)
    for name, f in fields.items():
        if name not in built and _default(f) is dataclasses.MISSING:
            if (*key,) not in source.bad:
                source.fault(key, f"the field `{name}` is missing")
            built[name] = ""
    return cls(**built)


def _field(kind: Any, f: dataclasses.Field[Any], value: Any, key: Key, source: Source) -> Any:
    if key in (("sft",), ("grpo",)):
        return _checked(trainer_schema(str(key[0])), value, key, source)
    if key == ("policy", "config"):
        return _checked(policy_schema(), value, key, source)
    if key == ("rewards",):
        return _rewards(value, source)
    inner = _dataclass_in(kind)
    if inner is not None:
        if value is None:
            return _default(f)
        section = _section(inner, value, key, source)
        if key[0] == "data" and len(key) == 2:
            section.role, section.where = str(key[1]), source.place(key)
        return section
    if value is None and _default(f) is not dataclasses.MISSING:
        return _default(f)
    try:
        value = fit(value, ast.parse(_text(kind), mode="eval").body, {})
    except Mismatch as mismatch:
        source.fault(key, str(mismatch))
        default = _default(f)
        return "" if default is dataclasses.MISSING else default
    limits.bounds(source, key, value, f.metadata)
    return value


def _checked(schema: Schema, values: Any, key: Key, source: Source) -> dict[str, Any] | None:
    """Check a mapping of fields that TRL or transformers declare."""
    if values is None:
        return None
    if not isinstance(values, dict):
        source.fault(key, f"expected a mapping of fields, got {values!r}")
        return None
    checked: dict[str, Any] = {}
    for name, value in values.items():
        here = (*key, name)
        if limits.reserved(source, here):
            continue
        if name not in schema.fields:
            limits.unknown(source, here, schema.fields)
            continue
        try:
            checked[name] = fit(value, schema.fields[name].annotation, schema.enums)
            limits.trainer_value(source, here, checked[name])
        except Mismatch as mismatch:
            source.fault(here, str(mismatch))
    return checked


def _rewards(values: Any, source: Source) -> list[RewardSection]:
    if isinstance(values, list):
        return [
            _section(RewardSection, value, ("rewards", i), source) for i, value in enumerate(values)
        ]
    if values is not None:
        source.fault(("rewards",), "expected a list such as `- {name: math, weight: 1.0}`")
    return []


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _dataclass_in(kind: Any) -> type | None:
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return next((k for k in kinds if dataclasses.is_dataclass(k) and isinstance(k, type)), None)


def _text(kind: Any) -> str:
    """Write a type back as an annotation."""
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
