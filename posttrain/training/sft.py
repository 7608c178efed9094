"""Supervised fine-tuning: chat template, loss on completions, MTP loss, balanced router."""

import math
import time
from typing import Any

from torch import Tensor, nn
from trl import SFTTrainer

from posttrain import tasks
from posttrain.evaluate import Evaluation, evaluate_checkpoint
from posttrain.recipe import Recipe, RecipeError
from posttrain.training.config import PolicySFTConfig
from posttrain.training.packing import PackedRows
from posttrain.training.policy_trainer import PolicyTrainer
from posttrain.training.stage import Stage


class PolicySFTTrainer(PolicyTrainer, SFTTrainer):
    """`trl.SFTTrainer` of a policy: loss = main + lambda * MTP (eq. 25) + alpha * balance (eq. 17).

    All token losses are divided by the number of completion tokens of the whole optimizer step,
    over all processes, so that gradient accumulation equals one large batch.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._nll_sum, self._nll_tokens = 0.0, 0
        self.tokens = 0
        super().__init__(**kwargs)
        flash = "flash" in self.policy.config._attn_implementation
        if self.args.packing and self.padding_free and not flash:
            self.data_collator = PackedRows(self.processing_class.pad_token_id)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        labels_BS = inputs["labels"]
        self.request_extras(labels_BS, num_items_in_batch, detach=False)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        # TRL multiplies token losses by the number of replicas, as DDP averages gradients.
        scale = (
            self.accelerator.num_processes // self.get_tp_size()
            if self.args.average_tokens_across_devices and num_items_in_batch is not None
            else 1
        )
        if self.model.training:
            tokens = int((labels_BS[:, 1:] != -100).sum())
            items = tokens if num_items_in_batch is None else float(num_items_in_batch)
            self._nll_sum += loss.item() * items / scale
            self._nll_tokens += tokens
            mask = inputs.get("attention_mask", inputs.get("padding_mask"))
            self.tokens += int(labels_BS.numel() if mask is None else mask.sum())
            self._metrics["train"]["num_tokens"] = [self.tokens * self.accelerator.num_processes]
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        loss = self.add_extras(loss, scale=scale, accumulation=accumulation)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the perplexity of the completions since the last log, in this process."""
        if self.model.training and self._nll_tokens:
            logs["perplexity"] = math.exp(min(self._nll_sum / self._nll_tokens, 50.0))
            self._nll_sum, self._nll_tokens = 0.0, 0
        super().log(logs, start_time)


def run(recipe: Recipe, resume: bool = False) -> dict[str, Any]:
    """Train, save the final checkpoint, evaluate by generation; return the summary."""
    if recipe.sft is None or recipe.data.sft is None:
        raise RecipeError(f"{recipe.name}: SFT needs the sections sft and data.sft; add both")
    stage = Stage.start(recipe, "sft", resume)
    dataset = tasks.load(recipe.data.sft)
    policy = stage.policy(recipe.policy.path)
    with stage.refusals():
        args = stage.config(PolicySFTConfig, recipe.sft)
        trainer = PolicySFTTrainer(
            model=policy,
            args=args,
            train_dataset=dataset.select_columns(["prompt", "completion"]),
            processing_class=stage.tokenizer,
        )
    started = time.monotonic()
    steps = stage.train(trainer)
    train_seconds = time.monotonic() - started
    if stage.interrupted:
        return stage.finish("interrupted", steps=steps)
    stage.save(trainer)
    summary: dict[str, Any] = {
        "steps": steps,
        "train": {
            "seconds": train_seconds,
            "tokens_per_second": trainer.tokens * trainer.accelerator.num_processes / train_seconds,
        },
        "moe": {"max_violation": stage.last_metric("moe/max_violation")},
        "perplexity": stage.last_metric("perplexity"),
    }
    stage.release(trainer)
    del trainer, policy
    after: Evaluation | None = None
    if recipe.data.eval is not None:
        after = evaluate_checkpoint(stage.checkpoint, recipe)
        summary["eval"] = {"after": after.as_dict(), "count": after.count}
        summary["rollout"] = {"tokens_per_second": after.tokens_per_second}
        summary["mtp"] = after.mtp_dict()
    return stage.finish("complete", **summary)
