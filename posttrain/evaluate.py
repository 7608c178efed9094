"""Score a policy by generation: accuracy, lengths, tokens/s, and MTP draft acceptance."""

import asyncio
import inspect
import time
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoTokenizer, DeepseekV3Config, PreTrainedTokenizerBase
from vllm import SamplingParams

from posttrain import gold, tasks
from posttrain.recipe import DataSource, Recipe, RecipeError
from posttrain.rollout.engine import Completion, DraftCounts, Engine, request_seed

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

    Every process must call it: each scores its share on its own engine, all get the whole result.
    Raises RecipeError without held-out data or rewards, TaskError if the data set is smaller than `eval.count`.
    """
    section = recipe.eval
    rows = tasks.load(held_out(recipe))
    if len(rows) < section.count:
        raise tasks.TaskError(
            f"eval.count: at most the rows of data.eval ({len(rows)}), got {section.count}; "
            "lower eval.count or give the source more rows"
        )
    state = PartialState()
    mine = list(range(section.count))[state.process_index :: state.num_processes]
    rows = rows.select(mine)
    prompts = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False)
        for p in rows["prompt"]
    ]
    room = recipe.rollout.max_model_len - section.max_tokens
    longest = max(map(len, prompts), default=0)
    if longest > room:
        raise tasks.TaskError(
            f"data.eval: a prompt has {longest} tokens, and rollout.max_model_len "
            f"{recipe.rollout.max_model_len} less eval.max_tokens {section.max_tokens} leaves "
            f"{room}; raise the one or lower the other"
        )
    greedy, drafted, seconds = _generated(engine, prompts, mine, recipe, section.temperature)
    texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in greedy]
    first = recipe.rewards[0]
    scores = first.load()(
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        prompts=rows["prompt"],
        completion_ids=[c.token_ids for c in greedy],
        **{name: rows[name] for name in rows.column_names if name not in ("prompt", "completion")},
    )
    if inspect.iscoroutine(scores):
        scores = asyncio.run(scores)
    sampled = DraftCounts(0, (0,))
    if drafted.drafts:
        share = slice(max(1, SAMPLED_PROMPTS // state.num_processes))
        _, sampled, _ = _generated(engine, prompts[share], mine[share], recipe, 1.0)
    parts = gather_object(
        [
            {
                "right": sum(score == 1.0 for score in scores),
                "tokens": sum(len(c.token_ids) for c in greedy),
                "truncated": sum(c.finish_reason == "length" for c in greedy),
                "drafted": drafted.drafts,
                "kept": sum(drafted.accepted_per_position[:1]),
                "drafted_sampled": sampled.drafts,
                "kept_sampled": sum(sampled.accepted_per_position[:1]),
                "rate": sum(len(c.token_ids) for c in greedy) / seconds,
            }
        ]
    )
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    return Evaluation(
        accuracy=total["right"] / section.count,
        count=section.count,
        mean_length=total["tokens"] / section.count,
        truncated=total["truncated"] / section.count,
        tokens_per_second=total["rate"],
        acceptance_greedy=_ratio(total["kept"], total["drafted"]),
        acceptance=_ratio(total["kept_sampled"], total["drafted_sampled"]),
    )


def held_out(recipe: Recipe) -> DataSource:
    """Return the source to score on; RecipeError if there is none, or nothing to score by."""
    if recipe.data.eval is None or not recipe.rewards:
        raise RecipeError(f"{recipe.name}: evaluation needs data.eval and rewards; add both")
    return recipe.data.eval


def _generated(
    engine: Engine,
    prompts: list[list[int]],
    indices: list[int],
    recipe: Recipe,
    temperature: float,
) -> tuple[list[Completion], DraftCounts, float]:
    """Complete the prompts; return completions, the drafts they took, and seconds."""
    sampling = [
        SamplingParams(
            temperature=temperature,
            max_tokens=recipe.eval.max_tokens,
            seed=request_seed(recipe.seed, 0, index, 0),
            logprobs=0,
        )
        for index in indices
    ]
    before, started = engine.draft_counts(), time.perf_counter()
    completions = engine.generate(prompts, sampling)
    seconds = time.perf_counter() - started
    return completions, engine.draft_counts() - before, seconds


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def evaluate_checkpoint(path: Path, recipe: Recipe) -> Evaluation:
    """Start an engine on a checkpoint, drafting with its first MTP module if any; score it."""
    held_out(recipe)
    drafts = min(1, DeepseekV3Config.from_pretrained(path).num_nextn_predict_layers)
    engine = Engine.start(path, replace_fields(recipe.rollout, num_speculative_tokens=drafts))
    try:
        return evaluate(engine, AutoTokenizer.from_pretrained(path), recipe)
    finally:
        engine.close()


def run(checkpoint: Path, recipe: Recipe) -> dict[str, Any]:
    """Evaluate a checkpoint on the recipe's held-out set; return what `posttrain eval` prints."""
    gold.trial([recipe.rewards[0].load()], tasks.load(held_out(recipe)))
    result = evaluate_checkpoint(checkpoint, recipe)
    return {"checkpoint": str(checkpoint), "recipe": recipe.name, **result.as_dict()}
