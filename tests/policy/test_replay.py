"""Routing replay: what is replayed, what stays the trainer's own, and what of it reaches gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from posttrain.policy.model import PolicyForCausalLM
from posttrain.policy.replay import MISSING, RoutingRequest, differing, record_dtype, replayed
from tests.policy.tiny import tiny_ids, tiny_policy

CHECKPOINTING = [None, {"use_reentrant": False}, {"use_reentrant": True}]


def mask_of(ids: Tensor) -> Tensor:
    """Two rows of which one is padded on both sides, as GRPO pads prompts and completions."""
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[1, -7:] = 0
    return mask


def run(policy: PolicyForCausalLM, record: Tensor | None = None, keep: bool = False) -> Any:
    policy.model.routing_request = RoutingRequest(record, keep)
    ids = tiny_ids()
    return policy(input_ids=ids, attention_mask=mask_of(ids))


def own_record(policy: PolicyForCausalLM) -> Tensor:
    training = policy.training
    policy.eval()
    with torch.no_grad():
        run(policy, keep=True)
    policy.train(training)
    record = policy.model.take_extras().experts_BSLK
    assert record is not None
    return record


def wrong_record(policy: PolicyForCausalLM) -> Tensor:
    """Other experts for every token and layer, a few of them missing."""
    record = (own_record(policy) + 3) % 8
    record[0, 3:6] = MISSING
    return record


def gradients(policy: PolicyForCausalLM, records: list[Tensor | None]) -> list[Tensor]:
    """Of a sum over passes, one for each record, all of them before the one backward pass."""
    policy.zero_grad()
    mask = mask_of(tiny_ids()).bool()
    losses = [run(policy, r).logits.log_softmax(-1)[..., 3][mask].sum() for r in records]
    torch.stack(losses).sum().backward()
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in policy.parameters()]


def checkpointed(options: dict[str, bool] | None) -> PolicyForCausalLM:
    policy = tiny_policy().train()
    if options is not None:
        policy.gradient_checkpointing_enable(options)
        policy.enable_input_require_grads()
    return policy


@pytest.mark.parametrize("options", CHECKPOINTING)
def test_replaying_own_choices_changes_no_bit(options: dict[str, bool] | None) -> None:
    """Logits and all gradients, also where the record has the experts in another order."""
    policy = checkpointed(options)
    record = own_record(policy)
    for same in (record, record.flip(-1)):
        assert torch.equal(run(policy, same).logits.detach(), run(policy).logits.detach())
        plain, replay = gradients(policy, [None]), gradients(policy, [same])
        assert all(torch.equal(a, b) for a, b in zip(plain, replay, strict=True))
    assert sum(float(g.abs().sum()) for g in plain) > 1


@pytest.mark.parametrize("options", CHECKPOINTING[1:])
def test_recomputation_replays_the_same_record(options: dict[str, bool]) -> None:
    """Three passes with three records, then one backward pass that computes all of them again."""
    plain, again = checkpointed(None), checkpointed(options)
    wrong = wrong_record(plain)
    records = [wrong, None, wrong.flip(1)]
    for a, b in zip(gradients(plain, records), gradients(again, records), strict=True):
        assert torch.equal(a, b)
    whole = gradients(plain, [wrong, wrong, wrong])
    assert not all(torch.equal(a, b) for a, b in zip(whole, gradients(again, records), strict=True))


def test_a_wrong_record_changes_exactly_its_tokens() -> None:
    """In the last layer: the logits of that token alone. In the first: it, and what attends to it."""
    policy = tiny_policy()
    record = own_record(policy)
    plain = run(policy).logits
    for layer in (0, 1):
        planted = record.clone()
        planted[0, 17, layer] = (planted[0, 17, layer] + 1) % 8
        changed = (run(policy, planted).logits != plain).any(dim=-1)
        if layer == 1:
            assert changed.nonzero().tolist() == [[0, 17]]
        else:
            assert not changed[1].any()
            assert changed[0].tolist() == [False] * 17 + [True] * 23


def test_gates_are_own_scores_of_recorded_experts() -> None:
    """Written out for each token: the shares of the recorded experts' scores."""
    policy = tiny_policy()
    wrong = wrong_record(policy)
    seen: list[tuple[Tensor, ...]] = []
    router = policy.model.layers[1].mlp.gate
    handle = router.register_forward_hook(lambda *call: seen.append(call[2]))
    run(policy, wrong)
    run(policy)
    handle.remove()
    (logits, gates, experts), (_, own_gates, own_experts) = seen
    for t, chosen in enumerate(wrong[:, :, 0].flatten(0, 1).tolist()):
        if MISSING in chosen:
            assert torch.equal(experts[t], own_experts[t])
            assert torch.equal(gates[t], own_gates[t])
            continue
        assert experts[t].tolist() == chosen
        scores = logits[t].sigmoid()[chosen]
        expected = scores / scores.sum() * router.routed_scaling_factor
        torch.testing.assert_close(gates[t], expected)


