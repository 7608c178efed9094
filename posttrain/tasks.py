"""Data sources -> rows of chat messages: `prompt`, for SFT `completion`, `answer`, and every other column."""

import csv
import importlib.util
import json
import string
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from posttrain.recipe import DataSource

Row = dict[str, Any]


class TaskError(ValueError):
    """A data source that cannot be used; the message names the source, what is wrong, and what helps."""


class TaskUnavailableError(TaskError):
    """A data set of the hub that is neither in the cache nor within reach."""


def load(source: DataSource) -> datasets.Dataset:
    """Load a source of a recipe.

    `prompt` becomes a list of chat messages (a system message first when the source has one), `completion` one
    assistant message, `answer` a string; the other columns stay. Templates such as `{question}` name columns, and a
    column that holds a list fills in one line an item.

    Raises TaskError when the data cannot be read, is empty, or lacks a column.
    """
    label = f"{source.where}: data.{source.role}: " if source.where else ""
    try:
        rows = _rows(source)
        if not rows:
            raise TaskError(f"{_name(source)} has no rows")
        return _dataset([_finish(row, number, source) for number, row in enumerate(rows)], source)
    except TaskError as error:
        raise type(error)(f"{label}{error}") from error.__cause__


def columns(source: DataSource) -> list[str]:
    """The columns of a source's first row, as they are before any template; raises TaskError."""
    rows = _rows(replace(source, size=min(source.size or 1, 1)))
    if not rows:
        raise TaskError(f"{_name(source)} has no rows")
    return list(rows[0])


def _rows(source: DataSource) -> list[Row]:
    if source.script is not None:
        return _script_rows(source)
    if source.hub is not None:
        rows: Iterable[Row] = _hub_rows(source)
    else:
        rows = _file_rows(Path(str(source.path)))
    rows = list(rows)
    return rows if source.size is None else rows[: source.size]


def _hub_rows(source: DataSource) -> list[Row]:
    try:
        found = datasets.load_dataset(source.hub, source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # Offline, a configuration that is not in the cache is a ValueError.
        away = isinstance(error, OSError) or datasets.config.HF_HUB_OFFLINE
        raise (TaskUnavailableError if away else TaskError)(
            f"the data set {source.hub} cannot be loaded: {_one_line(error)}. With network access run the command "
            f"once to fetch it into the cache; without, save it as json, jsonl, csv or parquet with the same columns "
            f"and set `path:` to that file in place of `hub`, `name` and `split`"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        splits = ", ".join(found)
        raise TaskError(f"{source.hub} has several splits ({splits}): name one with `split`")
    return list(found)


def _file_rows(path: Path) -> list[Row]:
    kind = path.suffix.lower()
    try:
        if kind == ".jsonl":
            return _json_lines(path)
        if kind == ".json":
            return _json_list(path)
        if kind == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file, strict=True))
        if kind == ".parquet":
            return list(datasets.Dataset.from_parquet(str(path), keep_in_memory=True))
    except json.JSONDecodeError as error:
        raise TaskError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except TaskError:
        raise
    except Exception as error:  # whatever a broken file makes the csv and parquet readers raise
        raise TaskError(f"{path} cannot be read: {_one_line(error)}") from error
    raise TaskError(f"{path}: its ending must be .jsonl, .json, .csv or .parquet")


