"""Scoring by generation, with an engine whose answers are written down."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from posttrain import evaluate
from posttrain.recipe import DataSection, DataSource, EvalSection, Recipe, RewardSection
from posttrain.rollout.engine import Completion, DraftCounts
from posttrain.tasks import TaskError

TOKENIZER = Path(__file__).parents[1] / "data" / "arithmetic" / "tokenizer"
SCRIPT = """\
def rows(split, size, seed):
    return [{"prompt": f"{i} + {i}", "answer": str(2 * i)} for i in range(size)]
"""


class WrittenEngine:
    """Answers every prompt i + i with 2i, except for i = 3; the last one runs into its limit.

    Of three drafts a greedy completion two are kept, of those at temperature 1 one of four.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.counts = DraftCounts(0, (0,))
        self.asked: list[Any] = []

    def draft_counts(self) -> DraftCounts:
        return self.counts

    def generate(self, prompts: Sequence[list[int]], sampling: Sequence[Any]) -> list[Completion]:
        self.asked.append(sampling)
        done = []
        for prompt in prompts:
            i = int(self.tokenizer.decode(prompt, skip_special_tokens=True).partition(" +")[0])
            ids = self.tokenizer.encode(f"#### {2 * i if i != 3 else 7}", add_special_tokens=False)
            done.append(Completion(ids, [0.0] * len(ids), "length" if i == 4 else "stop"))
        drafts, kept = (3, 2) if sampling[0].temperature == 0 else (4, 1)
        before = self.counts
        self.counts = DraftCounts(
            before.drafts + drafts * len(done),
            (before.accepted_per_position[0] + kept * len(done),),
        )
        return done


def recipe_of(folder: Path, count: int) -> Recipe:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return Recipe(
        name="tiny",
        data=DataSection(eval=DataSource(script=str(script), split="eval", size=5)),
        rewards=[RewardSection("math")],
        eval=EvalSection(count=count, max_tokens=32),
    )


def test_every_figure_by_hand(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    engine = WrittenEngine(tokenizer)
    result = evaluate.evaluate(engine, tokenizer, recipe_of(tmp_path, 5))  # type: ignore[arg-type]
    lengths = [
        len(tokenizer.encode(f"#### {n}", add_special_tokens=False)) for n in (0, 2, 4, 7, 8)
    ]
    assert (result.accuracy, result.count) == (4 / 5, 5)
    assert result.mean_length == pytest.approx(sum(lengths) / 5)
    assert result.truncated == 1 / 5
    assert result.acceptance_greedy == pytest.approx(2 / 3)
    assert result.acceptance == pytest.approx(1 / 4)
    assert result.tokens_per_second > 0
    greedy, sampled = engine.asked
    assert {s.temperature for s in greedy} == {0.0}
    assert {s.temperature for s in sampled} == {1.0}
    assert len({s.seed for s in greedy}) == 5
    assert {s.max_tokens for s in greedy} == {32}


def test_too_few_rows_or_room_is_told(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    engine: Any = WrittenEngine(tokenizer)
    with pytest.raises(TaskError, match=r"at most the rows of data\.eval \(5\), got 6"):
        evaluate.evaluate(engine, tokenizer, recipe_of(tmp_path, 6))
    narrow = recipe_of(tmp_path, 5)
    narrow.rollout.max_model_len = 33
    with pytest.raises(TaskError, match="raise the one or lower the other"):
        evaluate.evaluate(engine, tokenizer, narrow)
