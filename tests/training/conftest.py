"""Tiny policies, a handful of problems, and trainers on them."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from posttrain.policy.model import PolicyForCausalLM
from posttrain.policy.replay import RoutingRequest
from posttrain.rollout.engine import Completion, DraftCounts
from posttrain.training.config import PolicyGRPOConfig, PolicySFTConfig
from posttrain.training.grpo import PolicyGRPOTrainer
from posttrain.training.sft import PolicySFTTrainer

TOKENIZER = Path(__file__).parents[2] / "data" / "arithmetic" / "tokenizer"

POLICY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.2,
}

QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
    "lr_scheduler_type": "constant",
}


class Recorder(TrainerCallback):
    """Keeps the gradients that each optimizer step is about to use, and the logged lines."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor | None]] = []
        self.lines: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        )

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.lines.append(dict(logs))


class StubEngine:
    """Stands where the engine stands in tests of the loss: tokens drawn from each request's seed.

    A request's tokens depend on its seed alone, its log-probs on the policy, as of a perfect
    engine; `shift` is added to every log-prob, as of one that is off. `routing` is "own" of an
    engine that records what the policy chooses, "other" of one that takes other experts for about
    half of the tokens, computes with them and records them.
    """

    def __init__(
        self,
        policy: PolicyForCausalLM,
        eos_token_id: int,
        shift: float = 0.0,
        routing: str = "",
    ) -> None:
        self.policy = policy
        self.eos_token_id = eos_token_id
        self.shift = shift
        self.routing = routing
        self.records: dict[tuple[int, ...], Tensor] = {}  # of each sequence, the newest
        self.synced: list[str] = []
        self.seeds: list[int] = []

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.synced = [name for name, _ in named_tensors]

    def draft_counts(self) -> DraftCounts:
        return DraftCounts(0, ())

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], sampling: Sequence[Any]) -> list[Completion]:
        completions = []
        for prompt, request in zip(prompts, sampling, strict=True):
            self.seeds.append(request.seed)
            generator = torch.Generator().manual_seed(request.seed % 2**62)
            length = int(torch.randint(3, request.max_tokens + 1, (), generator=generator))
            tokens = torch.randint(10, 300, (length,), generator=generator).tolist()
            ends = length % 2 == 0
            if ends:
                tokens[-1] = self.eos_token_id
            training = self.policy.training
            self.policy.eval()
            logits, record = self.computed(prompt + tokens, generator)
            self.policy.train(training)
            logps = (logits / request.temperature).log_softmax(-1)[len(prompt) - 1 : -1]
            chosen = logps.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1) + self.shift
            finish = "stop" if ends else "length"
            completions.append(Completion(tokens, chosen.tolist(), finish, record))
        return completions

    def computed(self, ids: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Logits [S, V] and, of an engine that records, the experts [S-1, L, K] behind them."""

        def run(record: Tensor | None) -> Tensor:
            if self.routing:
                self.policy.model.routing_request = RoutingRequest(record, keep=True)
            return self.policy(input_ids=torch.tensor([ids])).logits[0]

        logits = run(None)
        if not self.routing:
            return logits, None
        record_SLK = self.policy.model.take_extras().experts_BSLK[0]
        if self.routing == "other":
            experts = self.policy.config.n_routed_experts
            chosen = torch.rand(record_SLK.shape[:2], generator=generator) < 0.5
            other = (record_SLK + 3) % experts
            record_SLK = torch.where(chosen.unsqueeze(-1), other, record_SLK)
            logits = run(record_SLK.unsqueeze(0))
            self.policy.model.take_extras()
        self.records[tuple(ids)] = record_SLK[:-1]
        return logits, record_SLK[:-1]


class OpenGate:
    """A parity gate that lets everything pass."""

    def check(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(max_abs_logprob_diff=0.0, experts_missed=0, tokens_tied=0)


def reward_digits(completions: list[Any], **columns: Any) -> list[float]:
    """Half a point for each digit in the text: different in every completion of a group."""
    return [0.5 * sum(c.isdigit() for c in done[0]["content"]) for done in completions]


def reward_length(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Minus a tenth for each token."""
    return [-0.1 * len(ids) for ids in completion_ids]


GRPO: dict[str, Any] = QUIET | {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "max_steps": 2,
    "max_grad_norm": 0.5,
    "reward_weights": [1.0, 0.5],
}
"""Two prompts a step, four completions each; dapo loss as TRL has it by default."""


def build_grpo(
    policy: PolicyForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    engine: Any = None,
    reward_funcs: Sequence[Any] = (reward_digits, reward_length),
    **fields: Any,
) -> tuple[PolicyGRPOTrainer, Recorder]:
    """A GRPO trainer on eight problems with a stub engine, and the recorder that watches it."""
    recorder = Recorder()
    trainer = PolicyGRPOTrainer(
        engine=engine or StubEngine(policy, tokenizer.eos_token_id),
        engine_limit=128,
        gate=OpenGate(),
        samples=folder / "samples.jsonl",
        model=policy,
        reward_funcs=list(reward_funcs),
        args=PolicyGRPOConfig(**GRPO | {"output_dir": str(folder / "steps")} | fields),
        train_dataset=Dataset.from_list(problems(8)).remove_columns("completion"),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    return trainer, recorder


@pytest.fixture
def make_grpo(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Callable[..., tuple[PolicyGRPOTrainer, Recorder]]:
    """`make_grpo(policy, engine=None, **fields)`."""
    return lambda policy, **fields: build_grpo(policy, tokenizer, tmp_path, **fields)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture
def make_policy(tokenizer: PreTrainedTokenizerBase) -> Callable[..., PolicyForCausalLM]:
    """A tiny policy from a seed, with biases that are not zero."""

    def make(seed: int = 0, **fields: Any) -> PolicyForCausalLM:
        config = DeepseekV3Config(
            **{
                "vocab_size": len(tokenizer),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            }
            | POLICY
            | fields
        )
        config._attn_implementation = "sdpa"
        config._experts_implementation = "eager"
        torch.manual_seed(seed)
        policy = PolicyForCausalLM(config)
        for router in policy.model.routers:
            router.e_score_correction_bias.normal_(0, 0.1)
        return policy

    return make


def problems(count: int) -> list[dict[str, Any]]:
    """Rows of several lengths: prompt and completion as chat messages, and the answer."""
    rows = []
    for i in range(count):
        terms = [str(3 + (7 * i + 5 * j) % 23) for j in range(2 + i % 3)]
        answer = str(sum(map(int, terms)))
        steps = "" if i % 2 else f"{' + '.join(terms)} = {answer}\n"
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"What is {' + '.join(terms)}?"}],
                "completion": [{"role": "assistant", "content": f"{steps}#### {answer}"}],
                "answer": answer,
            }
        )
    return rows


@pytest.fixture
def make_sft(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Callable[..., tuple[PolicySFTTrainer, Recorder]]:
    """An SFT trainer of a policy on `rows`, and the recorder that watches it."""

    def make(
        policy: PolicyForCausalLM, rows: list[dict[str, Any]], **fields: Any
    ) -> tuple[PolicySFTTrainer, Recorder]:
        recorder = Recorder()
        args = PolicySFTConfig(
            **QUIET
            | {"output_dir": str(tmp_path / "steps"), "max_steps": 1, "max_grad_norm": 0.0}
            | {"per_device_train_batch_size": len(rows), "learning_rate": 1e-3}
            | fields
        )
        trainer = PolicySFTTrainer(
            model=policy,
            args=args,
            train_dataset=Dataset.from_list(rows).select_columns(["prompt", "completion"]),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        return trainer, recorder

    return make


@pytest.fixture
def rows() -> Callable[[int], list[dict[str, Any]]]:
    """`rows(count)`: problems with worked or bare answers."""
    return problems
