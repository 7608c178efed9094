"""The text of a recipe: scalars, places, overrides, and what is no recipe at all."""

from pathlib import Path

import pytest

from posttrain.recipe.source import RecipeError, read


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("-2.5E3", -2500.0),
        (".5", 0.5),
        ("3", 3),
        ("30_000", 30000),
        ("0x10", 16),
        ("true", True),
        ("no", "no"),
        ("off", "off"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("1e-4x", "1e-4x"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_scalars(tmp_path: Path, text: str, value: object) -> None:
    got = read(write(tmp_path, f"x: {text}\n")).values["x"]
    assert got == value
    assert type(got) is type(value)


def test_infinities(tmp_path: Path) -> None:
    values = read(write(tmp_path, "a: .inf\nb: -.inf\nc: .nan\n")).values
    assert values["a"] == float("inf")
    assert values["b"] == -float("inf")
    assert values["c"] != values["c"]


def test_every_value_knows_its_line(tmp_path: Path) -> None:
    source = read(write(tmp_path, "a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n"))
    assert source.place(("a", "b")).endswith("r.yaml:2")
    assert source.place(("a", "c", 0)).endswith("r.yaml:4")
    assert source.place(("a", "c", 1, "d")).endswith("r.yaml:5")
    # What is not written is reported at the closest part around it.
    assert source.place(("a", "missing", "deeper")).endswith("r.yaml:1")


def test_anchors_are_followed(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a: &x {b: 1}\nc: *x\n")).values["c"] == {"b": 1}


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "a: {b: 1}\nl: [{w: 1}, {w: 2}]\nnone:\n")
    source = read(path, ["a.b=2e-3", "a.new.deep=[1, x]", "l.1.w=0", "none.x=true", "top="])
    assert source.values["a"] == {"b": 0.002, "new": {"deep": [1, "x"]}}
    assert source.values["l"] == [{"w": 1}, {"w": 0}]
    assert source.values["none"] == {"x": True}
    assert source.values["top"] is None
    assert source.place(("a", "b")) == "override 'a.b=2e-3'"
    assert source.faults == []


@pytest.mark.parametrize("override", ["a", "=1", "a..b=1", "a.b.c=1", "l.5=1", "l.x=1", "a.b=[1"])
def test_overrides_at_fault(tmp_path: Path, override: str) -> None:
    source = read(write(tmp_path, "a: {b: 1}\nl: [1]\n"), [override])
    assert len(source.faults) == 1
    assert override in source.faults[0]


def test_a_key_given_twice(tmp_path: Path) -> None:
    source = read(write(tmp_path, "a: 1\nb: 2\na: 3\n"))
    assert source.faults == [f"{tmp_path}/r.yaml:3: a: given twice, first at {tmp_path}/r.yaml:1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1\n", ":2: not valid YAML"), ("", "is empty"), ("- 1\n", ":1: a recipe is a mapping")],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(write(tmp_path, text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml: the recipe cannot be read: No such file"):
        read(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        read(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        read(tmp_path)
