"""Values against annotations."""

import ast

import pytest

from posttrain.recipe.fields import policy_schema, trainer_schema
from posttrain.recipe.kinds import Mismatch, fit

ENUMS = {"SchedulerType": ["linear", "cosine"]}


def kind(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


@pytest.mark.parametrize(
    ("value", "annotation", "fitted"),
    [
        (3, "float", 3.0),
        (1e3, "int", 1000),
        (None, "int | None", None),
        ("cosine", "SchedulerType | str", "cosine"),
        ({"a": 1}, "dict[str, Any] | str | None", {"a": 1}),
        ([1, 2.5], "list[float] | None", [1.0, 2.5]),
        ("x", "Union[str, 'torch.dtype'] | None", "x"),
        (None, "Optional[int]", None),
        (True, "bool | None", True),
        ("a", "Literal['a', 'b']", "a"),
        (False, "Literal['off', 'r2']", "off"),  # YAML's reading of a bare off
        ({"rope_theta": 1.0}, "RopeParameters | dict | None", {"rope_theta": 1.0}),
    ],
)
def test_fits(value: object, annotation: str, fitted: object) -> None:
    got = fit(value, kind(annotation), ENUMS)
    assert got == fitted
    assert type(got) is type(fitted)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("3", "int", "a whole number, got '3'"),
        (True, "int", "a whole number, got True"),
        (True, "float", "a number, got True"),
        (2.5, "int", "a whole number, got 2.5"),
        (1, "bool", "true or false, got 1"),
        (1, "str | None", "a string or null, got 1"),
        ("linaer", "SchedulerType | str", "'linear', got 'linaer'"),
        ("zzz", "SchedulerType | str", "one of cosine, linear, got 'zzz'"),
        (["x"], "list[float]", r"a list, got \['x'\]"),
        (float("inf"), "int", "a whole number, got inf"),
        (float("nan"), "int", "a whole number, got nan"),
        (1, "Literal['a', 'b']", "one of a, b, got 1"),
        (False, "Literal['a', 'b']", "one of a, b, got False"),
        (True, "Literal[1]", "one of 1, got True"),
    ],
)
def test_does_not_fit(value: object, annotation: str, expected: str) -> None:
    with pytest.raises(Mismatch, match=f"expected {expected}"):
        fit(value, kind(annotation), ENUMS)


def test_fields_are_those_of_the_imported_classes() -> None:
    import dataclasses

    from transformers import DeepseekV3Config

    from posttrain.training.config import PolicyGRPOConfig, PolicySFTConfig

    for stage, cls in (("sft", PolicySFTConfig), ("grpo", PolicyGRPOConfig)):
        read, real = trainer_schema(stage).fields, {f.name: f for f in dataclasses.fields(cls)}
        assert read.keys() == {f.name for f in real.values() if f.init and f.name[0] != "_"}
        for name in ("num_generations", "per_device_train_batch_size", "max_completion_length"):
            if name in real:
                assert read[name].default == real[name].default
    declared = {f.name for f in dataclasses.fields(DeepseekV3Config)}
    assert declared <= policy_schema().fields.keys()
