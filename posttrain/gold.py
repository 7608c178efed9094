"""Gold answers of a data set against rewards: `posttrain rewards check`, and a trial before a model loads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

import rewards
from posttrain import tasks
from posttrain.recipe import DataSource, RewardSection
from rewards import gold
from rewards.completions import completion_text

# Where a row usually keeps them; the first that it has counts.
PROMPTS = ("prompt", "question", "problem", "text")
COMPLETIONS = ("completion", "solution", "code", "answer", "gold")
ANSWERS = ("answer", "gold", "solution", "completion")
# What a policy may write around an answer that stands bare in one of these columns.
BARE = ("answer", "gold")
FORMS = ("{}", r"\boxed{{{}}}", "#### {}", "<answer>{}</answer>")
FORM_ROWS = 16
TRIAL_ROWS = 2
SCRIPT_ROWS = 500


def check(
    section: RewardSection,
    data: Path,
    completion: str | None = None,
    answer: str | None = None,
    tokenizer: str | None = None,
) -> tuple[str, bool]:
    """Score the gold answers of a file; return the report, and whether each got the top score.

    `completion` and `answer` are templates as in a recipe's data source (`\\boxed{{{answer}}}`).
    Without `completion` the first column of COMPLETIONS is taken; one of BARE in the one of FORMS in
    which the most of the first rows get the top score. `tokenizer` counts `completion_ids`.
    Raises RewardError for the reward, TaskError for the data.
    """
    reward = section.load()
    rows, texts, column, notes = _gold_rows(reward, data, completion, answer)
    columns: dict[str, list[Any]] = {
        name: rows[name] for name in rows.column_names if name not in ("prompt", "completion")
    }
    missing = [name for name in reward.required_columns if name not in columns]
    if missing:
        raise tasks.TaskError(
            f"{data}: the reward {section.name} reads the column {', '.join(missing)}; "
            f"the data has {', '.join(columns)}"
        )
    columns = {name: list(values) for name, values in columns.items()}
    columns["prompts"] = list(rows["prompt"])
    if column in BARE:
        form = _form(reward, texts, columns)
        texts = [form.format(text) for text in texts]
        if form != "{}":
            notes.append(f"written as {form.format('..')!r} (--completion sets another form)")
    if tokenizer is not None:
        columns["completion_ids"] = _ids(tokenizer, texts)
    scored = list(gold.score(reward, [_message(text) for text in texts], columns))
    lines = [f"{section.name} on {data}: gold answers from {', '.join(notes)}"]
    text = "\n".join([*lines, gold.report(scored, reward.top_score)])
    return text, not gold.below(scored, reward.top_score)


def trial(functions: Sequence[rewards.Reward], data: datasets.Dataset) -> None:
    """Try rewards on the first rows of loaded data; raises RewardError when one cannot work."""
    rows = data.select([row for row in range(min(TRIAL_ROWS, len(data))) for _ in range(2)])
    columns = {name: list(rows[name]) for name in rows.column_names}
    prompts = columns.pop("prompt")
    answers = [_message(str(answer)) for answer in columns.get("answer", [""] * len(rows))]
    given = columns.pop("completion", answers)
    messages = [one or other for one, other in zip(given, answers, strict=True)]
    # Ids that are as good as any to see whether a reward works.
    ids = [list(str(message).encode()) for message in messages]
    for function in functions:
        gold.trial(function, messages, {**columns, "prompts": prompts, "completion_ids": ids})


def _gold_rows(
    reward: rewards.Reward, file: Path, completion: str | None, answer: str | None
) -> tuple[datasets.Dataset, list[str], str | None, list[str]]:
    """The rows of a file, their gold answers as text, the column of these, and notes on them."""
    if not file.is_file():
        raise tasks.TaskError(f"{file}: there is no such file")
    if file.suffix == ".py" and (completion or answer):
        raise tasks.TaskError(
            f"{file}: a script's rows are used as they are; leave --completion and --answer out"
        )
    if file.suffix == ".py":
        source = DataSource(script=str(file), split="eval", size=SCRIPT_ROWS)
    else:
        source = DataSource(path=str(file), completion=completion, answer=answer)
    has = tasks.columns(source)
    column = _first(COMPLETIONS, has) if completion is None else None
    notes = [f"column `{column}`" if completion is None else repr(completion)]
    if completion is None and column is None:
        raise tasks.TaskError(
            f"{file}: no column {', '.join(COMPLETIONS)}; say where its gold answers are with "
            f"--completion, a template of its columns {', '.join(has)}"
        )
    if source.script is None:
        prompt = _first(PROMPTS, has)
        source.prompt = None if prompt == "prompt" else _column(prompt)
        judged = _first(ANSWERS, has)
        if (
            answer is None
            and "answer" in reward.required_columns
            and judged not in (None, "answer")
        ):
            source.answer = _column(judged)
            notes.append(f"compared with column `{judged}`")
    rows = tasks.load(source)
    golds = rows[column or "completion"]
    return rows, ["" if one is None else completion_text(one) for one in golds], column, notes


def _first(names: Sequence[str], has: Sequence[str]) -> str | None:
    return next((name for name in names if name in has), None)


def _form(reward: rewards.Reward, texts: list[str], columns: Mapping[str, list[Any]]) -> str:
    """The form in which the most of the first gold answers get the top score."""
    few = {name: values[:FORM_ROWS] for name, values in columns.items()}
    best, most = FORMS[0], -1
    for form in FORMS:
        messages = [_message(form.format(text)) for text in texts[:FORM_ROWS]]
        scored = list(gold.score(reward, messages, few))
        right = len(scored) - len(gold.below(scored, reward.top_score))
        if right > most:
            best, most = form, right
        if right == len(scored):
            break
    return best


def _column(name: str | None) -> str:
    """A template that is this column alone, or empty."""
    return "" if name is None else "{" + name + "}"


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _ids(tokenizer: str, texts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(tokenizer)
    return [list(made(text, add_special_tokens=False)["input_ids"]) for text in texts]
