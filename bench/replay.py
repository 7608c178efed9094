"""Where replay matters: the mismatch at several sizes and precisions, and what a record costs.

    python bench/replay.py [CHECKPOINT ...] [--prompts 128] [--engines bfloat16 float16] [--trainers float32 bfloat16]
    python bench/replay.py --cost

Policies of several sizes from scratch, then the given checkpoints (on the prompts of the recipe beside them):
one row each, |d| in nats. `factor` is the mean |engine - trainer| on tokens whose choices differed, without
replay over with, and how many those tokens are. `shuffled` is the control, a record of other tokens. The last
columns are what TRL's corrections would do without and with replay: tokens cut off (ratio above 2), sequences
masked (ratio above 3).

`--cost` compares engines that record and do not, and forward passes that replay and do not, in turns.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from posttrain import environment

environment.prepare()

import torch  # noqa: E402
from transformers import DeepseekV3Config  # noqa: E402
from vllm import SamplingParams  # noqa: E402

from posttrain import recipe as recipes  # noqa: E402
from posttrain.mismatch.measure import Scorer, measure, prompts_of, sampled  # noqa: E402
from posttrain.mismatch.split import Gap  # noqa: E402
from posttrain.policy import checkpoint  # noqa: E402
from posttrain.policy.model import PolicyForCausalLM  # noqa: E402
from posttrain.recipe.sections import RolloutSection  # noqa: E402
from posttrain.rollout.engine import Engine  # noqa: E402

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 96,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.06,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def routing(layers: int, experts: int, top: int, groups: int, of: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "n_routed_experts": experts,
        "num_experts_per_tok": top,
        "n_group": groups,
        "topk_group": of,
    }


SIZES: dict[str, dict[str, Any]] = {
    "3 layers, 2 of 16 experts": routing(3, 16, 2, 4, 2),
    "6 layers, 4 of 32 experts": routing(6, 32, 4, 4, 2),
    "12 layers, 6 of 64 experts": routing(12, 64, 6, 1, 1),
    "12 layers, 6 of 64, flat routers": routing(12, 64, 6, 1, 1) | {"router_scale": 0.1},
    "6 layers, 8 of 256 experts": routing(6, 256, 8, 8, 4) | {"moe_intermediate_size": 32},
}
"""Router scale: what router weights are multiplied by; small ones score all experts nearly alike."""

HEAD = (
    "| policy | engine, trainer | choices, tokens differing | without replay: mean, max, k3 | with: mean, max, k3 |"
    " factor | shuffled | cut off > 2 | masked > 3 |\n|---|---|---|---|---|---|---|---|---|"
)


def from_scratch(size: dict[str, Any], seed: int = 0) -> PolicyForCausalLM:
    """A policy with random biases of a few bias updates."""
    size = COMMON | size
    scale = size.pop("router_scale", 1.0)
    torch.manual_seed(seed)
    config = DeepseekV3Config(**size)
    config._attn_implementation = "sdpa"
    policy = PolicyForCausalLM(config).eval()
    with torch.no_grad():
        for router in policy.model.routers:
            router.weight.mul_(scale)
            router.e_score_correction_bias.uniform_(-0.02 * scale, 0.02 * scale)
    return policy


def row(name: str, engine: str, trainer: str, scorer: Scorer) -> str:
    found = measure(scorer)
    gaps = found.split.gaps()
    both = [gaps["without_replay"], gaps["precision"]]
    changed = gaps["changed_without_replay"], gaps["changed_precision"]
    factor = f"{changed[0].mean / changed[1].mean:.2f}" if changed[0].tokens else "-"
    factor += f" ({changed[0].tokens})"
    shares = sum(found.split.choices_differing()) / len(found.layers)
    tokens = found.split.changed_N.double().mean().item()
    mask = scorer.mask_BC
    rows = mask.nonzero()[:, 0]
    cut, masked = [], []
    for logps in (found.split.own_N, found.split.replayed_N):
        d_N = (logps - found.split.engine_N).double()
        sums = torch.zeros(len(mask), dtype=torch.float64).index_add(0, rows, d_N)
        cut.append(f"{(d_N.exp() > 2).double().mean():.2%}")
        masked.append(f"{(sums.exp() > 3).double().mean():.1%}")
    return (
        f"| {name} | {engine}, {trainer} | {shares:.2%}, {tokens:.1%} "
        f"| {said(both[0])} | {said(both[1])} | {factor} | {found.shuffled.mean:.1e} "
        f"| {' -> '.join(cut)} | {' -> '.join(masked)} |"
    )


def said(gap: Gap) -> str:
    return f"{gap.mean:.1e}, {gap.largest:.1e}, {gap.k3:.1e}"


def mismatch_table(checkpoints: list[Path], args: argparse.Namespace) -> None:
    print(HEAD, flush=True)
    settings = RolloutSection(max_model_len=128, kv_cache_memory_gib=0.5)
    with tempfile.TemporaryDirectory() as folder:
        places: list[tuple[str, Path, recipes.Recipe | None]] = []
        for name, size in SIZES.items():
            place = Path(folder) / name.replace(" ", "-")
            checkpoint.save(from_scratch(size), None, place)
            places.append((name, place, None))
        for path in checkpoints:
            places.append((str(path), path, recipes.load(path.resolve().parent / "recipe.yaml")))
        for name, place, recipe in places:
            policy = checkpoint.load(place, dtype=torch.float32, attn_implementation="sdpa")
            prompts = prompts_of(place, recipe, policy.config.vocab_size, args.prompts)
            for engine in args.engines:
                section = replace(recipe.rollout if recipe else settings, dtype=engine)
                completions = sampled(place, section, prompts, args.tokens)
                for trainer in args.trainers:
                    scorer = Scorer(policy, prompts, completions, 1.0, getattr(torch, trainer))
                    print(row(name, engine, trainer, scorer), flush=True)


def cost(args: argparse.Namespace) -> None:
    """Rollouts and forward passes with and without, in turns; the median of each, processor time."""
    print(
        "| policy | bytes | rollout, s | recorded, s | forward, s | replayed, s | per 1,000 tokens"
    )
    print("|---|---|---|---|---|---|")
    for name in list(SIZES)[:3]:
        print(cost_row(name, args), flush=True)


def cost_row(name: str, args: argparse.Namespace) -> str:
    policy = from_scratch(SIZES[name])
    settings = RolloutSection(max_model_len=128, kv_cache_memory_gib=0.5, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "policy"
        checkpoint.save(policy, None, place)
        prompts = prompts_of(place, None, policy.config.vocab_size, args.prompts)
        requests = [
            SamplingParams(max_tokens=args.tokens, seed=i, ignore_eos=True)
            for i in range(len(prompts))
        ]
        engines = [Engine.start(place, settings, record_routing=flag) for flag in (False, True)]
        completions = engines[1].generate(prompts, requests)
        rollouts = in_turns([partial(engine.generate, prompts, requests) for engine in engines])
        for engine in engines:
            engine.close()
    scorer = Scorer(policy, prompts, completions, 1.0, torch.float32)
    passes = in_turns([partial(scorer.score, record) for record in (None, scorer.record_BSLK)])
    tokens = len(prompts) * (len(prompts[0]) + args.tokens) / 1000
    one = completions[0].experts[0]
    times = " | ".join(f"{spent / tokens:.4f}" for spent in (*rollouts, *passes))
    return f"| {name} | {1000 * one.numel() * one.element_size():,} | {times} |"


def in_turns(calls: list[Callable[[], Any]], rounds: int = 7) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, spent in zip(calls, times, strict=True):
            started = time.process_time()
            call()
            spent.append(time.process_time() - started)
    return [statistics.median(spent) for spent in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--engines", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--trainers", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--cost", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if args.cost:
        cost(args)
    else:
        mismatch_table(args.checkpoints, args)


if __name__ == "__main__":
    main()
