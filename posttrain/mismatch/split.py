"""The difference between engine and trainer on sampled tokens, taken apart.

With the log-probs of the sampled tokens
    a  of the engine that drew them
    b  of the trainer with its own expert choices   } at the weights that sampled
    c  of the trainer with the engine's replayed    }
    d  of the trainer in the loss, with replay, at the current weights
token by token, in nats,
    precision = a - c     what is left with the same experts: types, kernels, order of sums
    routing   = c - b     what other experts make
    staleness = d - c     what the updates since the rollout make
so that a - b = precision + routing and d - a = staleness - precision, exactly.

Shapes: N sampled tokens, B sequences, S positions, C completion tokens, L routers, K experts a token.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.policy.replay import MISSING, differing


@dataclass(frozen=True)
class Gap:
    """A log-ratio d over tokens: sum and max of |d| (nats), sum of its k3 terms, number of tokens.

    k3 = mean of exp(d) - 1 - d: with d = log q - log p on tokens drawn from p it estimates
    KL(p || q), nats a token, and is never negative (J. Schulman, "Approximating KL divergence", 2020).
    """

    total: float = 0.0
    largest: float = 0.0
    total_k3: float = 0.0
    tokens: int = 0

    @classmethod
    def of(cls, d_N: Tensor) -> "Gap":
        """The gap of log-ratios; none is also an answer."""
        if not d_N.numel():
            return cls()
        d_N = d_N.double()
        k3 = (d_N.expm1() - d_N).sum().item()
        return cls(d_N.abs().sum().item(), d_N.abs().max().item(), k3, d_N.numel())

    @classmethod
    def joined(cls, gaps: Iterable["Gap"]) -> "Gap":
        """The gap over the tokens of several."""
        parts = list(gaps)
        return cls(
            sum(g.total for g in parts),
            max((g.largest for g in parts), default=0.0),
            sum(g.total_k3 for g in parts),
            sum(g.tokens for g in parts),
        )

    @property
    def mean(self) -> float:
        """Mean of |d|; nan without tokens."""
        return self.total / self.tokens if self.tokens else float("nan")

    @property
    def k3(self) -> float:
        """Mean of the k3 terms; nan without tokens."""
        return self.total_k3 / self.tokens if self.tokens else float("nan")


@dataclass(frozen=True)
class Split:
    """One rollout batch, its tokens in a row.

    engine_N, own_N, replayed_N: a, b, c. differing_NL: of each token's K experts in each layer, how
    many of the engine's were not the trainer's own. experts: K. The choices of a token are those
    made where it was predicted, one position before it.
    """

    engine_N: Tensor
    own_N: Tensor
    replayed_N: Tensor
    differing_NL: Tensor
    experts: int

    @property
    def precision_N(self) -> Tensor:
        """Precision: a - c."""
        return self.engine_N - self.replayed_N

    @property
    def routing_N(self) -> Tensor:
        """Routing: c - b."""
        return self.replayed_N - self.own_N

    @property
    def changed_N(self) -> Tensor:
        """Whether the choices of a token differed in any layer."""
        return (self.differing_NL > 0).any(dim=-1)

    def gaps(self) -> dict[str, Gap]:
        """The parts of the difference; `changed_*` over tokens whose choices differed.

        without_replay: b - a. precision: c - a. Both as log-ratios of trainer to engine, whose k3
        estimates KL(engine || trainer). routing: c - b.
        """
        changed_N = self.changed_N
        own_N, precision_N = self.own_N - self.engine_N, -self.precision_N
        return {
            "without_replay": Gap.of(own_N),
            "precision": Gap.of(precision_N),
            "routing": Gap.of(self.routing_N),
            "changed_without_replay": Gap.of(own_N[changed_N]),
            "changed_precision": Gap.of(precision_N[changed_N]),
        }

    def choices_differing(self) -> list[float]:
        """The share of the engine's choices that were not the trainer's, layer by layer."""
        return (self.differing_NL.double().mean(dim=0) / self.experts).tolist()

    def tokens_differing(self) -> list[float]:
        """The share of tokens with any other choice, layer by layer."""
        return (self.differing_NL > 0).double().mean(dim=0).tolist()


def split(
    engine_BC: Tensor,
    own_BC: Tensor,
    replayed_BC: Tensor,
    own_BSLK: Tensor,
    engine_BSLK: Tensor,
    mask_BC: Tensor,
) -> Split:
    """Take a batch apart. The last C of S positions are the completion's; records as in `replay`."""
    mask_BC = mask_BC.bool()
    completion = engine_BC.shape[1]
    before = slice(-completion - 1, -1)
    differing_NL = differing(engine_BSLK[:, before][mask_BC], own_BSLK[:, before][mask_BC])
    return Split(
        engine_BC[mask_BC],
        own_BC[mask_BC],
        replayed_BC[mask_BC],
        differing_NL,
        engine_BSLK.shape[-1],
    )


def aligned(records: list[Tensor], starts: list[int], width: int) -> Tensor:
    """Lay records [S_i, L, K] into one (B, S, L, K) from their rows' starts on; the rest is missing."""
    shape = (len(records), width, *records[0].shape[1:])
    record_BSLK = records[0].new_full(shape, MISSING)
    for row_SLK, record, start in zip(record_BSLK, records, starts, strict=True):
        row_SLK[start : start + len(record)] = record
    return record_BSLK


def shuffled(record_BSLK: Tensor, seed: int) -> Tensor:
    """Give every recorded token another token's record, the same way in all layers: a control."""
    known_BS = (record_BSLK >= 0).flatten(2).all(dim=-1)
    rows = record_BSLK[known_BS]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    other = record_BSLK.clone()
    other[known_BS] = rows[order.to(rows.device)]
    return other


def only_layer(record_BSLK: Tensor, layer: int) -> Tensor:
    """Keep the record of one router; the others choose for themselves."""
    one = torch.full_like(record_BSLK, MISSING)
    one[:, :, layer] = record_BSLK[:, :, layer]
    return one
