"""The router on numbers worked out by hand, and against a reference of plain loops."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.policy.router import Router, logged, routers

# Scores of four tokens for eight experts in four groups of two; the bias favours experts 1 and 6
# and rules out expert 0.
SCORES = torch.tensor(
    [
        # g0          g1          g2          g3
        [0.90, 0.10, 0.40, 0.30, 0.20, 0.25, 0.35, 0.15],
        [0.50, 0.55, 0.60, 0.65, 0.05, 0.10, 0.15, 0.20],
        [0.10, 0.10, 0.30, 0.30, 0.80, 0.70, 0.10, 0.90],
        [0.99, 0.05, 0.20, 0.10, 0.30, 0.35, 0.10, 0.45],
    ]
)
BIAS = torch.tensor([-1.00, 0.30, 0.00, 0.00, -0.10, 0.00, 0.20, 0.00])
# scores + bias            -> group sums                -> groups -> best two
# [-.10 .40 | .40 .30 | .10 .25 | .55 .15] ->  .30  .70  .35  .70 -> 1, 3 -> 6 (.55), 2 (.40)
# [-.50 .85 | .60 .65 | -.05 .10 | .35 .20] -> .35 1.25  .05  .55 -> 1, 3 -> 3 (.65), 2 (.60)
#     expert 1 has the highest sum of all, .85, and is out with its group
# [-.90 .40 | .30 .30 | .70 .70 | .30 .90] -> -.50 .60 1.40 1.20 -> 2, 3 -> 7 (.90), 4 or 5 (.70)
# [-.01 .35 | .20 .10 | .20 .35 | .30 .45] ->  .34 .30  .55  .75 -> 2, 3 -> 7 (.45), 5 (.35)
CHOSEN = [{2, 6}, {2, 3}, {7, 5}, {7, 5}]
BIAS_TIE_BREAK = torch.tensor([0, 0, 0, 0, -0.001, 0, 0, 0])  # 5 before 4 in the third token


def make_router(**fields: Any) -> Router:
    config = SimpleNamespace(
        **{
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "hidden_size": 8,
        }
        | fields
    )
    return Router(config)


def identity_router(**fields: Any) -> Router:
    """A router whose logits are its input: width E, identity weight."""
    router = make_router(**fields)
    torch.nn.init.eye_(router.weight)
    return router


def test_worked_example_selection() -> None:
    router = identity_router()
    router.e_score_correction_bias.copy_(BIAS + BIAS_TIE_BREAK)
    logits, gates, experts = router(SCORES.logit().unsqueeze(0))
    assert [set(row.tolist()) for row in experts] == CHOSEN
    torch.testing.assert_close(logits.sigmoid(), SCORES)
    # Gates are shares of the scores without bias, times 2.5.
    expected = {
        0: {2: 2.5 * 0.40 / 0.75, 6: 2.5 * 0.35 / 0.75},
        1: {2: 2.5 * 0.60 / 1.25, 3: 2.5 * 0.65 / 1.25},
        2: {7: 2.5 * 0.90 / 1.60, 5: 2.5 * 0.70 / 1.60},
        3: {7: 2.5 * 0.45 / 0.80, 5: 2.5 * 0.35 / 0.80},
    }
    for token, row in expected.items():
        for gate, expert in zip(gates[token].tolist(), experts[token].tolist(), strict=True):
            assert gate == pytest.approx(row[expert], rel=1e-5)


def test_worked_example_without_normalisation() -> None:
    router = identity_router(norm_topk_prob=False, routed_scaling_factor=1.5)
    router.e_score_correction_bias.copy_(BIAS + BIAS_TIE_BREAK)
    _, gates, experts = router(SCORES.logit())
    torch.testing.assert_close(gates, 1.5 * SCORES.gather(1, experts))


def test_without_groups_the_best_experts_win() -> None:
    router = identity_router(n_group=1, topk_group=1)
    router.e_score_correction_bias.copy_(BIAS)
    experts = router.choose(SCORES)
    assert [set(row.tolist()) for row in experts[:2]] == [{6, 1}, {1, 3}] or [
        set(row.tolist()) for row in experts[:2]
    ] == [{6, 2}, {1, 3}]  # experts 1 and 2 tie in the first token


def test_worked_example_counts() -> None:
    router = identity_router()
    router.e_score_correction_bias.copy_(BIAS + BIAS_TIE_BREAK)
    experts = router.choose(SCORES)
    router.count(experts, None)
    assert router.load_E.tolist() == [0, 0, 2, 1, 0, 2, 1, 2]
    router.count(experts, torch.tensor([True, False, False, True]))
    assert router.load_E.tolist() == [0, 0, 3, 1, 0, 3, 2, 3]
    assert router.load_E.dtype == torch.int64


def test_the_bias_takes_no_part_in_gates_or_gradients() -> None:
    """Where it changes no choice, it changes nothing."""
    outputs = []
    for bias in (0.0, 0.25):
        router = identity_router()
        router.e_score_correction_bias.fill_(bias)
        _, gates, experts = router(SCORES.logit())
        order = experts.argsort(1)
        gates.gather(1, order).pow(2).sum().backward()
        outputs.append((gates.gather(1, order), experts.gather(1, order), router.weight.grad))
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)


def test_the_bias_is_no_parameter() -> None:
    router = make_router()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert set(router.state_dict()) == {"weight", "e_score_correction_bias"}


def plain_choice(
    scores: list[float], bias: list[float], groups: int, best: int, k: int
) -> set[int]:
    """Group-limited top-k of score + bias, as the report's text has it."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    sums = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: sums[g])[-best:]
    allowed = [e for e in range(len(scores)) if e // size in kept]
    return set(sorted(allowed, key=lambda e: biased[e])[-k:])


@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(4, 1, 2), (4, 2, 4), (2, 1, 4), (1, 1, 3), (8, 3, 6), (4, 4, 5)]),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_choice_equals_plain_loops(seed: int, shape: tuple[int, int, int], spread: float) -> None:
    groups, best, k = shape
    router = make_router(
        n_routed_experts=16, n_group=groups, topk_group=best, num_experts_per_tok=k
    )
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(7, 16, generator=generator).sigmoid()
    router.e_score_correction_bias.normal_(-spread, max(spread, 1e-9), generator=generator)
    chosen = router.choose(scores)
    for row, experts in zip(scores.tolist(), chosen.tolist(), strict=True):
        expected = plain_choice(row, router.e_score_correction_bias.tolist(), groups, best, k)
        assert set(experts) == expected
        assert len(set(experts)) == k


