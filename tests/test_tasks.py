"""Data sources: what rows become, and what is said of data that cannot be used."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from posttrain.recipe import DataSource
from posttrain.tasks import TaskError, TaskUnavailableError, last_boxed, load

ROWS = [
    {"question": "2 + 3?", "solution": "2 + 3 = 5\n#### 5", "tests": ["a", "b"], "n": 1},
    {"question": "4 * 4?", "solution": "#### 1\n4 * 4 = 16\n#### 16 ", "tests": ["c"], "n": 2},
]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "\n")
    return path


def source(path: Path, **fields: Any) -> DataSource:
    return DataSource(path=str(path), role="train", where="r.yaml:7", **fields)


def test_a_row(jsonl: Path) -> None:
    data = load(
        source(
            jsonl,
            system="Be brief.",
            prompt="Q: {question}",
            completion="{solution}",
            answer="{solution}",
            answer_after="####",
        )
    )
    assert data.to_list() == [
        {
            "question": row["question"],
            "solution": row["solution"],
            "tests": row["tests"],
            "n": row["n"],
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Q: {row['question']}"},
            ],
            "completion": [{"role": "assistant", "content": row["solution"]}],
            "answer": answer,
        }
        for row, answer in zip(ROWS, ["5", "16"], strict=True)
    ]


def test_lists_fill_in_a_line_an_item_and_braces_are_doubled(jsonl: Path) -> None:
    data = load(source(jsonl, prompt="{n}: {{x}}\n{tests}"))
    assert data[0]["prompt"] == [{"role": "user", "content": "1: {x}\na\nb"}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, jsonl: Path) -> None:
    plain = [{"question": row["question"], "answer": str(row["n"])} for row in ROWS]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    (tmp_path / "r.json").write_text(json.dumps(plain))
    (tmp_path / "r.csv").write_text("question,answer\n2 + 3?,1\n4 * 4?,2\n")
    datasets.Dataset.from_list(plain).to_parquet(str(tmp_path / "r.parquet"))
    loaded = [
        load(source(tmp_path / f"r.{kind}", prompt="{question}")).to_list()
        for kind in ("jsonl", "json", "csv", "parquet")
    ]
    assert loaded[0][1]["answer"] == "2"
    assert loaded == [loaded[0]] * 4


def test_size_takes_the_first_rows(jsonl: Path) -> None:
    assert len(load(source(jsonl, prompt="{question}", size=1))) == 1


def test_prompts_may_be_messages_already(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"prompt": messages, "answer": 3}) + "\n")
    row = load(source(path, system="not this one"))[0]
    assert row["prompt"] == messages
    assert row["answer"] == "3"


def test_rows_with_different_columns(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "hint": "x"}\n')
    assert load(source(path))["hint"] == [None, "x"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{ 2 }", "2"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"$\boxed 7$.", "7"),
        (r"\fbox{9}", "9"),
        (r"\boxed{1", None),
        ("no box", None),
    ],
)
def test_last_boxed(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


def test_boxed_answers(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"prompt": "p", "solution": r"so $\boxed{3}$"}) + "\n")
    assert load(source(path, answer="{solution}", answer_boxed=True))[0]["answer"] == "3"
    path.write_text(json.dumps({"prompt": "p", "solution": "so 3"}) + "\n")
    with pytest.raises(TaskError, match=r"row 0: no \\boxed\{\} in the answer so 3"):
        load(source(path, answer="{solution}", answer_boxed=True))


def script(tmp_path: Path, body: str) -> DataSource:
    path = tmp_path / "problems.py"
    path.write_text(f"def rows(split, size, seed):\n    {body}\n")
    return DataSource(
        script=str(path), split="train", size=3, seed=5, role="sft", where="r.yaml:2", system="s"
    )


def test_a_script(tmp_path: Path) -> None:
    body = (
        "return [dict(prompt=f'{split}{i}', completion=f'{seed}', answer=i) for i in range(size)]"
    )
    data = load(script(tmp_path, body))
    assert len(data) == 3
    assert data[2] == {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "train2"}],
        "completion": [{"role": "assistant", "content": "5"}],
        "answer": "2",
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return []", "problems.py has no rows"),
        ("raise KeyError('x')", r"rows\('train', 3, 5\) raised KeyError: 'x'"),
        ("return ['text']", "row 0 is str, must be a dict of columns"),
        ("return [dict(prompt='p')]", "row 0 has no column `completion`; its columns are prompt"),
        ("return [dict(completion='p')]", "row 0 has no column `prompt`"),
        ("return [dict(prompt=3, completion='p')]", "row 0: expected text or a list of messages"),
        ("return [dict(prompt=[], completion='p')]", "row 0: expected text or a list of messages"),
    ],
)
def test_scripts_at_fault(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(TaskError, match=rf"^r.yaml:2: data.sft: .*{message}"):
        load(script(tmp_path, body))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"a": 1}\n\n{"a": }\n', r"r\.jsonl:3: not valid JSON: Expecting value"),
        ("r.jsonl", b"[1]\n", r"r\.jsonl:1: a row is an object"),
        ("r.jsonl", b"\n", r"r\.jsonl has no rows"),
        ("r.jsonl", b"\xff\xfe", r"r\.jsonl cannot be read: 'utf-8' codec"),
        ("r.json", b'[\n{"a": 1},\n}', r"r\.json:3: not valid JSON"),
        ("r.json", b'{"a": 1}', r"r\.json: must be a list of objects"),
        ("r.parquet", b"PAR1 broken", r"r\.parquet cannot be read"),
        ("r.csv", b'a,b\n"1,2\n', r"r\.csv cannot be read: unexpected end of data"),
        ("r.txt", b"text", r"its ending must be \.jsonl, \.json, \.csv or \.parquet"),
        ("r.jsonl", b'{"a": 1}\n', "row 0 has no column `q`, which the template `prompt` names; "
         "its columns are a"),
        ("r.jsonl", b'{"q": 1, "prompt": "x"}\n{"b": 1}\n', "row 1 has no column `q`"),
        ("r.jsonl", b'{"q": 1, "x": 1}\n{"q": 2, "x": [1]}\n', "column holds values of different"),
    ],
)  # fmt: skip
def test_files_at_fault(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=rf"^r\.yaml:7: data\.train: .*{message}"):
        load(source(tmp_path / name, prompt="{q}"))


def test_a_missing_file_and_a_mark_that_is_not_there(tmp_path: Path, jsonl: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read"):
        load(source(tmp_path / "none.jsonl"))
    with pytest.raises(TaskError, match="row 0: no '@@' in the answer"):
        load(source(jsonl, prompt="{n}", answer="{solution}", answer_after="@@"))
    with pytest.raises(TaskError, match="no column `answer`"):
        load(source(jsonl, prompt="{n}", answer_after="@@"))
    with pytest.raises(TaskError, match=r"write a brace itself as \{\{ or \}\}"):
        load(source(jsonl, prompt="{n"))


def test_a_hub_data_set_out_of_reach_names_the_way_out() -> None:
    with pytest.raises(TaskUnavailableError, match=r"owner/none cannot be loaded.*set `path:`"):
        load(DataSource(hub="owner/none", name="main", split="train"))


def test_a_hub_data_set(tmp_path: Path) -> None:
    # A folder stands in for a data set of the hub: `load_dataset` takes both.
    (tmp_path / "train.jsonl").write_text('{"question": "1?"}\n')
    (tmp_path / "test.jsonl").write_text('{"question": "2?"}\n')
    hub = {"hub": str(tmp_path), "prompt": "{question}"}
    data = load(DataSource(**hub, split="test"))
    assert data["prompt"] == [[{"role": "user", "content": "2?"}]]
    with pytest.raises(TaskError, match=r"several splits \(train, test\): name one"):
        load(DataSource(**hub))
