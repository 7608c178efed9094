"""What SFT and GRPO of a policy share: MTP loss, balance, clipping, checkpoints, schedule."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from posttrain.policy import balance, checkpoint
from posttrain.policy.model import PolicyForCausalLM
from posttrain.policy.mtp import MTPRequest

COMPLETE = "complete.json"


class PolicyTrainer(Trainer):
    """Comes before a TRL trainer among the bases; its `model` is a `PolicyForCausalLM`.

    The subclass requests the MTP loss before the forward pass and adds the extras after it.
    """

    lr_scheduler: LRScheduler | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.args.mtp_loss_weight == 0:
            for parameter in self.mtp_parameters():
                parameter.requires_grad_(False)
        self.add_callback(BalanceUpdate(self))

    @property
    def policy(self) -> PolicyForCausalLM:
        """The bare policy, below PEFT and the accelerator's wrapper."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    @property
    def bias_rate(self) -> float:
        """How far a router bias moves a step."""
        return float(self.args.bias_update_rate)

    @property
    def router_entropy_weight(self) -> float:
        """What the entropy of the router probabilities counts for in the loss."""
        return 0.0

    def mtp_parameters(self) -> list[nn.Parameter]:
        """Parameters that belong to the MTP modules alone."""
        return [p for module in self.policy.model.mtp_modules for p in module.parameters()]

    def request_extras(self, labels_BS: Tensor, num_items: Tensor | None, *, detach: bool) -> None:
        """Ask the next forward pass for the MTP loss and the balance loss that the recipe wants."""
        trunk = self.policy.model
        if self.args.mtp_loss_weight and trunk.mtp_modules:
            trunk.mtp_request = MTPRequest(labels_BS, num_items, detach=detach, quality=True)
        training = self.model.training
        trunk.wants_balance_loss = training and self.args.sequence_balance_weight > 0
        trunk.wants_router_entropy = training and self.router_entropy_weight != 0

    def add_extras(self, loss: Tensor, *, scale: float, accumulation: int) -> Tensor:
        """Return loss + lambda * scale * MTP + (alpha * balance - weight * entropy) / accumulation; log."""
        mode = "train" if self.model.training else "eval"
        extras = self.policy.model.take_extras()
        metrics = self._metrics[mode]
        if extras.mtp is not None:
            loss = loss + self.args.mtp_loss_weight * scale * extras.mtp.loss
            for depth, token_loss in enumerate(extras.mtp.token_losses):
                metrics[f"mtp/loss/{depth}"].append(token_loss)
            if extras.mtp.acceptance:
                metrics["mtp/acceptance"].append(extras.mtp.acceptance[0])
                metrics["mtp/acceptance_greedy"].append(extras.mtp.agreement[0])
        if extras.balance_loss is not None:
            weight = self.args.sequence_balance_weight / accumulation
            loss = loss + weight * extras.balance_loss
            metrics["moe/sequence_balance_loss"].append(extras.balance_loss.item())
        if extras.router_entropy is not None:
            loss = loss - self.router_entropy_weight / accumulation * extras.router_entropy
            metrics["moe/router_entropy"].append(extras.router_entropy.item())
        return loss

    def update_balance(self) -> None:
        """Move the router biases by the load of the optimizer step that just ended, and log it."""
        trunk = self.policy.model
        violations = balance.update_biases(
            trunk.routers,
            self.bias_rate,
            lambda load: (
                self.accelerator.reduce(load.to(self.accelerator.device), "sum").cpu()
                if self.accelerator.num_processes > 1
                else load
            ),
        )
        metrics = self._metrics["train"]
        names = [n for n, m in trunk.named_modules() if m in trunk.routers]
        trunk_violations = []
        for name, violation in zip(names, violations, strict=True):
            layer = int(name.split(".")[1])
            metrics[f"moe/max_violation/layer_{layer}"].append(violation)
            if layer < trunk.config.num_hidden_layers:
                trunk_violations.append(violation)
        if trunk_violations:
            metrics["moe/max_violation"].append(sum(trunk_violations) / len(trunk_violations))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """Transformers' schedules, and DeepSeek's multi-step one."""
        if not self.args.multi_step_schedule:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: multi_step_factor(step, warmup, num_training_steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the released layout, biases and MTP modules included; every process calls it."""
        checkpoint.save(
            self.policy,
            self.processing_class,
            Path(output_dir or self.args.output_dir),
            write=self.args.should_save,
        )
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: TRL's card would ask the hub about the base model."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            steps, step = Path(self.args.output_dir), self.state.global_step
            write_json(steps / f"{PREFIX_CHECKPOINT_DIR}-{step}" / COMPLETE, {"step": step})
            # Older ones may go only now that this one is whole.
            rotate_checkpoints(output_dir=str(steps), save_total_limit=limit)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: a resumed run builds its policy from the step checkpoint at the start."""


class BalanceUpdate(TrainerCallback):
    """Updates the router biases once after every optimizer step."""

    def __init__(self, trainer: PolicyTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.trainer.update_balance()


def multi_step_factor(step: int, warmup: int, total: int) -> float:
    """Learning-rate factor of DeepSeek's multi-step schedule (arXiv 2401.02954, section 2.3).

    Linear from 0 to 1 over `warmup` steps, 1 up to 80% of `total`, 0.316 up to 90%, then 0.1.
    """
    if step < warmup:
        return step / max(1, warmup)
    if step < 0.8 * total:
        return 1.0
    return 0.316 if step < 0.9 * total else 0.1


def last_step_checkpoint(steps: Path) -> Path | None:
    """Return the newest step checkpoint that was written whole, or None."""
    whole = [p.parent for p in steps.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
