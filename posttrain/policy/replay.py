"""Routing replay: a forward pass that takes its experts from a record in place of its own choice.

R3 replays what the rollout engine chose (arXiv 2510.11370), R2 what the old policy chose. A record only selects:
gates are the trainer's own scores of the recorded experts, so gradients reach the router as before.

    own choice   {2, 5}  {0, 7}  {1, 3}
    record       [5, 2]  [0, 4]  [-1, -1]      -1: nothing recorded
    computed     {2, 5}  {0, 4}  {1, 3}

A record is signed integers (B, S, L, K) beside the token ids: what router l chose for the token at that position.
Shapes: B sequences, S positions, L routers of the trunk, K experts a token, T = B*S tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MISSING = -1
"""In a record: nothing is known of this token, the router chooses for itself."""

KEYWORD = "routing_record_TLK"
"""The argument of the decoder layers by which a record reaches their routers."""


@dataclass(frozen=True)
class RoutingRequest:
    """What the next forward pass of a policy shall do about its routing.

    record_BSLK: choices to replay. keep: leave the experts that were computed in
    `TrainingExtras.experts_BSLK`, replayed ones where there was a record.
    """

    record_BSLK: Tensor | None = None
    keep: bool = False


def record_dtype(num_experts: int) -> torch.dtype:
    """Return the smallest signed type for `num_experts` experts and `MISSING`.

    >>> record_dtype(128), record_dtype(256)
    (torch.int8, torch.int16)
    """
    return torch.int8 if num_experts <= 128 else torch.int16


def replayed(own_TK: Tensor, record_TK: Tensor) -> Tensor:
    """Return the recorded experts where they are others than the router's own.

    Where a record names the same experts in another order the own order stays, so that sums over
    them round as they would without replay.
    """
    record_TK = record_TK.to(own_TK.dtype)
    same_T = (own_TK.sort(dim=-1).values == record_TK.sort(dim=-1).values).all(dim=-1)
    keeps_T = same_T | (record_TK < 0).any(dim=-1)
    return torch.where(keeps_T.unsqueeze(-1), own_TK, record_TK)


def differing(one: Tensor, other: Tensor) -> Tensor:
    """Count the experts (...,) of one choice (..., K) that the other lacks; 0 where one is missing."""
    lacking = (one.unsqueeze(-1) != other.unsqueeze(-2)).all(dim=-1).sum(dim=-1)
    return lacking.masked_fill((one < 0).any(dim=-1) | (other < 0).any(dim=-1), 0)


def attach(layer: Any, place: int | None) -> None:
    """Let a decoder layer take `KEYWORD` and hand its router, the `place`-th, what is its own.

    The record is an argument of the layer and no state of the router: gradient checkpointing calls
    the layer again in the backward pass, with the same arguments. None: a layer without a router.
    """
    if place is not None:
        layer.mlp.gate.place = place
    layer.register_forward_pre_hook(_hand_over, with_kwargs=True)
    layer.register_forward_hook(_take_back, always_call=True)


def _hand_over(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    record_TLK = kwargs.get(KEYWORD)
    router = getattr(layer.mlp, "gate", None)
    if record_TLK is not None and router is not None:
        router.record_TK = record_TLK[:, router.place]
    return args, {name: value for name, value in kwargs.items() if name != KEYWORD}


def _take_back(layer: Any, args: Any, output: Any) -> None:
    router = getattr(layer.mlp, "gate", None)
    if router is not None:
        router.record_TK = None
