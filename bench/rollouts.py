"""Rollouts and GRPO steps of this project beside stock TRL's, in one run.

    python bench/rollouts.py [RECIPE] [--sequences 256] [--steps 3]

Same policy (the recipe's shape, random weights), same prompts, same lengths: each completion is
forced to a length drawn evenly from 32 to 256 tokens. Stock is `trl.GRPOTrainer` with
`use_vllm=False` on transformers' DeepseekV3ForCausalLM, which has no MTP modules to train, no
balance and nothing to sync. Prints generated tokens/s, trained tokens/s and seconds a step.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from posttrain import environment

environment.prepare()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
)
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from vllm import SamplingParams  # noqa: E402

from posttrain import recipe as recipes  # noqa: E402
from posttrain import tasks  # noqa: E402
from posttrain.policy import checkpoint  # noqa: E402
from posttrain.recipe import Recipe  # noqa: E402
from posttrain.rollout.engine import Engine  # noqa: E402
from posttrain.rollout.parity import Gate  # noqa: E402
from posttrain.training.config import PolicyGRPOConfig  # noqa: E402
from posttrain.training.grpo import PolicyGRPOTrainer  # noqa: E402
from posttrain.training.stage import Stage  # noqa: E402

SHORTEST, LONGEST = 32, 256
# Longer than the recipe's own completions.
ROOM = ("rollout.max_model_len=384", "policy.config.max_position_embeddings=512")


class ForcedLengths(LogitsProcessor):
    """Ends row i after lengths[i] tokens, and not before."""

    def __init__(self, lengths: list[int], end: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.end = end
        self.made = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.made += 1
        scores[:, self.end] = float("-inf")
        ending = self.lengths.to(scores.device) <= self.made
        scores[ending] = float("-inf")
        scores[ending, self.end] = 0.0
        return scores


def lengths(count: int) -> list[int]:
    """Ragged lengths, the same for both sides."""
    return random.Random(0).choices(range(SHORTEST, LONGEST + 1), k=count)


class ForcedPolicyTrainer(PolicyGRPOTrainer):
    """Our trainer with forced lengths."""

    def sampling(self, index: int) -> SamplingParams:
        sampling = super().sampling(index)
        sampling.max_tokens = lengths(self.args.generation_batch_size)[index]
        sampling.ignore_eos = True
        return sampling


class Clock:
    """Seconds and tokens of the generation and of the whole step, warm-up step left out."""

    def __init__(self) -> None:
        self.generation: list[float] = []
        self.tokens: list[int] = []

    def generated(self, seconds: float, tokens: int) -> None:
        self.generation.append(seconds)
        self.tokens.append(tokens)


def constant_reward(completions: list[Any], **columns: Any) -> list[float]:
    """Rewards that differ within a group, so that every gradient is real."""
    return [float(i % 2) for i in range(len(completions))]


def settings(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What both trainers are configured with."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": args.sequences,
        "num_generations": 8,
        "max_completion_length": LONGEST,
        "max_steps": args.steps + 1,
        "learning_rate": 1e-5,
        "beta": 0.0,
        "loss_type": "dapo",
        "gradient_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "vllm_importance_sampling_correction": False,
    }


def step_times(trainer: Any) -> list[float]:
    """Run the trainer; return the seconds of each step but the first."""
    marks: list[float] = []
    step = trainer.training_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = step(*args, **kwargs)
        marks.append(time.perf_counter() - started)
        return result

    trainer.training_step = timed
    trainer.train()
    return marks[1:]


def ours(
    recipe: Recipe, source: Path, prompts: Dataset, args: argparse.Namespace
) -> dict[str, Any]:
    """Our trainer: vLLM rollouts, verified sync, parity gate, MTP loss, balance."""
    policy = checkpoint.load(source, dtype=torch.float32, attn_implementation="sdpa")
    engine = Engine.start(source, recipe.rollout)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ForcedPolicyTrainer(
            engine=engine,
            engine_limit=recipe.rollout.max_model_len,
            gate=Gate(recipe.parity.tolerance),
            samples=Path(folder) / "samples.jsonl",
            model=policy,
            reward_funcs=[constant_reward],
            args=PolicyGRPOConfig(**settings(Path(folder), args)),
            train_dataset=prompts,
            processing_class=AutoTokenizer.from_pretrained(source),
        )
        clock = Clock()
        generate = engine.generate

        def timed(inputs: Any, sampling: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            completions = generate(inputs, sampling, **kwargs)
            if len(inputs) == args.sequences:
                tokens = sum(len(c.token_ids) for c in completions)
                clock.generated(time.perf_counter() - started, tokens)
            return completions

        engine.generate = timed  # type: ignore[method-assign]
        steps = step_times(trainer)
    engine.close()
    return row(clock, steps)


def stock(source: Path, prompts: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """Stock TRL with transformers' own model and `generate`."""
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    clock = Clock()
    generate = model.generate

    def forced(*positional: Any, **kwargs: Any) -> Any:
        rows = kwargs["input_ids"].shape[0]
        wanted = lengths(rows)
        force = LogitsProcessorList([ForcedLengths(wanted, tokenizer.eos_token_id)])
        started = time.perf_counter()
        output = generate(*positional, logits_processor=force, **kwargs)
        clock.generated(time.perf_counter() - started, sum(wanted))
        return output

    model.generate = forced
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[constant_reward],
            args=GRPOConfig(**settings(Path(folder), args)),
            train_dataset=prompts,
            processing_class=tokenizer,
        )
        steps = step_times(trainer)
    return row(clock, steps)


def row(clock: Clock, steps: list[float]) -> dict[str, Any]:
    """Means over the steps after the first."""
    generation, tokens = clock.generation[1:], clock.tokens[1:]
    step = sum(steps) / len(steps)
    made = sum(generation) / len(generation)
    return {
        "generated tokens/s": sum(tokens) / sum(generation),
        "trained tokens/s": sum(tokens) / len(tokens) / (step - made),
        "seconds a step": step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="recipes/arithmetic.yaml")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipes.load(args.recipe, [f"output_root={folder}", *ROOM])
        stage = Stage.start(recipe, "bench", resume=False)
        source = Path(folder) / "policy"
        checkpoint.save(stage.policy(None), stage.tokenizer, source)
        prompts = tasks.load(recipe.data.train).select_columns(["prompt"])
        results = {
            "posttrain": ours(recipe, source, prompts, args),
            "stock TRL, generate": stock(source, prompts, args),
        }
    names = list(results["posttrain"])
    print(
        f"{args.sequences} sequences of {SHORTEST} to {LONGEST} tokens, mean of {args.steps} steps"
    )
    print(f"{'':24}" + "".join(f"{name:>22}" for name in names))
    for side, values in results.items():
        print(f"{side:24}" + "".join(f"{values[name]:22.2f}" for name in names))
    first, second = results.values()
    print(f"{'ratio':24}" + "".join(f"{first[name] / second[name]:22.2f}" for name in names))


if __name__ == "__main__":
    main()