def test_gradients_reach_the_router_through_the_gates() -> None:
    """Against a central difference: with the choice fixed by a record the loss is smooth."""
    policy = tiny_policy().double()
    record = wrong_record(policy)
    weight = policy.model.layers[1].mlp.gate.weight
    torch.manual_seed(3)
    direction = torch.randn_like(weight)

    def loss() -> Tensor:
        return run(policy, record).logits.square().mean()

    loss().backward()
    with torch.no_grad():
        values = []
        for step in (1e-3, -2e-3):
            weight += step * direction
            values.append(loss().item())
    slope = (values[0] - values[1]) / 2e-3
    # Scores are computed in float32: an error of 1e-7 over a step of 1e-3, and the curvature.
    assert slope == pytest.approx((weight.grad * direction).sum().item(), rel=2e-3)


def test_load_counts_what_was_computed() -> None:
    policy = tiny_policy(num_nextn_predict_layers=0).train()
    ids = tiny_ids()
    record = torch.zeros((*ids.shape, 2, 2), dtype=torch.int8)
    record[..., 0, :] = torch.tensor([2, 5])
    record[..., 1, :] = torch.tensor([7, 0])
    run(policy, record)
    real = int(mask_of(ids).sum())
    loads = [router.load_E.tolist() for router in policy.model.routers]
    assert loads == [
        [0, 0, real, 0, 0, real, 0, 0],
        [real, 0, 0, 0, 0, 0, 0, real],
    ]


def test_a_request_serves_one_pass() -> None:
    """The next pass is the policy's own again, and leaves no choices behind."""
    policy = tiny_policy()
    plain = run(policy).logits
    run(policy, wrong_record(policy), keep=True)
    policy.model.take_extras()
    ids = tiny_ids()
    assert torch.equal(policy(input_ids=ids, attention_mask=mask_of(ids)).logits, plain)
    assert policy.model.take_extras().experts_BSLK is None


def test_kept_choices_are_those_that_were_computed() -> None:
    policy = tiny_policy()
    own, wrong = own_record(policy), wrong_record(policy)
    assert own.shape == (2, 40, 2, 2)
    with torch.no_grad():
        run(policy, wrong, keep=True)
    kept = policy.model.take_extras().experts_BSLK
    known = (wrong >= 0).all(dim=-1)
    # In the second layer a record may name the policy's own choice by now, in another order.
    assert torch.equal(kept[known].sort(-1).values, wrong[known].sort(-1).values)
    assert (kept[~known] >= 0).all()


def test_replayed_and_differing_on_numbers() -> None:
    own = torch.tensor([[2, 5], [0, 7], [1, 3], [4, 6], [1, 2]])
    record = torch.tensor([[5, 2], [0, 4], [-1, -1], [6, 1], [3, 0]], dtype=torch.int8)
    assert replayed(own, record).tolist() == [[2, 5], [0, 4], [1, 3], [6, 1], [3, 0]]
    assert differing(own, record).tolist() == [0, 1, 0, 1, 2]


def test_the_type_holds_every_expert_and_the_mark() -> None:
    for experts, dtype in ((16, torch.int8), (128, torch.int8), (129, torch.int16)):
        assert record_dtype(experts) == dtype
        assert torch.tensor([MISSING, experts - 1]).to(dtype).tolist() == [MISSING, experts - 1]


def test_sharded_layers_replay_too(tmp_path: Path) -> None:
    """FSDP2 wraps the layers with hooks of its own, and computes them again when checkpointed."""
    plain = checkpointed(None)
    wrong = wrong_record(plain)
    expected = gradients(plain, [wrong])
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        policy = checkpointed({"use_reentrant": False})
        mesh = init_device_mesh("cpu", (1,))
        for layer in policy.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        for one, other in zip(gradients(policy, [wrong]), expected, strict=True):
            assert torch.equal(one.full_tensor() if isinstance(one, DTensor) else one, other)
    finally:
        torch.distributed.destroy_process_group()
