"""A small recipe that is right, to be made wrong in one place at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain import recipe

GOOD = """\
policy:
  config:
    hidden_size: 32
    num_hidden_layers: 2
    first_k_dense_replace: 1
    n_routed_experts: 8
    n_group: 2
    topk_group: 1
    num_experts_per_tok: 2
  tokenizer: owner/tokenizer
data:
  sft: {path: rows.jsonl, prompt: "{question}", completion: "{answer}"}
  train: {path: rows.jsonl, prompt: "{question}"}
  eval: {path: rows.jsonl, prompt: "{question}"}
sft:
  learning_rate: 1e-4
grpo:
  num_generations: 4
  per_device_train_batch_size: 8
  max_completion_length: 64
rollout: {max_model_len: 128}
rewards:
  - {name: format, weight: 0.5}
eval: {count: 2, max_tokens: 64}
"""

Faults = Callable[..., list[str]]


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Path("rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    path = Path("good.yaml")
    path.write_text(GOOD)
    return path


@pytest.fixture
def faults(good: Path) -> Faults:
    """Load the recipe with a text replaced, or with overrides; return the faults, one a line."""

    def load(old: str = "", new: str = "", overrides: list[str] | None = None) -> list[str]:
        assert old in GOOD
        good.write_text(GOOD.replace(old, new, 1) if old else GOOD)
        with pytest.raises(recipe.RecipeError) as caught:
            recipe.load(good, overrides or [])
        lines = str(caught.value).splitlines()
        return [line.strip() for line in lines[1:]] if len(lines) > 1 else lines

    return load
