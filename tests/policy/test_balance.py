"""Bias update, load metric and sequence-wise loss on numbers worked out by hand."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from posttrain.policy.balance import (
    biased,
    max_violation,
    router_entropy,
    sequence_balance_loss,
    update_biases,
)
from posttrain.policy.mtp import MTPRequest
from posttrain.policy.router import Choice, Router


def make_router(experts: int = 4, top_k: int = 2) -> Router:
    return Router(
        SimpleNamespace(
            n_routed_experts=experts,
            num_experts_per_tok=top_k,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            hidden_size=3,
        )
    )


def alone(load: Tensor) -> Tensor:
    """The sum over one process."""
    return load


# load, mean                     step of the bias            max violation
UPDATES = [
    ([4, 4, 4, 4], [0, 0, 0, 0], 0.0),  # mean 4: in balance, sign 0
    ([0, 8, 4, 4], [1, -1, 0, 0], 1.0),  # mean 4: two of them exactly at the mean
    ([16, 0, 0, 0], [-1, 1, 1, 1], 3.0),  # mean 4
    ([3, 2, 2, 2], [-1, 1, 1, 1], 1 / 3),  # mean 2.25, which no integer equals
    ([0, 0, 0, 0], [0, 0, 0, 0], 0.0),  # no token seen
]


@pytest.mark.parametrize(("load", "step", "violation"), UPDATES)
def test_worked_table(load: list[int], step: list[int], violation: float) -> None:
    bias = torch.tensor([0.5, -0.25, 0.0, 0.125])
    expected = [b + 0.001 * s for b, s in zip(bias.tolist(), step, strict=True)]
    moved = biased(bias, torch.tensor(load), 0.001)
    assert moved.dtype == torch.float32
    assert moved.tolist() == pytest.approx(expected, abs=6e-8)  # half a step of float32 at 0.5
    for b, m, s in zip(bias.tolist(), moved.tolist(), step, strict=True):
        assert (m == b) == (s == 0), "a sign of zero leaves the bias as it is, exactly"
    assert max_violation(torch.tensor(load)).item() == pytest.approx(violation, rel=1e-12)


def test_update_moves_every_router_and_starts_anew() -> None:
    routers = [make_router() for _ in UPDATES]
    for router, (load, _, _) in zip(routers, UPDATES, strict=True):
        router.load_E = torch.tensor(load)
    routers[-1].load_E = None  # saw no token
    violations = update_biases(routers, 0.01, alone)
    assert violations == pytest.approx([violation for _, _, violation in UPDATES])
    for router, (_, step, _) in zip(routers, UPDATES, strict=True):
        assert router.e_score_correction_bias.tolist() == pytest.approx([0.01 * s for s in step])
        assert router.load_E is None
    before = [router.e_score_correction_bias.clone() for router in routers]
    assert update_biases(routers, 0.01, alone) == [0.0] * len(UPDATES)
    for router, bias in zip(routers, before, strict=True):
        assert torch.equal(router.e_score_correction_bias, bias)


def test_update_sees_the_sum_over_processes() -> None:
    """Alone, this process would lower expert 0; over both, expert 0 has the least load."""
    router = make_router()
    router.load_E = torch.tensor([6, 2, 2, 2])
    other = torch.tensor([[0, 6, 6, 8]])
    assert update_biases([router], 1.0, lambda load: load + other) == [2 / 8]
    assert router.e_score_correction_bias.tolist() == [1.0, 0.0, 0.0, -1.0]


def test_a_rate_of_zero_measures_only() -> None:
    router = make_router()
    router.load_E = torch.tensor([8, 0, 0, 0])
    assert update_biases([router], 0.0, alone) == [3.0]
    assert router.e_score_correction_bias.tolist() == [0.0] * 4
    assert router.load_E is None


def test_a_policy_without_experts_has_nothing_to_update() -> None:
    assert update_biases([], 0.001, alone) == []


def test_sharded_routers_that_saw_nothing_are_updated_too(tmp_path: Path) -> None:
    """Under FSDP2 weights are shards between steps; one router counted, the other did not."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        routers = [make_router(), make_router()]
        for router in routers:
            fully_shard(router, mesh=init_device_mesh("cpu", (1,)))
        routers[0].load_E = torch.tensor([8, 0, 4, 4])
        assert update_biases(routers, 0.5, alone) == [1.0, 0.0]
        assert routers[0].e_score_correction_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
        assert routers[1].e_score_correction_bias.tolist() == [0.0] * 4
    finally:
        torch.distributed.destroy_process_group()


