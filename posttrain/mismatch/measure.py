"""The mismatch of one checkpoint: sample with the engine, score in the trainer with and without replay."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer
from vllm import SamplingParams

from posttrain import tasks
from posttrain.mismatch.split import Gap, Split, aligned, only_layer, shuffled, split
from posttrain.policy import checkpoint
from posttrain.policy.model import PolicyForCausalLM
from posttrain.policy.replay import RoutingRequest
from posttrain.recipe import Recipe, RecipeError
from posttrain.recipe.sections import RolloutSection
from posttrain.rollout.engine import Completion, Engine, request_seed

RANDOM_PROMPT_TOKENS = 24
BATCH = 16
"""Sequences scored at a time."""


@dataclass(frozen=True)
class LayerEffect:
    """One layer: how many of its choices differ, and |c - b| when it alone is replayed, nats."""

    layer: int
    choices_differing: float
    tokens_differing: float
    alone: float


@dataclass(frozen=True)
class Measurement:
    """The split of one batch; `shuffled`: a - c under a record that belongs to other tokens."""

    split: Split
    shuffled: Gap
    layers: list[LayerEffect]

    def as_dict(self) -> dict[str, Any]:
        """What `posttrain mismatch` prints; gaps as mean and max of |d| and k3, in nats."""
        gaps = self.split.gaps() | {"shuffled": self.shuffled}
        changed, tokens = int(self.split.changed_N.sum()), len(self.split.changed_N)
        return {
            "tokens": tokens,
            "gaps": {n: {"mean": g.mean, "max": g.largest, "k3": g.k3} for n, g in gaps.items()},
            "choices_differing": sum(self.split.choices_differing()) / len(self.layers),
            "tokens_differing": changed / tokens,
            "layers": [asdict(layer) for layer in self.layers],
        }


def sampled(
    folder: Path,
    settings: RolloutSection,
    prompts: Sequence[list[int]],
    tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Completion]:
    """Complete each prompt by at most `tokens`, with an engine that records its choices."""
    requests = [
        SamplingParams(
            temperature=temperature, max_tokens=tokens, seed=request_seed(seed, 0, row, 0)
        )
        for row in range(len(prompts))
    ]
    engine = Engine.start(folder, settings, record_routing=True)
    try:
        return engine.generate(prompts, requests, count_drafts=False)
    finally:
        engine.close()


class Scorer:
    """Scores sampled sequences in the trainer's arithmetic.

    dtype: bfloat16 computes under autocast with float32 weights, as training does.
    """

    def __init__(
        self,
        policy: PolicyForCausalLM,
        prompts: Sequence[list[int]],
        completions: Sequence[Completion],
        temperature: float,
        dtype: torch.dtype,
    ) -> None:
        self.policy = policy.eval()
        self.temperature = temperature
        self.dtype = dtype
        self.sizes = [(len(p), len(c.token_ids)) for p, c in zip(prompts, completions, strict=True)]
        # Prompts end and completions start in one column, as in GRPO.
        before, after = (max(size[side] for size in self.sizes) for side in (0, 1))
        self.starts = [before - prompt for prompt, _ in self.sizes]
        self.ids_BS = torch.zeros(len(prompts), before + after, dtype=torch.int64)
        self.mask_BS = torch.zeros_like(self.ids_BS)
        self.engine_BC = torch.zeros(len(prompts), after)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids, start = prompt + completion.token_ids, self.starts[row]
            self.ids_BS[row, start : start + len(ids)] = torch.tensor(ids)
            self.mask_BS[row, start : start + len(ids)] = 1
            self.engine_BC[row, : len(completion.logprobs)] = torch.tensor(completion.logprobs)
        self.record_BSLK = aligned(
            [c.experts for c in completions if c.experts is not None], self.starts, before + after
        )

    @property
    def mask_BC(self) -> Tensor:
        """Which places of the completions hold a token."""
        return self.mask_BS[:, -self.engine_BC.shape[1] :].bool()

    @torch.no_grad()
    def score(self, record_BSLK: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return log-probs (B, C) of the completions and the experts (B, S, L, K) behind them."""
        scored = [
            self._batch(rows, None if record_BSLK is None else record_BSLK[rows])
            for rows in torch.arange(len(self.ids_BS)).split(BATCH)
        ]
        logps, experts = zip(*scored, strict=True)
        return torch.cat(logps), torch.cat(experts)

    def _batch(self, rows: Tensor, record_BSLK: Tensor | None) -> tuple[Tensor, Tensor]:
        device, model = self.policy.device, self.policy.model
        ids_BS, completion = self.ids_BS[rows].to(device), self.engine_BC.shape[1]
        record = None if record_BSLK is None else record_BSLK.to(device)
        model.routing_request = RoutingRequest(record, keep=True)
        half = self.dtype != torch.float32
        with torch.autocast(device.type, dtype=self.dtype if half else None, enabled=half):
            hidden_BSD = model(
                input_ids=ids_BS, attention_mask=self.mask_BS[rows].to(device), use_cache=False
            ).last_hidden_state
            logits = [self.policy.lm_head(row) for row in hidden_BSD[:, -completion - 1 : -1]]
        chosen = [
            -F.cross_entropy(row.float() / self.temperature, ids, reduction="none")
            for row, ids in zip(logits, ids_BS[:, -completion:], strict=True)
        ]
        experts = model.take_extras().experts_BSLK
        return torch.stack(chosen).cpu(), experts.cpu()


