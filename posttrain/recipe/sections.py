"""The sections of a recipe as dataclasses; every field of a recipe file is one of these, TRL's, or the policy's."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

import rewards


@dataclass
class PolicySection:
    """Where the policy comes from: a checkpoint (`path`) or, from scratch, its `config`."""

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    # What it computes and is saved in. What trains is held in float32 always.
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: Literal[
        "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "sdpa"
    num_nextn_predict_layers: int | None = field(default=None, metadata={"at_least": 0})
    # The config.json that --dry-run uses while the checkpoint itself is not on this machine.
    dry_run_config: str | None = None


@dataclass
class DataSource:
    """One data set: a hub name, a local file, or a script with `rows(split, size, seed)`."""

    hub: str | None = None
    path: str | None = None
    script: str | None = None
    name: str | None = None
    split: str | None = None
    size: int | None = field(default=None, metadata={"at_least": 1})
    seed: int = 0
    system: str | None = None
    prompt: str | None = None
    completion: str | None = None
    answer: str | None = None
    # The answer is what follows the last such mark in the rendered `answer` (GSM8K: "####").
    answer_after: str | None = None
    # The answer is what the last \boxed{} in the rendered `answer` holds (MATH).
    answer_boxed: bool = False
    # Set by the loader: which source of the recipe this is, and where it is written.
    role: str = field(default="", metadata={"internal": True})
    where: str = field(default="", metadata={"internal": True}, compare=False)


@dataclass
class DataSection:
    """The data sets of a recipe, each used by one stage."""

    sft: DataSource | None = None
    train: DataSource | None = None
    eval: DataSource | None = None


@dataclass
class RolloutSection:
    """The rollout engine, by vLLM's names where it has them."""

    max_model_len: int = field(default=2048, metadata={"at_least": 2})
    max_num_seqs: int = field(default=256, metadata={"at_least": 1})
    gpu_memory_utilization: float = field(default=0.3, metadata={"above": 0, "at_most": 1})
    # The cache on a CPU; on a GPU it takes what gpu_memory_utilization leaves.
    kv_cache_memory_gib: float = field(default=1.0, metadata={"above": 0})
    # "auto" becomes the policy's.
    dtype: str = field(
        default="auto", metadata={"one_of": ("auto", "float32", "bfloat16", "float16")}
    )
    num_speculative_tokens: int = field(default=0, metadata={"at_least": 0})
    tensor_parallel_size: int = field(default=1, metadata={"at_least": 1})
    seed: int = 0


@dataclass
class ParitySection:
    """The gate that compares the engine's log-probabilities with the trainer's after a weight sync."""

    tolerance: float = field(default=1e-4, metadata={"above": 0})
    prompts: int = field(default=4, metadata={"at_least": 1})
    tokens: int = field(default=24, metadata={"at_least": 1})


@dataclass
class RewardSection:
    """One reward function, its weight in the sum, the options it is made with, and its limits."""

    name: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    # By `rewards.Limits`; null takes its default. Not for a reward that limits itself (math, code).
    seconds: float | None = field(default=None, metadata={"above": 0})
    failed: float | None = None
    group_wise: bool | None = None
    workers: int | None = field(default=None, metadata={"at_least": 1})

    def load(self) -> rewards.Reward:
        """Make the reward; raises RewardError."""
        given = {
            name: value
            for name in ("seconds", "failed", "group_wise", "workers")
            if (value := getattr(self, name)) is not None
        }
        return rewards.load(self.name, rewards.Limits(**given), **self.options)


@dataclass
class EvalSection:
    """How a policy is scored by generation."""

    count: int = field(default=500, metadata={"at_least": 1})
    max_tokens: int = field(default=256, metadata={"at_least": 1})
    temperature: float = field(default=0.0, metadata={"at_least": 0})


@dataclass
class Recipe:
    """A whole run, checked."""

    name: str
    policy: PolicySection = field(default_factory=PolicySection)
    data: DataSection = field(default_factory=DataSection)
    seed: int = 42
    output_root: str = "runs"
    # The `accelerate launch` configuration that the recipe is meant for.
    accelerate: str | None = None
    # Checked fields of TRL's configurations; None when the recipe has no such stage.
    sft: dict[str, Any] | None = None
    grpo: dict[str, Any] | None = None
    rollout: RolloutSection = field(default_factory=RolloutSection)
    parity: ParitySection = field(default_factory=ParitySection)
    rewards: list[RewardSection] = field(default_factory=list)
    eval: EvalSection = field(default_factory=EvalSection)

    def run_dir(self, stage: str) -> Path:
        """Return the folder of a stage's results."""
        return Path(self.output_root) / self.name / stage

    def dump(self, path: Path | str) -> None:
        """Write the resolved recipe, which loads again as it is."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(_plain(self), sort_keys=False, allow_unicode=True, width=100)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {
            f.name: _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not f.metadata.get("internal")
        }
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