def test_repeated_updates_balance_a_skewed_router() -> None:
    """What it is for: tokens that all prefer the same experts end up spread over all."""
    torch.manual_seed(0)
    router = make_router(experts=8, top_k=2)
    scores = (torch.randn(512, 8) + torch.linspace(-1, 1, 8)).sigmoid()
    violations = []
    for _ in range(400):
        router.count(router.choose(scores), None)
        violations += update_biases([router], 0.002, alone)
    assert violations[0] > 1.0
    assert max(violations[-20:]) < 0.1


@given(st.lists(st.integers(0, 10**12), min_size=2, max_size=9))
@settings(max_examples=100, deadline=None)
def test_signs_are_exact_for_large_counts(load: list[int]) -> None:
    """Against integers: E * load_e compared with the total, which knows no rounding."""
    step = biased(torch.zeros(len(load)), torch.tensor(load), 1.0)
    total = sum(load)
    expected = [(total > len(load) * x) - (total < len(load) * x) for x in load]
    assert step.tolist() == expected


# --- the sequence-wise loss


def test_sequence_loss_worked_example() -> None:
    """E = 4, K = 2; a document of three tokens and one of one; a padded token in between.

    Document 0: experts 0 1 | 0 2 | 0 1 are chosen 3, 2, 1, 0 times; f = 4 / (2 * 3) * that
    = 2, 4/3, 2/3, 0. Shares of the scores: (.5 .25 .25 0), (.4 .2 .4 0), (.6 .3 .1 0);
    P = (.5, .25, .25, 0). L = 2 * .5 + 4/3 * .25 + 2/3 * .25 = 1.5.
    Document 1: experts 2 3; f = 4 / 2 * (0 0 1 1); P = (.1 .1 .4 .4); L = 1.6.
    Mean 1.55.
    """
    scores = torch.tensor(
        [
            [0.5, 0.25, 0.25, 0.0],
            [0.2, 0.1, 0.2, 0.0],
            [0.9, 0.9, 0.9, 0.9],
            [0.6, 0.3, 0.1, 0.0],
            [0.2, 0.2, 0.8, 0.8],
        ]
    )
    experts = torch.tensor([[0, 1], [2, 0], [3, 1], [1, 0], [3, 2]])
    document = torch.tensor([4, 4, -1, 4, 7])
    counted = torch.tensor([True, True, False, True, True])
    router = make_router().requires_grad_(False)
    choice = Choice(router, scores, experts, counted)
    assert sequence_balance_loss([choice], document).item() == pytest.approx(1.55, rel=1e-6)
    assert sequence_balance_loss([choice] * 3, document).item() == pytest.approx(4.65, rel=1e-6)


def test_balanced_documents_have_the_least_possible_loss() -> None:
    """Uniform choice of uniform scores: sum_e 1 * 1 / E = 1."""
    experts = torch.tensor([[0, 1], [2, 3]])
    choice = Choice(make_router().requires_grad_(False), torch.full((2, 4), 0.3), experts, None)
    assert sequence_balance_loss([choice], torch.zeros(2).long()).item() == pytest.approx(1.0)


def plain_loss(
    scores: Tensor, experts: Tensor, counted: list[bool], document: list[int]
) -> Tensor | float:
    """Eq. 17-20, token by token and expert by expert."""
    num_experts, k = scores.shape[1], experts.shape[1]
    losses = []
    for d in sorted({d for d, c in zip(document, counted, strict=True) if c}):
        tokens = [t for t in range(len(document)) if counted[t] and document[t] == d]
        loss = 0.0
        for e in range(num_experts):
            chosen = sum(1 for t in tokens if e in experts[t].tolist())
            f = num_experts / (k * len(tokens)) * chosen
            p = sum(scores[t, e] / scores[t].sum() for t in tokens) / len(tokens)
            loss = loss + f * p
        losses.append(loss)
    return sum(losses) / len(losses)


@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_sequence_loss_and_gradient_equal_plain_loops(seed: int, tokens: int) -> None:
    """Several routers, ragged documents, padding; in float64, so rounding is out of sight."""
    generator = torch.Generator().manual_seed(seed)
    document = torch.randint(0, 3, (tokens,), generator=generator).sort().values
    expected_total, choices, leaves = 0.0, [], []
    for _ in range(2):
        logits = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
        counted = torch.rand(tokens, generator=generator) < 0.8
        counted[0] = True
        pair = [logits.clone().requires_grad_() for _ in range(2)]
        experts = pair[0].detach().topk(3).indices
        choices.append(Choice(make_router(6, 3), pair[0].sigmoid(), experts, counted))
        expected_total = expected_total + plain_loss(
            pair[1].sigmoid(), experts, counted.tolist(), document.tolist()
        )
        leaves.append(pair)
    loss = sequence_balance_loss(choices, document)
    loss.backward()
    expected_total.backward()
    assert loss.item() == pytest.approx(expected_total.item(), rel=1e-12)
    for ours, theirs in leaves:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-14)