def test_scores_are_float32_in_a_bfloat16_policy() -> None:
    """2 ** -9 apart: equal in bfloat16 after the product, told apart in float32."""
    router = make_router(n_group=1, topk_group=1, num_experts_per_tok=1, hidden_size=2)
    router.weight.data = torch.tensor([[1.0, 2.0**-9]] * 4 + [[1.0, 0.0]] * 4)
    router.to(torch.bfloat16)
    logits, gates, experts = router(torch.ones(1, 2, dtype=torch.bfloat16))
    assert logits.dtype == gates.dtype == torch.float32
    assert experts.item() < 4


def test_scores_are_float32_under_autocast() -> None:
    """Mixed precision must not round the products: experts would be chosen otherwise."""
    router = make_router(hidden_size=8)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    expected = router(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x)[0], expected)


def test_logged_records_inside_the_block_only() -> None:
    """Choices stand in the order of the passes; the log ends with the block, after errors too."""
    first, second = identity_router(), identity_router()
    counted = torch.tensor([True, False, True, True])
    with logged([first, second], counted) as log:
        second(SCORES)
        first(SCORES)
    first(SCORES)
    assert [choice.router for choice in log.choices] == [second, first]
    assert all(choice.counted_T is counted for choice in log.choices)
    assert log.choices[0].scores_TE.requires_grad
    with pytest.raises(ValueError, match="stop"), logged([first], None):
        raise ValueError("stop")
    assert first.log is None


def test_routers_are_found_in_order(make_policy: Callable[..., Any]) -> None:
    policy = make_policy(num_nextn_predict_layers=2)
    expected = [policy.model.layers[k].mlp.gate for k in (1, 2, 3, 4)]
    assert routers(policy) == expected == policy.model.routers


def test_counts_are_no_buffer() -> None:
    """DDP, which broadcasts buffers, never sees them."""
    router = identity_router()
    router.count(router.choose(SCORES), None)
    assert [name for name, _ in router.named_buffers()] == ["e_score_correction_bias"]


def test_input_of_any_leading_shape_is_flattened() -> None:
    router = identity_router()
    x: Tensor = SCORES.logit()
    for shaped in (x.view(2, 2, 8), x.view(1, 4, 8)):
        for one, other in zip(router(shaped), router(x), strict=True):
            assert torch.equal(one, other)
