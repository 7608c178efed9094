"""Score a policy by generation: accuracy, lengths, tokens/s, and MTP draft acceptance."""

import time
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, DeepseekV3Config, PreTrainedTokenizerBase
from vllm import SamplingParams

import rewards
from posttrain import tasks
from posttrain.recipe import Recipe
from posttrain.rollout.engine import Engine, request_seed

# Prompts on which drafting is measured at temperature 1.
SAMPLED_PROMPTS = 64


@dataclass
class Evaluation:
    """What generation on the held-out set gave.

    accuracy: share of completions with the first reward at 1. mean_length: tokens.
    truncated: share that ran into `eval.max_tokens`. acceptance: share of first drafted tokens
    that the trunk accepted, greedy and at temperature 1; None without drafting.
    """

    accuracy: float
    count: int
    mean_length: float
    truncated: float
    tokens_per_second: float
    acceptance_greedy: float | None = None
    acceptance: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields, for `summary.json`."""
        return asdict(self)

    def mtp_dict(self) -> dict[str, Any]:
        """The part of `summary.json` under `mtp`; `acceptance` is the one at temperature 1."""
        return {"acceptance": self.acceptance, "acceptance_greedy": self.acceptance_greedy}


def evaluate(engine: Engine, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Evaluation:
    """Score the held-out set with a running engine, by the recipe's first reward.

    Raises TaskError if the data set is smaller than `eval.count`.
    """
    section = recipe.eval
    rows = tasks.load(recipe.data.eval)
    if len(rows) < section.count:
        raise tasks.TaskError(
            f"eval.count: at most the rows of data.eval ({len(rows)}), got {section.count}; "
            "lower eval.count or give the source more rows"
        )
    rows = rows.select(range(section.count))
    prompts = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False)
        for p in rows["prompt"]
    ]
    sampling = [
        SamplingParams(
            temperature=section.temperature,
            max_tokens=section.max_tokens,
            seed=request_seed(recipe.seed, 0, i, 0),
            logprobs=0,
        )
        for i in range(len(prompts))
    ]
    before = engine.draft_counts()
    started = time.perf_counter()
    completions = engine.generate(prompts, sampling)
    seconds = time.perf_counter() - started
    greedy = engine.draft_counts() - before
    texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
    first = recipe.rewards[0]
    scores = rewards.load(first.name, **first.options)(
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        prompts=rows["prompt"],
        completion_ids=[c.token_ids for c in completions],
        **{name: rows[name] for name in rows.column_names if name not in ("prompt", "completion")},
    )
    lengths = [len(c.token_ids) for c in completions]
    result = Evaluation(
        accuracy=sum(score == 1.0 for score in scores) / len(scores),
        count=len(scores),
        mean_length=sum(lengths) / len(lengths),
        truncated=sum(c.finish_reason == "length" for c in completions) / len(lengths),
        tokens_per_second=sum(lengths) / seconds,
    )
    if not greedy.drafts:
        return result
    before = engine.draft_counts()
    engine.generate(
        prompts[:SAMPLED_PROMPTS],
        [
            SamplingParams(temperature=1.0, max_tokens=s.max_tokens, seed=s.seed, logprobs=0)
            for s in sampling[:SAMPLED_PROMPTS]
        ],
    )
    sampled = engine.draft_counts() - before
    return replace_fields(
        result, acceptance_greedy=greedy.acceptance, acceptance=sampled.acceptance
    )


def evaluate_checkpoint(path: Path, recipe: Recipe) -> Evaluation:
    """Start an engine on a checkpoint, drafting with its first MTP module if any; score it."""
    drafts = min(1, DeepseekV3Config.from_pretrained(path).num_nextn_predict_layers)
    engine = Engine.start(path, replace_fields(recipe.rollout, num_speculative_tokens=drafts))
    try:
        return evaluate(engine, AutoTokenizer.from_pretrained(path), recipe)
    finally:
        engine.close()


def run(checkpoint: Path, recipe: Recipe) -> dict[str, Any]:
    """Evaluate a checkpoint on the recipe's held-out set; return what `posttrain eval` prints."""
    result = evaluate_checkpoint(checkpoint, recipe)
    return {"checkpoint": str(checkpoint), "recipe": recipe.name, **result.as_dict()}
