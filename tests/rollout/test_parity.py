from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.policy.checkpoint import named_tensors
from posttrain.rollout import parity
from posttrain.rollout.engine import Engine
from posttrain.rollout.parity import ParityError
from posttrain.rollout.sides import choice_margin

TOLERANCE = 1e-4


def test_equal_sides_pass(engine: Engine, plain_engine: Engine, tiny: Any) -> None:
    for one in (engine, plain_engine):
        policy = tiny.policy(4)
        policy.train()
        policy.model.norm.eval()
        one.sync(named_tensors(policy))
        report = parity.check(one, policy, tolerance=TOLERANCE)
        assert report.max_abs_logprob_diff < 1e-5  # float32, a model of this size
        assert 0 < report.mean_abs_logprob_diff < report.max_abs_logprob_diff
        assert report.experts_missed == 0
        assert report.tokens >= 4 * (47 + 24)
        assert policy.training  # its mode is as before, module by module
        assert not policy.model.norm.training


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", "embed_tokens on"),
        ("model.layers.0.self_attn.o_proj.weight", "layers.0 on"),
        ("model.layers.2.mlp.experts.down_proj", "layers.2 on"),
        ("lm_head.weight", "final norm or lm_head"),
    ],
)
def test_a_planted_difference_is_found_and_placed(
    engine: Engine, tiny: Any, name: str, place: str
) -> None:
    policy = tiny.policy(4)
    engine.sync(named_tensors(policy))
    with torch.no_grad():
        policy.get_parameter(name).mul_(1.05)
    with pytest.raises(ParityError, match=place) as caught:
        parity.check(engine, policy, tolerance=TOLERANCE)
    assert "tolerance 0.0001" in str(caught.value)
    assert "remedy" in str(caught.value)


def test_one_experts_difference_is_found(engine: Engine, tiny: Any) -> None:
    policy = tiny.policy(4)
    engine.sync(named_tensors(policy))
    for expert in (0, 7, 15):  # any of them has tokens
        with torch.no_grad():
            policy.model.layers[1].mlp.experts.down_proj[expert].mul_(1.1)
        with pytest.raises(ParityError, match=r"layers\.1 on"):
            parity.check(engine, policy, tolerance=TOLERANCE)
        with torch.no_grad():
            policy.model.layers[1].mlp.experts.down_proj[expert].div_(1.1)


def test_a_bias_that_was_not_synced_is_found(engine: Engine, tiny: Any) -> None:
    policy = tiny.policy(4)
    engine.sync(named_tensors(policy))
    policy.model.layers[1].mlp.gate.e_score_correction_bias.neg_()
    with pytest.raises(ParityError, match=r"layers\.1 on"):
        parity.check(engine, policy, tolerance=TOLERANCE)


def test_a_fault_of_the_decode_path_alone_is_found(
    engine: Engine, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.sample import rejection_sampler

    policy = tiny.policy(4)
    engine.sync(named_tensors(policy))
    right = rejection_sampler.expand_batch_to_tokens

    def lost(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return right(x, *args, **kwargs) * 1.01

    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", lost)
    with pytest.raises(ParityError, match=r"prefill .*e-0[67], decode 0\.0"):
        parity.check(engine, policy, tolerance=TOLERANCE)


def test_a_choice_that_hangs_on_rounding_is_no_difference(engine: Engine, tiny: Any) -> None:
    """The engine holds an expert's router row a little larger, the trainer its twin's: a tie, decided otherwise."""
    policy = tiny.policy(4)
    router = policy.model.layers[1].mlp.gate
    with torch.no_grad():
        router.weight[1] = router.weight[0]
        router.e_score_correction_bias[1] = router.e_score_correction_bias[0]
        router.e_score_correction_bias[0] += 1e-6
    engine.sync(named_tensors(policy))
    with torch.no_grad():
        router.e_score_correction_bias[0] -= 2e-6
    report = parity.check(engine, policy, tolerance=TOLERANCE)
    assert 0 < report.tokens_tied < report.tokens
    assert report.max_abs_logprob_diff < TOLERANCE
    with torch.no_grad():  # by a margin that is no rounding it is a difference
        router.e_score_correction_bias[0] -= 0.05
    with pytest.raises(ParityError, match=r"layers\.1 on"):
        parity.check(engine, policy, tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("scores", "margin"),
    [
        # groups {0, 1}, {2, 3}, {4, 5}: sums 1.5, 1.1, 0.4; two are kept, and of four experts two
        ([0.9, 0.6, 0.8, 0.3, 0.2, 0.2], 0.2),  # 0.8 before 0.6
        ([0.9, 0.6, 0.8, 0.3, 0.6, 0.45], 0.05),  # the second group before the third, 1.1 and 1.05
        ([0.9, 0.8, 0.8, 0.3, 0.2, 0.2], 0.0),  # a tie
    ],
)
def test_margins_by_hand(scores: list[float], margin: float) -> None:
    config = SimpleNamespace(n_group=3, topk_group=2, num_experts_per_tok=2)
    found = choice_margin(torch.tensor([scores]), config)
    assert found.item() == pytest.approx(margin, abs=1e-6)


def test_not_a_number_fails(engine: Engine, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the decoded tokens alone, where it is no larger than anything."""
    policy = tiny.policy(4)
    engine.sync(named_tensors(policy))
    differences = parity._differences

    def lost(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        prefill, decode = differences(*args)
        decode[0, 0] = float("nan")
        return prefill, decode

    monkeypatch.setattr(parity, "_differences", lost)
    with pytest.raises(ParityError, match="differ by nan"):
        parity.check(engine, policy, tolerance=TOLERANCE)


def test_memory_that_changed_after_the_sync_is_told(engine: Engine, tiny: Any) -> None:
    policy = tiny.policy(4)
    engine.sync(named_tensors(policy))
    model, _ = engine.llm.llm_engine.model_executor.driver_worker.worker.policy_models()
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight.mul_(1.1)
    with pytest.raises(ParityError, match=r"model\.layers\.2\.input_layernorm\.weight"):
        parity.check(engine, policy, tolerance=TOLERANCE)


def test_experts_that_no_token_reaches_are_counted(engine: Engine, tiny: Any) -> None:
    policy = tiny.policy(4)
    policy.model.layers[1].mlp.gate.e_score_correction_bias[:2] = -10.0
    engine.sync(named_tensors(policy))
    gate = parity.Gate(TOLERANCE, limit=8)
    assert gate.check(engine, policy).experts_missed == 2
    assert len(gate.prompts) == 8  # it tried
    assert gate.check(engine, policy).experts_missed == 2


def test_prompts_are_added_until_every_expert_is_reached(engine: Engine, tiny: Any) -> None:
    policy = tiny.policy(4)
    policy.model.layers[2].mlp.gate.e_score_correction_bias[5] = -0.25  # seldom chosen
    engine.sync(named_tensors(policy))
    gate = parity.Gate(TOLERANCE, prompts=1, tokens=4)
    assert gate.check(engine, policy).experts_missed == 0
    assert len(gate.prompts) > 1


@pytest.mark.slow
def test_half_precision_needs_a_wider_gate(tmp_path: Path, tiny: Any) -> None:
    from posttrain.policy.checkpoint import save

    policy = tiny.policy(4)
    save(policy, None, tmp_path / "c")
    engine = Engine.start(tmp_path / "c", tiny.Settings(dtype="bfloat16"))
    try:
        engine.sync(named_tensors(policy))
        with pytest.raises(ParityError, match="half precision"):
            parity.check(engine, policy, tolerance=TOLERANCE)
    finally:
        engine.close()
