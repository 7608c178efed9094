"""Auxiliary-loss-free balancing: the bias update, the sequence-wise loss, router entropy, the load metric.

Shapes: T tokens, E experts, K experts a token, N documents, L routers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from posttrain.policy.router import Choice, Router


def max_violation(load_E: Tensor) -> Tensor:
    """MaxVio = (max_e load_e - mean load) / mean load (arXiv 2408.15664, eq. 4); 0 if no load."""
    load_E = load_E.double()
    mean = load_E.mean(dim=-1)
    return torch.where(mean > 0, (load_E.amax(dim=-1) - mean) / mean.clamp(min=1e-12), 0.0)


def biased(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """b_e + rate * sign(mean load - load_e) (arXiv 2408.15664, algorithm 1)."""
    load_E = load_E.double()
    step_E = torch.sign(load_E.mean(dim=-1, keepdim=True) - load_E)
    return bias_E + rate * step_E.to(bias_E)


@torch.no_grad()
def update_biases(
    routers: Sequence[Router], rate: float, all_reduce: Callable[[Tensor], Tensor]
) -> list[float]:
    """Move every bias once by the load since the last call, and start counting anew.

    Call it once an optimizer step, on every process: `all_reduce` sums a tensor over all of them.
    Returns the max violation of each router in that load. Routers that saw no token keep
    their bias (sign of zero). A rate of 0 only measures.
    """
    if not routers:
        return []
    # Zeros like the bias: under FSDP the weight is a shard here, and its zeros would be one too.
    load_LE = all_reduce(
        torch.stack(
            [
                r.load_E
                if r.load_E is not None
                else r.e_score_correction_bias.new_zeros(r.num_experts).long()
                for r in routers
            ]
        )
    )
    for router, load_E in zip(routers, load_LE, strict=True):
        if rate:
            bias = router.e_score_correction_bias
            bias.copy_(biased(bias, load_E, rate))
        router.load_E = None
    return max_violation(load_LE).tolist()


def sequence_balance_loss(choices: Sequence[Choice], document_T: Tensor) -> Tensor:
    """Sequence-wise balance loss (arXiv 2412.19437, eq. 17-20), without its factor alpha.

    For each document of n tokens:  L = sum_e f_e P_e,
    f_e = E / (K n) * #{t : e chosen for t},  P_e = 1/n * sum_t s_te / sum_j s_tj.
    Mean over documents, sum over routers. `document_T` numbers the document of each token;
    tokens that do not count (padding) are left out. f carries no gradient.
    Raises RuntimeError if scores were computed without their graph (reentrant checkpointing).
    """
    total = choices[0].scores_TE.new_zeros(())
    for choice in choices:
        scores_TE, experts_TK, document, num_documents = _counted(choice, document_T)
        if num_documents == 0:
            continue
        num_experts = scores_TE.shape[1]
        n_N1 = torch.bincount(document, minlength=num_documents).unsqueeze(1)
        chosen_TE = torch.zeros_like(scores_TE).scatter_(1, experts_TK, 1.0)
        zeros_NE = scores_TE.new_zeros(num_documents, num_experts)
        f_NE = zeros_NE.index_add(0, document, chosen_TE) * num_experts / experts_TK.shape[1]
        share_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
        p_NE = zeros_NE.index_add(0, document, share_TE)
        total = total + (f_NE / n_N1 * p_NE / n_N1).sum(dim=-1).mean()
    return total


def router_entropy(choices: Sequence[Choice], document_T: Tensor) -> Tensor:
    """Entropy of the router probabilities, nats: H_t = -sum_e p_te log p_te, p_te = s_te / sum_j s_tj.

    Mean over a document's tokens, then over documents; sum over routers. Tokens that do not count
    (padding) are left out. At most log E a router, when it scores all experts alike.
    Raises RuntimeError as `sequence_balance_loss` does.
    """
    total = choices[0].scores_TE.new_zeros(())
    for choice in choices:
        scores_TE, _, document, num_documents = _counted(choice, document_T)
        if num_documents == 0:
            continue
        share_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
        # An expert whose score underflows to 0 adds nothing, and no NaN to the gradient.
        entropy_T = -(share_TE * share_TE.clamp(min=1e-20).log()).sum(dim=-1)
        n_N = torch.bincount(document, minlength=num_documents)
        entropy_N = scores_TE.new_zeros(num_documents).index_add(0, document, entropy_T)
        total = total + (entropy_N / n_N).mean()
    return total


def _counted(choice: Choice, document_T: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return scores and experts of the tokens that count, their documents from 0, and how many."""
    if choice.router.weight.requires_grad and not choice.scores_TE.requires_grad:
        raise RuntimeError(
            "losses on router scores get no gradient through reentrant gradient checkpointing; "
            "set gradient_checkpointing_kwargs to {use_reentrant: false}, or "
            "sequence_balance_weight and router_entropy_weight to 0"
        )
    scores_TE, experts_TK, document = choice.scores_TE, choice.experts_TK, document_T
    if choice.counted_T is not None:
        keep = choice.counted_T
        scores_TE, experts_TK, document = scores_TE[keep], experts_TK[keep], document[keep]
    if document.numel() == 0:
        return scores_TE, experts_TK, document, 0
    _, document = document.unique(return_inverse=True)
    return scores_TE, experts_TK, document, int(document.max()) + 1