def test_router_entropy_on_numbers() -> None:
    """One document of two tokens and one of one; a third is padding.

    Shares (1/2, 1/4, 1/8, 1/8): 1.75 ln 2. Equal ones: ln 4. All on one: 0, with a finite gradient.
    """
    rows = [[0.4, 0.2, 0.1, 0.1], [0.3, 0.3, 0.3, 0.3], [0.9, 0.0, 0.0, 0.0], [0.5, 0.1, 0.1, 0.1]]
    scores = torch.tensor(rows, requires_grad=True)
    counted = torch.tensor([True, True, True, False])
    experts = torch.zeros(4, 2).long()
    choice = Choice(make_router(), scores, experts, counted)
    entropy = router_entropy([choice, choice], torch.tensor([0, 0, 1, 2]))
    expected = 2 * ((1.75 * math.log(2) + math.log(4)) / 2 + 0.0) / 2
    assert entropy.item() == pytest.approx(expected, rel=1e-6)
    entropy.backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert not scores.grad[3].any()
    assert scores.grad[0, 0] < 0 < scores.grad[0, 3]  # it levels


def test_packed_router_entropy_is_the_mean_over_documents() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(9, 4, generator=generator)
    document = torch.tensor([0] * 5 + [1] * 3 + [2])
    chosen = torch.zeros(9, 2).long()
    router = make_router().requires_grad_(False)
    parts = [
        router_entropy([Choice(router, scores[own], chosen[own], None)], document[own])
        for own in (document == d for d in range(3))
    ]
    whole = router_entropy([Choice(router, scores, chosen, None)], document)
    assert whole.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-6)


def test_documents_without_counted_tokens_are_left_out() -> None:
    """A router that saw nothing adds nothing, and no NaN."""
    nothing = torch.zeros(2, dtype=torch.bool)
    scores = torch.full((2, 4), 0.5, requires_grad=True)
    choice = Choice(make_router(), scores, torch.tensor([[0, 1], [2, 3]]), nothing)
    assert sequence_balance_loss([choice], torch.tensor([0, 1])).item() == 0.0
    assert router_entropy([choice], torch.tensor([0, 1])).item() == 0.0


def test_packed_documents_equal_documents_alone(
    make_policy: Callable[..., Any], make_ids: Callable[..., Tensor]
) -> None:
    """Trunk and modules: the loss and its gradient are means over documents, each run alone.

    A document of n tokens is seen by module k at its first n - 1 - k positions; documents that it
    does not see do not enter its mean.
    """
    lengths = [7, 2, 1, 5]
    ids = make_ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    packed = make_policy(num_nextn_predict_layers=2)
    single = copy.deepcopy(packed)
    total = losses_of(packed, ids, positions)
    total.backward()

    per_router: list[list[Tensor]] = [[] for _ in packed.model.routers]
    for document in ids.split(lengths, dim=1):
        for index, loss in enumerate(router_losses(single, document)):
            if loss is not None:
                per_router[index].append(loss)
    expected = sum(torch.stack(losses).mean() for losses in per_router)
    expected.backward()
    assert math.isclose(total.item(), expected.item(), rel_tol=1e-5)
    for (name, one), other in zip(packed.named_parameters(), single.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None, name
        else:
            # The same sums in another order, values of order 0.1.
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)
    for one, other in zip(packed.model.routers, single.model.routers, strict=True):
        assert torch.equal(one.load_E, other.load_E)


def losses_of(policy: Any, ids: Tensor, positions: Tensor) -> Tensor:
    policy.model.wants_balance_loss = True
    policy.model.mtp_request = MTPRequest(ids)
    policy(input_ids=ids, position_ids=positions)
    return policy.model.take_extras().balance_loss


def router_losses(policy: Any, ids: Tensor) -> list[Tensor | None]:
    """The loss of each router on one document alone; None where it saw no token."""
    length = ids.shape[1]
    seen = [length, length, length - 1, length - 2]
    losses: list[Tensor | None] = []
    originals = policy.model.routers
    counts = [router.load_E for router in originals]
    for index, tokens in enumerate(seen):
        if tokens <= 0:
            losses.append(None)
            continue
        # Let one router be seen at a time: the policy's loss is then that router's.
        policy.model.routers = [originals[index]]
        policy.model.wants_balance_loss = True
        policy.model.mtp_request = MTPRequest(ids)
        policy(input_ids=ids)
        losses.append(policy.model.take_extras().balance_loss)
    policy.model.routers = originals
    for router, before in zip(originals, counts, strict=True):
        if router.load_E is None:
            router.load_E = before
    return losses
