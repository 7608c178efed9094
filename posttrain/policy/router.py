"""Sigmoid router with a selection-only bias: scores, groups, top-k, replay, and what it saw of a batch.

Shapes: T tokens (batch and sequence flattened), D width, E experts, G groups, K experts a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.policy.replay import replayed


@dataclass
class Choice:
    """What one router decided in one forward pass.

    scores_TE: sigmoid affinities, float32, with their graph. experts_TK: the experts that were used,
    replayed ones where there was a record.
    counted_T: True for tokens that are real (no padding); None when all are.
    """

    router: "Router"
    scores_TE: Tensor
    experts_TK: Tensor
    counted_T: Tensor | None


@dataclass
class RoutingLog:
    """The choices of every router in one forward pass, in the order in which the routers ran."""

    counted_T: Tensor | None = None
    choices: list[Choice] = field(default_factory=list)


class Router(nn.Module):
    """Chooses K of E experts for each token (DeepSeek-V3, arXiv 2412.19437, eq. 13-16).

    s_te = sigmoid(u_t . w_e);  the K experts of token t are the top K of s_te + b_e within the
    `topk_group` groups whose two best s + b sum highest;  the gate of a chosen expert is
    s_te / sum of the chosen s, times `routed_scaling_factor`. The bias b enters the choice only.

    Input (..., D); returns router logits (T, E), gates (T, K) and experts (T, K), T flattened.
    Scores are computed in float32 whatever the input's type. Groups that lose are filled with
    -inf, as in the released code. `record_TK` replaces the choice, not the scores, while a decoder
    layer runs with a record (see `replay`). `load_E` counts, between two balance updates, how many real
    tokens went to each expert; it is no buffer, so that DDP does not overwrite it.
    """

    weight: nn.Parameter
    e_score_correction_bias: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts: int = config.n_routed_experts
        self.top_k: int = config.num_experts_per_tok
        self.num_groups: int = config.n_group
        self.topk_group: int = config.topk_group
        self.norm_topk_prob: bool = config.norm_topk_prob
        self.routed_scaling_factor: float = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(self.num_experts, config.hidden_size))
        bias_E = torch.zeros(self.num_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias_E)
        self.load_E: Tensor | None = None
        self.log: RoutingLog | None = None
        self.record_TK: Tensor | None = None
        self.place = -1  # in a record, among the routers of the trunk

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        """Keep the bias in float32 when the policy is cast: bfloat16 has no 0.5 + 0.001."""
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias_E.to(self.e_score_correction_bias.device)
        return self

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = hidden_states.view(-1, hidden_states.shape[-1])
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
        scores_TE = logits_TE.sigmoid()
        experts_TK = self.choose(scores_TE)
        if self.record_TK is not None:
            experts_TK = replayed(experts_TK, self.record_TK)
        gates_TK = scores_TE.gather(1, experts_TK)
        if self.norm_topk_prob:
            gates_TK = gates_TK / (gates_TK.sum(dim=-1, keepdim=True) + 1e-20)
        gates_TK = gates_TK * self.routed_scaling_factor
        if self.log is not None:
            self.log.choices.append(Choice(self, scores_TE, experts_TK, self.log.counted_T))
        return logits_TE, gates_TK, experts_TK

    @torch.no_grad()
    def choose(self, scores_TE: Tensor) -> Tensor:
        """Return the chosen experts (T, K) of biased, group-limited top-k; order is arbitrary."""
        biased_TE = scores_TE + self.e_score_correction_bias
        if self.num_groups > 1:
            biased_TGe = biased_TE.view(-1, self.num_groups, self.num_experts // self.num_groups)
            group_scores_TG = biased_TGe.topk(2, dim=-1).values.sum(dim=-1)
            groups = group_scores_TG.topk(self.topk_group, dim=-1, sorted=False).indices
            lost_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, groups, False)
            biased_TE = biased_TGe.masked_fill(lost_TG.unsqueeze(-1), float("-inf")).flatten(1)
        return biased_TE.topk(self.top_k, dim=-1, sorted=False).indices

    def count(self, experts_TK: Tensor, counted_T: Tensor | None) -> None:
        """Add the choices of real tokens to `load_E` (int64, tokens)."""
        if counted_T is not None:
            experts_TK = experts_TK[counted_T]
        load_E = torch.bincount(experts_TK.flatten(), minlength=self.num_experts)
        self.load_E = load_E if self.load_E is None else self.load_E + load_E


def routers(module: nn.Module) -> list[Router]:
    """Return every router below `module`, trunk layers first, then MTP modules."""
    return [m for m in module.modules() if isinstance(m, Router)]


@contextmanager
def logged(of: list[Router], counted_T: Tensor | None) -> Iterator[RoutingLog]:
    """Record what the routers `of` choose inside the block.

    Gradient checkpointing recomputes during backward, after the block: recomputation is not seen.
    """
    log = RoutingLog(counted_T)
    for router in of:
        router.log = log
    try:
        yield log
    finally:
        for router in of:
            router.log = None
