"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): modules and their loss.

What the shifts do, for two packed documents [a0 a1 a2 a3 | b0 b1 b2] and depth 0:
    hidden of      a0  a1  a2  a3  b0  b1  b2
    + embedding of a1  a2  a3  -   b1  b2  -      (the next token; zero where position is 0)
    predicts       a2  a3  -   -   b2  -   -      (the token after it)
Depth k looks k tokens further, and takes depth k-1's output in place of the trunk's.

Shapes: B sequences, S positions, D width, V vocabulary, T tokens that are scored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100
Head = Callable[[Tensor], Tensor]  # (T, D) -> logits (T, V)
# Tokens whose logits exist at one time: 2048 x 129,280 in float32 is 1 GiB.
LOSS_CHUNK_TOKENS = 2048


class SharedHead(nn.Module):
    """The norm before the head that all depths share with the trunk; a module for its name."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm


class MTPMixin(nn.Module):
    """Turns a family's decoder layer into an MTP module: mix in before the layer class.

    h'_i = M [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i^{k-1})]  (eq. 21),  h^k = layer(h')  (eq. 22),
    and the head scores RMSNorm(h^k). Embedding and head are the trunk's and are not held here.
    Departures, both as the released weights and vLLM's `deepseek_mtp` have them: the embedding
    comes first in the concatenation, and is zero at position 0; h^0 is the trunk's output after
    its final norm, and what goes to the next depth is h^k after this module's norm.
    """

    enorm: nn.Module
    hnorm: nn.Module
    eh_proj: nn.Linear
    shared_head: SharedHead

    def add_mtp(self, config: Any, norm: type[nn.Module]) -> None:
        """Add the projection and the norms to an initialised decoder layer."""
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = norm(width, eps=eps)
        self.hnorm = norm(width, eps=eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.shared_head = SharedHead(norm(width, eps=eps))

    def forward(self, embeds_BSD: Tensor, hidden_states: Tensor, **layer: Any) -> Tensor:
        x_BSD = torch.cat([self.enorm(embeds_BSD), self.hnorm(hidden_states)], dim=-1)
        out_BSD = super().forward(self.eh_proj(x_BSD), **layer)
        return self.shared_head.norm(out_BSD)


@dataclass
class MTPOutput:
    """What the modules made of one forward pass.

    loss: mean over depths of (sum of cross-entropies / num_items), nats; differentiable.
    token_losses, tokens: per depth, the mean cross-entropy and the number of scored tokens.
    acceptance, agreement: per depth, the chance that a drafted token is kept at temperature 1 and
    at temperature 0 (see `draft_quality`), if the request asked for it.
    """

    loss: Tensor
    token_losses: list[float]
    tokens: list[int]
    acceptance: list[float]
    agreement: list[float]


@dataclass
class MTPRequest:
    """What the next forward pass shall compute of the MTP loss.

    labels_BS: token ids, IGNORE where a token is not to be predicted; unshifted.
    num_items: what sums of token losses are divided by; None: the depth's own number of tokens.
    detach: no gradient to trunk, embedding or head.
    quality: measure acceptance and agreement too (one more pass through the head).
    """

    labels_BS: Tensor
    num_items: Tensor | float | None = None
    detach: bool = False
    quality: bool = False


def documents(position_ids: Tensor, attention_mask_BS: Tensor | None) -> Tensor:
    """Number the documents of a batch (B, S) from 0, padding -1; a gap in positions starts one."""
    start_BS = torch.ones_like(position_ids, dtype=torch.bool)
    start_BS[:, 1:] = position_ids.diff(dim=-1) != 1
    document_BS = start_BS.flatten().cumsum(0).view_as(position_ids) - 1
    if attention_mask_BS is not None:
        document_BS = document_BS.masked_fill(attention_mask_BS == 0, -1)
    return document_BS


def shift(x_BS: Tensor, by: int, fill: int) -> Tensor:
    """Move each row `by` places to the left and fill the end: [1 2 3] -> [2 3 fill]."""
    out = torch.full_like(x_BS, fill)
    if by < x_BS.shape[1]:
        out[:, : x_BS.shape[1] - by] = x_BS[:, by:]
    return out


def targets(labels_BS: Tensor, document_BS: Tensor, depth: int) -> Tensor:
    """Labels of `depth` (0-based): t_{i+depth+2} at i, IGNORE across documents or padding.

    `document_BS` numbers documents from 0 and is -1 on padding.
    """
    by = depth + 2
    labels = shift(labels_BS, by, IGNORE)
    same = (shift(document_BS, by, -1) == document_BS) & (document_BS >= 0)
    return labels.masked_fill(~same, IGNORE)


def cross_entropy_sum(hidden_TD: Tensor, head: Head, labels_T: Tensor) -> Tensor:
    """Sum of cross-entropies in nats, float32, a chunk of tokens at a time."""

    def one(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), labels, reduction="sum")

    if hidden_TD.shape[0] <= LOSS_CHUNK_TOKENS:
        return one(hidden_TD, labels_T)
    chunks = zip(hidden_TD.split(LOSS_CHUNK_TOKENS), labels_T.split(LOSS_CHUNK_TOKENS), strict=True)
    return torch.stack([checkpoint(one, *chunk, use_reentrant=False) for chunk in chunks]).sum()


@torch.no_grad()
def draft_quality(trunk_TD: Tensor, draft_TD: Tensor, head: Head) -> tuple[float, float]:
    """Return (acceptance, agreement) of drafts, with trunk p and module q of the same token.

    A module drafts its most probable token, x = argmax q, as vLLM does unless told otherwise.
    acceptance = mean p(x): at temperature 1 speculative sampling keeps x with this chance (arXiv
    2211.17192, algorithm 1, with a q that is certain of x). agreement = share of x = argmax p: the
    chance at temperature 0. Measured on at most 512 to 1023 tokens, evenly spread.
    """
    stride = max(1, trunk_TD.shape[0] // 512)
    p_TV = head(trunk_TD[::stride]).float().softmax(-1)
    drafted_T = head(draft_TD[::stride]).argmax(-1)
    acceptance = p_TV.gather(1, drafted_T.unsqueeze(1)).mean()
    agreement = (p_TV.argmax(-1) == drafted_T).float().mean()
    return acceptance.item(), agreement.item()


class MTPCollector:
    """Gathers the depths' losses and metrics into an `MTPOutput`."""

    def __init__(self, request: MTPRequest) -> None:
        self.request = request
        self.losses: list[Tensor] = []
        self.token_losses: list[float] = []
        self.tokens: list[int] = []
        self.acceptance: list[float] = []
        self.agreement: list[float] = []

    def add(
        self,
        depth: int,
        hidden_BSD: Tensor,
        trunk_BSD: Tensor,
        head: Head,
        labels_BS: Tensor,
    ) -> None:
        """Score one depth: its normed output against its labels, both (B, S)."""
        scored_BS = labels_BS != IGNORE
        hidden_TD, labels_T = hidden_BSD[scored_BS], labels_BS[scored_BS]
        tokens = labels_T.numel()
        loss = cross_entropy_sum(hidden_TD, head, labels_T)
        items = max(tokens, 1) if self.request.num_items is None else self.request.num_items
        self.losses.append(loss / items)
        self.token_losses.append(loss.item() / max(tokens, 1))
        self.tokens.append(tokens)
        if self.request.quality and tokens:
            ahead_BSD = trunk_BSD.roll(-(depth + 1), dims=1)
            acceptance, agreement = draft_quality(ahead_BSD[scored_BS], hidden_TD.detach(), head)
            self.acceptance.append(acceptance)
            self.agreement.append(agreement)

    def result(self) -> MTPOutput:
        """Average over depths (eq. 25, without lambda)."""
        loss = torch.stack(self.losses).mean()
        return MTPOutput(loss, self.token_losses, self.tokens, self.acceptance, self.agreement)
