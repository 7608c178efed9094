"""GRPO: rollouts by vLLM, rule-based rewards, group-relative advantages, an update, a sync.

One step, top to bottom (arXiv 2402.03300; TRL computes advantages and the loss):
    prompts      the sampler repeats each of B / G prompts G times
    sync         parameters, router biases, MTP modules -> engine, verified; then the parity gate
    rollouts     engine.generate, one seed a request; expert choices recorded
    rewards      r_i = sum_k weight_k * reward_k(completion_i)
    advantages   A_i = (r_i - mean of the group) / std of the group
    loss         clipped ratio of current to old policy, per token, times TRL's correction for
                 what engine and trainer differ by, + beta * KL to the reference; the experts are
                 the policy's own, or replayed (`replay`), + balance terms if they have a weight
    MTP loss     the modules follow the policy; nothing flows to trunk, embedding or head
    update       gradients clipped apart for trunk and modules; biases moved by the load, or frozen
Departures: none in the loss. The MTP loss and the bias update are additions (DeepSeek-V3 keeps
both in pre-training; here they keep draft and balance in step with a policy that moves).
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from vllm import SamplingParams

from posttrain import gold, tasks
from posttrain.evaluate import evaluate, evaluate_checkpoint
from posttrain.policy import checkpoint
from posttrain.recipe import Recipe, RecipeError
from posttrain.rollout.engine import Engine, request_seed
from posttrain.rollout.parity import Gate
from posttrain.training.callbacks import keep_lines
from posttrain.training.config import PolicyGRPOConfig
from posttrain.training.policy_trainer import PolicyTrainer
from posttrain.training.replay import RoutingReplay
from posttrain.training.stage import Stage


class PolicyGRPOTrainer(RoutingReplay, PolicyTrainer, GRPOTrainer):
    """`trl.GRPOTrainer` whose rollouts come from our engine, synced and checked at every update."""

    def __init__(
        self, *, engine: Engine, engine_limit: int, gate: Gate, samples: Path, **kwargs: Any
    ) -> None:
        self.engine = engine
        self.engine_limit = engine_limit
        self.gate = gate
        self.samples = samples
        self.parity_max = 0.0
        self.totals = {
            "rollout_tokens": 0,
            "rollout_seconds": 0.0,
            "train_tokens": 0,
            "train_seconds": 0.0,
        }
        self._generation_seconds = 0.0
        super().__init__(**kwargs)
        # TRL then treats rollouts as vLLM's: their log-probs are at hand for its corrections.
        self.use_vllm = True
        self._last_loaded_step = -1

    @property
    def bias_rate(self) -> float:
        """How far a router bias moves a step."""
        return self.args.bias_update_rate if self.args.router_bias == "update" else 0.0

    @property
    def router_entropy_weight(self) -> float:
        """What the entropy of the router probabilities counts for in the loss."""
        return float(self.args.router_entropy_weight)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Log the seconds that a phase of the step took."""
        started = time.perf_counter()
        yield
        self._metrics["train"][f"time/{phase}"].append(time.perf_counter() - started)

    def sync(self) -> None:
        """Send the policy to the engine, verify it, and compare both sides' log-probs.

        Raises SyncError, ParityError.
        """
        with self.timed("sync"):
            self.engine.sync(checkpoint.named_tensors(self.policy))
        with self.timed("parity"):
            report = self.gate.check(self.engine, self.policy)
        self.parity_max = max(self.parity_max, report.max_abs_logprob_diff)
        metrics = self._metrics["train"]
        metrics["parity/max_abs_logprob_diff"].append(report.max_abs_logprob_diff)
        metrics["parity/experts_missed"].append(report.experts_missed)
        metrics["parity/tokens_tied"].append(report.tokens_tied)

    def sampling(self, index: int) -> SamplingParams:
        """Sampling of the request at `index` of the global generation batch, seeded for itself."""
        prompt, sample = divmod(index, self.num_generations)
        fields = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or 0,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": self.max_completion_length,
            "seed": request_seed(self.args.seed, self._step, prompt, sample),
            "logprobs": 0,
        }
        return SamplingParams(**(fields | (self.args.generation_kwargs or {})))

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]]]:
        if self.state.global_step != self._last_loaded_step:
            self.sync()
            self._last_loaded_step = self.state.global_step
        room = self.engine_limit - self.max_completion_length
        longest = max(map(len, prompt_ids))
        if longest > room:
            raise tasks.TaskError(
                f"data.train: a prompt has {longest} tokens, and rollout.max_model_len "
                f"{self.engine_limit} less grpo.max_completion_length "
                f"{self.max_completion_length} leaves {room}; raise the one or lower the other"
            )
        first = self.accelerator.process_index * len(prompt_ids)
        sampling = [self.sampling(first + i) for i in range(len(prompt_ids))]
        drafted = self.engine.draft_counts()
        started = time.perf_counter()
        completions = self.engine.generate(prompt_ids, sampling)
        seconds = time.perf_counter() - started
        self.remember(completions)
        tokens = sum(len(c.token_ids) for c in completions)
        self.totals["rollout_tokens"] += tokens
        self.totals["rollout_seconds"] += seconds
        metrics = self._metrics["train"]
        metrics["time/rollout"].append(seconds)
        metrics["rollout/tokens_per_second"].append(tokens / seconds)
        drafted = self.engine.draft_counts() - drafted
        if drafted.drafts:
            metrics["rollout/draft_acceptance"].append(drafted.acceptance)
        return [c.token_ids for c in completions], [c.logprobs for c in completions]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        started = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        self._generation_seconds += time.perf_counter() - started
        if self.accelerator.is_main_process:
            self.write_samples()
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.timed("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    def write_samples(self) -> None:
        """Append the generation batch to `samples.jsonl`: prompt, completion, rewards, what rewards log ..."""
        logs = self._logs
        with self.samples.open("a") as file:
            for i, prompt in enumerate(logs["prompt"]):
                line = {
                    "step": self.state.global_step,
                    "prompt": prompt,
                    "completion": logs["completion"][i],
                    # NaN is how TRL keeps None, and no JSON.
                    "rewards": {
                        name: None if math.isnan(values[i]) else values[i]
                        for name, values in logs["rewards"].items()
                    },
                    "advantage": logs["advantages"][i],
                }
                if logs["extra"]:
                    line["extra"] = {name: values[i] for name, values in logs["extra"].items()}
                file.write(json.dumps(line) + "\n")

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        self._generation_seconds = 0.0
        started = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        seconds = time.perf_counter() - started - self._generation_seconds
        self.totals["train_seconds"] += seconds
        self._metrics["train"]["time/update"].append(seconds)
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        accumulation = self.current_gradient_accumulation_steps
        # TRL counts completion tokens over the generation batch and all processes.
        window = accumulation / self.args.steps_per_generation
        completion_mask = inputs["completion_mask"]
        self.request_extras(
            torch.cat(
                [
                    torch.full_like(inputs["prompt_ids"], -100),
                    inputs["completion_ids"].masked_fill(completion_mask == 0, -100),
                ],
                dim=1,
            ),
            inputs["num_items_in_batch"].clamp(min=1) * window,
            detach=True,
        )
        loss = super()._compute_loss(model, inputs)
        self.totals["train_tokens"] += int(inputs["prompt_mask"].sum() + completion_mask.sum())
        return self.add_extras(
            loss, scale=self.accelerator.num_processes, accumulation=accumulation
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        modules = {id(p) for p in self.mtp_parameters()}
        trunk = [p for p in model.parameters() if id(p) not in modules and p.grad is not None]
        mtp = [p for p in model.parameters() if id(p) in modules and p.grad is not None]
        if mtp:
            norm = self.accelerator.clip_grad_norm_(mtp, self.args.mtp_max_grad_norm)
            self._metrics["train"]["mtp/grad_norm"].append(float(norm))
        return self.accelerator.clip_grad_norm_(trunk, self.args.max_grad_norm)


def run(recipe: Recipe, resume: bool = False) -> dict[str, Any]:
    """Train from the SFT checkpoint or `policy.path`, evaluate before and after; the summary."""
    source = recipe.run_dir("sft") / "checkpoint" if recipe.sft else recipe.policy.path
    if recipe.grpo is None or recipe.data.train is None or source is None:
        raise RecipeError(
            f"{recipe.name}: GRPO needs the sections grpo and data.train, and a policy to start "
            "from (an sft section, or policy.path); add what is missing"
        )
    stage = Stage.start(recipe, "grpo", resume)
    source = checkpoint.local_folder(source)
    dataset = tasks.load(recipe.data.train)
    reward_functions = [r.load() for r in recipe.rewards]
    gold.trial(reward_functions, dataset)
    policy = stage.policy(source)
    fields = recipe.grpo | {"reward_weights": [r.weight for r in recipe.rewards]}
    with stage.refusals():
        args = stage.config(PolicyGRPOConfig, fields)
    split = args.mismatch_split and bool(policy.model.trunk_routers)
    # A resumed run syncs before it generates.
    engine = Engine.start(source, recipe.rollout, record_routing=split or args.replay == "r3")
    section = recipe.parity
    gate = Gate(section.tolerance, prompts=section.prompts, tokens=section.tokens, seed=recipe.seed)
    before = None
    if recipe.data.eval is not None:
        before = evaluate(engine, stage.tokenizer, recipe)
    with stage.refusals():
        trainer = PolicyGRPOTrainer(
            engine=engine,
            engine_limit=recipe.rollout.max_model_len,
            gate=gate,
            samples=stage.folder / "samples.jsonl",
            model=policy,
            reward_funcs=reward_functions,
            args=args,
            train_dataset=dataset,
            processing_class=stage.tokenizer,
        )
    if stage.resume_from:
        step = int(stage.resume_from.rpartition("-")[2])
        trainer._step = step * trainer.args.gradient_accumulation_steps
        if stage.is_main:
            keep_lines(stage.folder / "samples.jsonl", step - 1)
    steps = stage.train(trainer)
    processes = trainer.accelerator.num_processes
    summary: dict[str, Any] = {
        "steps": steps,
        "rollout": {
            "tokens_per_second": processes
            * trainer.totals["rollout_tokens"]
            / max(trainer.totals["rollout_seconds"], 1e-9)
        },
        "train": {
            "tokens_per_second": processes
            * trainer.totals["train_tokens"]
            / max(trainer.totals["train_seconds"], 1e-9)
        },
        # Of an interrupted run too: the log has what came before.
        "parity": {
            "max_abs_logprob_diff": max(
                [trainer.parity_max, *stage.metrics("parity/max_abs_logprob_diff")]
            )
        },
        "moe": {"max_violation": stage.last_metric("moe/max_violation")},
        "reward": {"curve": stage.metrics("reward")},
    }
    engine.close()
    if stage.interrupted:
        return stage.finish("interrupted", **summary)
    stage.save(trainer)
    stage.release(trainer)
    del trainer, policy
    if before is not None:
        after = evaluate_checkpoint(stage.checkpoint, recipe)
        summary["eval"] = {
            "before": before.as_dict(),
            "after": after.as_dict(),
            "count": after.count,
        }
        summary["mtp"] = after.mtp_dict()
    return stage.finish("complete", **summary)
