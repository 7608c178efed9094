"""Routing replay in GRPO: which forward pass takes which record, and the mismatch that is logged.

    pass                     off     r2                     r3
    rollout                  -       -                      the engine's choices are recorded
    old log-probs            own     own, and recorded      the rollout's record
    loss, each iteration     own     the old pass's record  the rollout's record
    reference (beta > 0)     own     own                    own

The record travels with the batch as `routed_experts` (B, S, L, K), so TRL's shuffling, splitting and
repeated use of a rollout batch move it with its rows. The reference is a policy of its own and routes itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from trl import GRPOTrainer

from posttrain.mismatch.split import Gap, Split, aligned, split
from posttrain.policy.replay import RoutingRequest
from posttrain.rollout.engine import Completion, EngineError

RECORD = "routed_experts"
Scored = Callable[[Tensor | None, bool], tuple[Tensor, Tensor | None]]


class RoutingReplay(GRPOTrainer):
    """The part of the GRPO trainer that replays expert choices and measures the mismatch.

    With `mismatch_split` each rollout batch is scored once more without gradients, so that both b
    and c are known (see `posttrain.mismatch.split`), whatever `replay` trains with.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._rollout: list[Tensor | None] = []  # records of the completions that are being scored
        self._old: dict[str, Tensor] = {}  # what the old pass computed and was given, by name
        self._inputs: dict[str, Any] | None = None  # the batch of the running loss
        self._logps: Tensor | None = None
        super().__init__(**kwargs)

    def remember(self, completions: list[Completion]) -> None:
        """Keep the records of a rollout until its old log-probs are computed."""
        self._rollout = [completion.experts for completion in completions]
        if self.args.replay == "r3" and any(record is None for record in self._rollout):
            raise EngineError(
                "grpo.replay is r3, but the engine records no expert choices; remedy: start it with "
                "record_routing"
            )

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        score = partial(super()._get_per_token_logps_and_entropies, model)
        if self._inputs is not None:
            self.policy.model.routing_request = RoutingRequest(self._inputs.get(RECORD))
            result = score(input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)
            self._logps = result[0].detach()
            return result
        if is_reference(model, self.ref_model):
            return score(input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)

        def scored(record_BSLK: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
            """Score in TRL's micro-batches, each with its rows of the record."""
            logps, experts = [], []
            for first in range(0, len(input_ids), batch_size or len(input_ids)):
                rows = slice(first, first + (batch_size or len(input_ids)))
                part = None if record_BSLK is None else record_BSLK[rows]
                self.policy.model.routing_request = RoutingRequest(part, keep)
                logps.append(score(input_ids[rows], attention_mask[rows], logits_to_keep)[0])
                experts.append(self.policy.model.take_extras().experts_BSLK)
            return torch.cat(logps), torch.cat(experts) if keep else None

        return self._old_logps(scored, attention_mask, logits_to_keep), None, None

    def _old_logps(self, scored: Scored, attention_mask: Tensor, logits_to_keep: int) -> Tensor:
        """Score the rollout at the weights that sampled it; keep what the split and R2 need."""
        mode, records = self.args.replay, [r for r in self._rollout if r is not None]
        measured = self.args.mismatch_split and len(records) == len(attention_mask)
        self._old = {}
        if measured or mode == "r3":
            record = engine_record(records, attention_mask[:, :-logits_to_keep], logits_to_keep)
            self._old |= {"engine": record, "replayed_logps": scored(record, False)[0]}
        if measured or mode != "r3":
            self._old["own_logps"], own = scored(None, measured or mode == "r2")
            if own is not None:
                self._old["own"] = own
        return self._old["replayed_logps" if mode == "r3" else "own_logps"]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        old, self._old = self._old, {}
        records, self._rollout = [r for r in self._rollout if r is not None], []
        # Without an old pass the loss runs at the weights that sampled: own choices are R2's there.
        record = old.get({"r2": "own", "r3": "engine"}.get(self.args.replay, ""))
        if record is None and self.args.replay == "r3":
            record = engine_record(
                records, output["prompt_mask"], output["completion_ids"].shape[1]
            )
        if record is not None:
            output[RECORD] = record
        if {"engine", "own"} <= old.keys():
            parts = split(
                output["sampling_per_token_logps"],
                old["own_logps"],
                old["replayed_logps"],
                old["own"],
                old["engine"],
                output["completion_mask"],
            )
            self.log_split(parts, records)
        return output

    def log_split(self, parts: Split, records: list[Tensor]) -> None:
        """Log the parts of a rollout batch's mismatch over all processes, and how many choices differ."""
        mine = {
            "gaps": parts.gaps(),
            "choices": parts.differing_NL.sum(dim=0).tolist(),
            "changed": int(parts.changed_N.sum()),
            "missing": sum(int((r < 0).any(dim=-1).any(dim=-1).sum()) for r in records),
            "positions": sum(map(len, records)),
        }
        every = gather_object([mine])
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in ("without_replay", "precision", "routing"):
            log_gap(metrics, name, Gap.joined(one["gaps"][name] for one in every))
        tokens = max(1, sum(one["gaps"]["routing"].tokens for one in every))
        layers = self.policy.model.trunk_router_layers
        shares = [
            sum(counts) / tokens / parts.experts
            for counts in zip(*(one["choices"] for one in every), strict=True)
        ]
        for layer, share in zip(layers, shares, strict=True):
            metrics[f"mismatch/choices_differing/layer_{layer}"].append(share)
        metrics["mismatch/choices_differing"].append(sum(shares) / len(shares))
        metrics["mismatch/tokens_differing"].append(sum(one["changed"] for one in every) / tokens)
        positions = max(1, sum(one["positions"] for one in every))
        metrics["mismatch/unrecorded"].append(sum(one["missing"] for one in every) / positions)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._inputs = inputs
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self._inputs = None
        self.log_mismatch(inputs)
        return loss

    def log_mismatch(self, inputs: dict[str, Any]) -> None:
        """Log how far the loss's log-probs are from the engine's, and from those of the old pass.

        With d = log p_trainer - log p_engine on the sampled tokens of this process: mean and max of
        |d|, and the k3 estimate of KL(engine || trainer). `staleness` is the same against the old pass.
        """
        mask_BC = inputs["completion_mask"].bool()
        if self._logps is None or not mask_BC.any():
            return
        metrics = self._metrics["train" if self.model.training else "eval"]
        gap = Gap.of((self._logps - inputs["sampling_per_token_logps"])[mask_BC])
        metrics["mismatch/logprob_diff_mean"].append(gap.mean)
        metrics["mismatch/logprob_diff_max"].append(gap.largest)
        metrics["mismatch/kl_k3"].append(gap.k3)
        if "old_per_token_logps" in inputs:
            d_N = (self._logps - inputs["old_per_token_logps"])[mask_BC]
            log_gap(metrics, "staleness", Gap.of(d_N))


def engine_record(records: list[Tensor], prompt_mask_BP: Tensor, completion: int) -> Tensor:
    """Lay out a rollout's records as TRL pads it: prompts on the left, completions on the right."""
    width = prompt_mask_BP.shape[1]
    starts = (width - prompt_mask_BP.sum(dim=1)).tolist()
    return aligned(records, starts, width + completion).to(prompt_mask_BP.device)


def log_gap(metrics: dict[str, list[float]], name: str, gap: Gap) -> None:
    """Append a gap's mean, largest and k3 to the metrics, if it has tokens."""
    if gap.tokens:
        metrics[f"mismatch/{name}_mean"].append(gap.mean)
        metrics[f"mismatch/{name}_max"].append(gap.largest)
        metrics[f"mismatch/{name}_k3"].append(gap.k3)


def is_reference(model: nn.Module, ref_model: nn.Module | None) -> bool:
    """Whether a pass is the reference's: its own model, or the policy with its adapters set aside."""
    if ref_model is not None and model is ref_model:
        return True
    return any(
        module.disable_adapters or list(module.active_adapters) == ["ref"]
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    )