def measure(scorer: Scorer, seed: int = 0) -> Measurement:
    """Score with own choices, the record, each layer's part of it, and a shuffled one."""
    record, mask = scorer.record_BSLK, scorer.mask_BC
    own_BC, own_BSLK = scorer.score(None)
    replayed_BC, _ = scorer.score(record)
    parts = split(scorer.engine_BC, own_BC, replayed_BC, own_BSLK, record, mask)
    wrong_BC, _ = scorer.score(shuffled(record, seed))
    shares = zip(parts.choices_differing(), parts.tokens_differing(), strict=True)
    layers = [
        LayerEffect(
            layer,
            *share,
            Gap.of((scorer.score(only_layer(record, place))[0] - own_BC)[mask]).mean,
        )
        for place, (layer, share) in enumerate(
            zip(scorer.policy.model.trunk_router_layers, shares, strict=True)
        )
    ]
    return Measurement(parts, Gap.of((wrong_BC - scorer.engine_BC)[mask]), layers)


def run(
    folder: Path,
    recipe: Recipe | None,
    *,
    prompts: int,
    engine_dtype: str | None = None,
    trainer_dtype: str | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint; return what `posttrain mismatch` prints.

    Prompts, lengths and temperature are the recipe's, its types too unless others are given;
    without a recipe prompts are random tokens. Raises RecipeError if the recipe has no prompts.
    """
    settings = recipe.rollout if recipe else RolloutSection(max_model_len=96, dtype="float32")
    settings = replace(settings, dtype=engine_dtype or settings.dtype)
    dtype = trainer_dtype or (recipe.policy.dtype if recipe else "float32")
    grpo = (recipe.grpo or {}) if recipe else {}
    temperature = grpo.get("temperature", 1.0)
    seed = recipe.seed if recipe else 0
    tokens = grpo.get("max_completion_length") or (recipe.eval.max_tokens if recipe else 64)
    policy = checkpoint.load(folder, dtype=torch.float32, attn_implementation="sdpa")
    asked = prompts_of(folder, recipe, policy.config.vocab_size, prompts)
    completions = sampled(folder, settings, asked, tokens, temperature, seed)
    if torch.cuda.is_available():
        policy.to("cuda")
    scorer = Scorer(policy, asked, completions, temperature, getattr(torch, dtype))
    return {
        "checkpoint": str(folder),
        "prompts": len(asked),
        "random_prompts": recipe is None,
        "engine_dtype": settings.dtype,
        "trainer_dtype": dtype,
        "temperature": temperature,
        **measure(scorer, seed).as_dict(),
    }


def prompts_of(folder: Path, recipe: Recipe | None, vocabulary: int, count: int) -> list[list[int]]:
    """Return up to `count` prompts as tokens: of data.eval, else data.train, else random ones."""
    if recipe is None:
        source = random.Random(0)
        return [source.choices(range(vocabulary), k=RANDOM_PROMPT_TOKENS) for _ in range(count)]
    data = recipe.data.eval or recipe.data.train
    if data is None:
        raise RecipeError(f"{recipe.name}: prompts come from data.eval or data.train; add one")
    rows = tasks.load(data)
    rows = rows.select(range(min(count, len(rows))))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False)
        for p in rows["prompt"]
    ]