def _json_lines(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"{path}:{number}: not valid JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise TaskError(f"{path}:{number}: a row is an object with named columns")
            rows.append(row)
    return rows


def _json_list(path: Path) -> list[Row]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TaskError(
            f"{path}: must be a list of objects; one object a line goes in a .jsonl file"
        )
    return rows


def _script_rows(source: DataSource) -> list[Row]:
    path = Path(str(source.script))
    found = importlib.util.spec_from_file_location(f"_data_{path.stem}", path)
    if found is None or found.loader is None:
        raise TaskError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[module.__name__] = module  # where dataclasses of the script look themselves up
    try:
        found.loader.exec_module(module)
        rows = list(module.rows(source.split, source.size, source.seed))
    except Exception as error:  # the script may raise anything
        raise TaskError(
            f"{path}: rows({source.split!r}, {source.size}, {source.seed}) raised "
            f"{type(error).__name__}: {_one_line(error)}"
        ) from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise TaskError(
                f"{path}: row {number} is {type(row).__name__}, must be a dict of columns"
            )
    return rows


def _finish(row: Row, number: int, source: DataSource) -> Row:
    """Put the row's prompt, completion and answer in the form that training takes."""
    done = dict(row)
    prompt = (
        row.get("prompt")
        if source.prompt is None
        else _fill(source.prompt, "prompt", row, number, source)
    )
    if prompt is None:
        raise TaskError(_missing("prompt", row, number, source))
    done["prompt"] = _messages(prompt, "user", number, source)
    if source.system is not None and done["prompt"][0]["role"] != "system":
        done["prompt"].insert(0, {"role": "system", "content": source.system})
    completion = row.get("completion")
    if source.completion is not None:
        completion = _fill(source.completion, "completion", row, number, source)
    if completion is not None:
        done["completion"] = _messages(completion, "assistant", number, source)
    elif source.role == "sft":
        raise TaskError(_missing("completion", row, number, source))
    answer = _answer(row, number, source)
    if answer is not None:
        done["answer"] = answer
    return done


def _answer(row: Row, number: int, source: DataSource) -> Any:
    answer = (
        row.get("answer")
        if source.answer is None
        else _fill(source.answer, "answer", row, number, source)
    )
    if source.answer_after is not None:
        before, mark, after = _text_answer(answer, row, number, source).rpartition(
            source.answer_after
        )
        if not mark:
            raise TaskError(
                f"{_name(source)}: row {number}: no {source.answer_after!r} in the answer {_short(before or after)}"
            )
        return after.strip()
    if source.answer_boxed:
        boxed = last_boxed(_text_answer(answer, row, number, source))
        if boxed is None:
            raise TaskError(
                f"{_name(source)}: row {number}: no \\boxed{{}} in the answer {_short(str(answer))}"
            )
        return boxed
    return (
        str(answer) if isinstance(answer, int | float) and not isinstance(answer, bool) else answer
    )


def _text_answer(answer: Any, row: Row, number: int, source: DataSource) -> str:
    if not isinstance(answer, str):
        raise TaskError(_missing("answer", row, number, source))
    return answer


def last_boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` (or `\fbox{...}`, or `\boxed x`) of a LaTeX text holds.

    >>> last_boxed(r"so $\boxed{1}$ or rather $\boxed{\frac{1}{2}}$")
    '\\frac{1}{2}'
    """
    _, mark, rest = max((text.rpartition(mark) for mark in (r"\boxed", r"\fbox")), key=_mark_at)
    if not mark:
        return None
    rest = rest.lstrip()
    if not rest.startswith("{"):
        words = rest.split("$")[0].split()
        return words[0].rstrip(".,") if words else None
    depth = 0
    for at, letter in enumerate(rest):
        escaped = at > 0 and rest[at - 1] == "\\"
        depth += 0 if escaped else {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[1:at].strip()
    return None


def _mark_at(parts: tuple[str, str, str]) -> int:
    return len(parts[0]) if parts[1] else -1


def _fill(template: str, field: str, row: Row, number: int, source: DataSource) -> str:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise TaskError(
            f"`{field}`: {error} in {template!r}: write a brace itself as {{{{ or }}}}"
        ) from None
    text = []
    for literal, name, _, _ in parts:
        text.append(literal)
        if name is None:
            continue
        if name not in row:
            raise TaskError(_missing(name, row, number, source, field))
        value = row[name]
        text.append("\n".join(map(str, value)) if isinstance(value, list) else str(value))
    return "".join(text)


def _messages(value: Any, role: str, number: int, source: DataSource) -> list[dict[str, str]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    ):
        return [dict(message) for message in value]
    raise TaskError(
        f"{_name(source)}: row {number}: expected text or a list of messages with role and content, "
        f"got {_short(repr(value))}"
    )


def _dataset(rows: list[Row], source: DataSource) -> datasets.Dataset:
    columns = dict.fromkeys(name for row in rows for name in row)
    try:
        return datasets.Dataset.from_dict(
            {name: [row.get(name) for row in rows] for name in columns}
        )
    except (ValueError, TypeError) as error:
        raise TaskError(
            f"{_name(source)}: a column holds values of different kinds: {_one_line(error)}"
        ) from error


def _missing(column: str, row: Row, number: int, source: DataSource, field: str = "") -> str:
    wanted = f"no column `{column}`"
    if field:
        wanted += f", which the template `{field}` names"
    elif source.script is None:
        wanted += f" and no template `{column}`"
    return f"{_name(source)}: row {number} has {wanted}; its columns are {', '.join(map(str, row))}"


def _name(source: DataSource) -> str:
    return str(source.script or source.path or source.hub)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
