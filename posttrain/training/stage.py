"""One stage of a run: its folder, tokenizer, policy, configuration, and summary."""

import gc
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, DeepseekV3Config, PreTrainedTokenizerBase, Trainer, set_seed

from posttrain import environment
from posttrain.policy import checkpoint
from posttrain.policy.model import PolicyForCausalLM
from posttrain.recipe import Recipe, RecipeError
from posttrain.rollout import engine
from posttrain.training.callbacks import MetricsLog, StopOnSignal, peak_memory_gib
from posttrain.training.policy_trainer import (
    PolicyTrainer,
    last_step_checkpoint,
    write_json,
)

Config = TypeVar("Config")

SUMMARY_KEYS = (
    "steps",
    "eval.before.accuracy",
    "eval.after.accuracy",
    "eval.count",
    "parity.max_abs_logprob_diff",
    "rollout.tokens_per_second",
    "train.tokens_per_second",
    "mtp.acceptance",
    "moe.max_violation",
)
"""What every `summary.json` has; null where a stage does not measure it."""


@dataclass
class Stage:
    """`runs/<recipe>/<stage>/`: `checkpoint/`, `steps/`, `recipe.yaml`, `metrics.jsonl`, ...

    `resume_from` is the step checkpoint that a resumed run continues from.
    """

    recipe: Recipe
    name: str
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    resume_from: str | None
    started: float = field(default_factory=time.monotonic)
    _stop: StopOnSignal | None = None

    @classmethod
    def start(cls, recipe: Recipe, name: str, resume: bool) -> "Stage":
        """Seed everything; what stands in the folder stays until training begins.

        Raises CheckpointError if `resume` finds no whole step checkpoint.
        """
        folder = recipe.run_dir(name)
        resume_from = None
        if resume:
            last = last_step_checkpoint(folder / "steps")
            if last is None:
                raise checkpoint.CheckpointError(
                    f"--resume: no whole step checkpoint under {folder / 'steps'}; "
                    "start without --resume, or set save_steps so that one is written"
                )
            resume_from = str(last)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
        tokenizer = load_tokenizer(recipe.policy.tokenizer or recipe.policy.path)
        set_seed(recipe.seed)
        return cls(recipe, name, folder, tokenizer, resume_from)

    @property
    def checkpoint(self) -> Path:
        """The folder of the final checkpoint."""
        return self.folder / "checkpoint"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and evaluates."""
        return PartialState().is_main_process

    @property
    def interrupted(self) -> bool:
        """Whether training stopped on a signal."""
        return self._stop is not None and self._stop.stopped

    def policy(self, source: str | Path | None) -> PolicyForCausalLM:
        """Build the policy: from the step checkpoint, from `source`, or from scratch.

        Raises EngineError if the engine could not run it.
        """
        section = self.recipe.policy
        # Updates of bfloat16 weights below 1/256 of them are lost: what trains is held in float32.
        # FSDP and DeepSpeed see to that themselves, on shards.
        dtype = getattr(torch, section.dtype) if environment.sharded() else torch.float32
        start = self.resume_from or source
        if start is not None:
            policy = checkpoint.load(
                start,
                dtype=None if self.resume_from else dtype,  # a step checkpoint has what trained
                attn_implementation=section.attn_implementation,
                num_nextn_predict_layers=section.num_nextn_predict_layers,
            )
            # TRL loads the reference policy of the KL term from here, on a resumed run too.
            policy.config.name_or_path = str(source)
            self._check_engine(policy.config)
            return policy
        config = DeepseekV3Config(
            **{
                "vocab_size": len(self.tokenizer),
                "bos_token_id": self.tokenizer.bos_token_id,
                "eos_token_id": self.tokenizer.eos_token_id,
                "pad_token_id": self.tokenizer.pad_token_id,
            }
            | (section.config or {})
        )
        config._attn_implementation = section.attn_implementation
        self._check_engine(config)
        return PolicyForCausalLM(config).to(dtype)

    def _check_engine(self, config: DeepseekV3Config) -> None:
        """Raise EngineError now rather than after SFT, if the engine could not run the policy."""
        if self.recipe.grpo is None and self.recipe.data.eval is None:
            return
        released = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", **config.to_dict()}
        replays = (self.recipe.grpo or {}).get("replay") == "r3"
        engine.check(released, self.recipe.rollout, environment.on_cpu(), record_routing=replays)

    def config(self, cls: type[Config], fields: dict[str, Any]) -> Config:
        """Make the trainer's configuration: the recipe's fields over the stage's defaults."""
        bf16 = self.recipe.policy.dtype == "bfloat16"
        defaults = {
            "bf16": bf16,
            "report_to": ["tensorboard"],
            "logging_steps": 1,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        fixed = {"output_dir": str(self.folder / "steps"), "seed": self.recipe.seed}
        return cls(**(defaults | fields | fixed))

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Say which section is at fault when TRL or transformers refuse a trainer's settings."""
        try:
            yield
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            raise RecipeError(f"{self.recipe.name}: {self.name}: {error}") from error

    def train(self, trainer: PolicyTrainer) -> int:
        """Train to the end or a signal; return the steps done. A finished run is left as it is."""
        done = int(self.resume_from.rpartition("-")[2]) if self.resume_from else 0
        if not 0 < trainer.args.max_steps <= done:
            self._take_folder()
            self._stop = StopOnSignal(trainer.accelerator)
            trainer.add_callback(self._stop)
            trainer.add_callback(MetricsLog(self.folder / "metrics.jsonl"))
            with self._stop.listening():
                trainer.train(resume_from_checkpoint=self.resume_from)
            done = trainer.state.global_step
        return done

    def _take_folder(self) -> None:
        """Put what an older run left out of the way; `--resume` and the next stage must not find it.

        A finished run is kept: its folder becomes `<stage>.1`, `<stage>.2`, ...
        """
        state = PartialState()
        if state.is_main_process:
            if self.resume_from is None and self.folder.exists():
                if (self.folder / "checkpoint").exists():
                    numbers = (self.folder.with_name(f"{self.name}.{n}") for n in count(1))
                    self.folder.rename(next(path for path in numbers if not path.exists()))
                else:
                    shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.recipe.dump(self.folder / "recipe.yaml")
        state.wait_for_everyone()

    def save(self, trainer: PolicyTrainer) -> None:
        """Write the final checkpoint, in `policy.dtype`; every process calls it."""
        dtype = getattr(torch, self.recipe.policy.dtype)
        checkpoint.save(
            trainer.policy, self.tokenizer, self.checkpoint, write=self.is_main, dtype=dtype
        )
        PartialState().wait_for_everyone()

    def release(self, trainer: Trainer) -> None:
        """Let go of what holds the trainer's memory, so that an engine can have it."""
        trainer.accelerator.free_memory()
        trainer.callback_handler.callbacks.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def last_metric(self, name: str) -> float | None:
        """Return the newest value of a metric in `metrics.jsonl`."""
        values = self.metrics(name)
        return values[-1] if values else None

    def metrics(self, name: str) -> list[float]:
        """Return all logged values of a metric, oldest first."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        lines = map(json.loads, path.read_text().splitlines())
        return [line[name] for line in lines if line.get(name) is not None]

    def finish(self, status: str, **content: Any) -> dict[str, Any]:
        """Write `summary.json` (main process) and return it."""
        summary = {
            "stage": self.name,
            "recipe": self.recipe.name,
            "status": status,
            "wall_seconds": time.monotonic() - self.started,
            "checkpoint": str(self.checkpoint),
            **peak_memory_gib(),
            **content,
        }
        fill(summary, SUMMARY_KEYS)
        if self.is_main:
            write_json(self.folder / "summary.json", summary)
        PartialState().wait_for_everyone()
        return summary


def load_tokenizer(source: str | None) -> PreTrainedTokenizerBase:
    """Load a tokenizer with a chat template; raises CheckpointError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise checkpoint.CheckpointError(
            f"policy.tokenizer: {source} cannot be loaded ({error}); give a folder with "
            "tokenizer.json and tokenizer_config.json (custom tokenizer code is not run)"
        ) from error
    if tokenizer.chat_template is None:
        raise checkpoint.CheckpointError(
            f"policy.tokenizer: {source} has no chat template; put a chat_template.jinja beside it"
        )
    return tokenizer


def fill(summary: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Add each dotted key that is missing, as None.

    >>> found = {"eval": {"count": 5}}
    >>> fill(found, ("eval.count", "eval.before.accuracy"))
    >>> found
    {'eval': {'count': 5, 'before': {'accuracy': None}}}
    """
    for key in keys:
        *groups, name = key.split(".")
        place = summary
        for group in groups:
            place = place.setdefault(group, {})
        place.setdefault(name, None)
