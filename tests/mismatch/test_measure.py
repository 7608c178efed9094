"""A checkpoint's mismatch, measured with a real engine."""

from pathlib import Path

import pytest
import torch

from posttrain import cli
from posttrain.mismatch.measure import Scorer, measure, sampled
from posttrain.policy.checkpoint import save
from posttrain.policy.model import PolicyForCausalLM
from posttrain.recipe.sections import RolloutSection
from posttrain.rollout.engine import Completion
from tests.rollout.tiny import Tiny


@pytest.fixture(scope="module")
def policy() -> PolicyForCausalLM:
    """Four layers with experts."""
    return Tiny.policy(2, num_hidden_layers=5)


@pytest.fixture(scope="module")
def saved(policy: PolicyForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mismatch") / "checkpoint"
    save(policy, None, folder)
    return folder


def test_scores_are_those_of_each_sequence_alone(policy: PolicyForCausalLM) -> None:
    """Padded and in batches, at a temperature; the record of the own choices changes nothing."""
    prompts = [[3] * n for n in range(1, 20)]
    completions = [
        Completion([4, 5, 6 + n % 3, 7][: 1 + n % 4], [0.0] * (1 + n % 4), "length", None)
        for n in range(19)
    ]
    completions = [
        Completion(c.token_ids, c.logprobs, "length", own_record(policy, p + c.token_ids))
        for p, c in zip(prompts, completions, strict=True)
    ]
    scorer = Scorer(policy, prompts, completions, 0.7, torch.float32)
    logps, _ = scorer.score(None)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            alone = (policy(input_ids=ids).logits[0] / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
        expected = alone.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(logps[row, : len(expected)], expected, atol=1e-5, rtol=0)
        assert int(scorer.mask_BC[row].sum()) == len(expected)
    assert torch.equal(scorer.score(scorer.record_BSLK)[0][scorer.mask_BC], logps[scorer.mask_BC])


def own_record(policy: PolicyForCausalLM, ids: list[int]) -> torch.Tensor:
    completion = Completion([ids[-1]], [0.0], "length", torch.zeros(len(ids) - 1, 4, 4).char())
    scorer = Scorer(policy, [ids[:-1]], [completion], 1.0, torch.float32)
    return scorer.score(None)[1][0, :-1]


def test_a_bfloat16_engine(policy: PolicyForCausalLM, saved: Path) -> None:
    """Replay takes away what other choices made; a record of other tokens makes it far worse."""
    settings = RolloutSection(max_model_len=96, kv_cache_memory_gib=0.1, dtype="bfloat16")
    prompts = Tiny.prompts(48)
    scorer = Scorer(policy, prompts, sampled(saved, settings, prompts, 32), 1.0, torch.float32)
    found = measure(scorer)
    gaps, layers = found.split.gaps(), found.layers
    assert torch.allclose(
        found.split.engine_N - found.split.own_N,
        found.split.precision_N + found.split.routing_N,
        atol=2e-6,  # float32 differences of log-probs of up to 10 nats
    )
    assert [layer.layer for layer in layers] == [1, 2, 3, 4]
    assert all(0.001 < layer.choices_differing < 0.1 for layer in layers)
    assert gaps["changed_without_replay"].tokens > 100
    assert gaps["changed_without_replay"].mean > 1.3 * gaps["changed_precision"].mean
    assert gaps["precision"].mean < gaps["without_replay"].mean
    assert found.shuffled.mean > 3 * gaps["without_replay"].mean
    assert all(layer.alone < 2 * gaps["routing"].mean for layer in layers)


def test_the_command(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a recipe, in the engine's own float32: nothing differs but rounding."""
    assert cli.main(["mismatch", str(saved), "--prompts", "4"]) == 0
    text = capfd.readouterr().out
    assert "engine float32, trainer float32" in text
    assert "0.00% of choices, 0.0% of tokens" in text
    assert "layer 4" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no checkpoint here"),
        (["{saved}", "rollout.dtype=float32"], "no recipe here to override"),
        (["{saved}", "--prompts", "0"], "must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_said(
    saved: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["mismatch", *(word.format(saved=saved) for word in words)]) == 2
    assert message in capfd.readouterr().err
