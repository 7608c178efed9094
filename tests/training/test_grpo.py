"""GRPO: what the MTP loss may and may not touch, what is sent, counted, logged and resumed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.policy import checkpoint
from posttrain.policy.model import PolicyForCausalLM
from posttrain.policy.mtp import MTPRequest
from tests.training.conftest import StubEngine, problems, reward_digits

MakePolicy = Callable[..., PolicyForCausalLM]
MakeGRPO = Callable[..., Any]


def is_module(name: str) -> bool:
    """Whether a tensor belongs to an MTP module: behind the two trunk layers."""
    return name.startswith(("model.layers.2.", "model.layers.3."))


def trunk_of(policy: PolicyForCausalLM) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in policy.state_dict().items() if not is_module(n)}


def test_trunk_updates_are_bit_identical_with_mtp_on_and_off(
    make_grpo: MakeGRPO, make_policy: MakePolicy
) -> None:
    """After two steps with clipping; modules get a gradient, and nothing else feels it."""
    runs = {}
    for weight in (0.0, 0.1):
        policy = make_policy(num_nextn_predict_layers=2)
        before = {n: t.clone() for n, t in policy.state_dict().items()}
        trainer, recorder = make_grpo(policy, mtp_loss_weight=weight, bias_update_rate=0.01)
        trainer.train()
        runs[weight] = (trunk_of(policy), recorder, policy, before)
    for name, tensor in runs[0.0][0].items():
        assert torch.equal(tensor, runs[0.1][0][name]), name
        assert not torch.equal(tensor, runs[0.0][3][name]), name
    for off, on in zip(runs[0.0][1].gradients, runs[0.1][1].gradients, strict=True):
        for name, gradient in on.items():
            if is_module(name):
                assert off[name] is None
                assert gradient is not None, name
                assert gradient.abs().sum() > 0, name
            else:
                assert torch.equal(gradient, off[name]), name
    for weight, moves in ((0.0, False), (0.1, True)):
        _, _, policy, before = runs[weight]
        for name, tensor in policy.state_dict().items():
            if is_module(name):
                assert torch.equal(tensor, before[name]) != moves, name


def test_modules_and_trunk_are_clipped_apart(make_grpo: MakeGRPO, make_policy: MakePolicy) -> None:
    policy = make_policy()
    fields = {"mtp_loss_weight": 5.0, "mtp_max_grad_norm": 0.01, "max_grad_norm": 0.02}
    trainer, recorder = make_grpo(policy, **fields)
    trainer.train()
    for gradients in recorder.gradients:
        for is_one, limit in ((is_module, 0.01), (lambda n: not is_module(n), 0.02)):
            norm = torch.stack([g.norm() for n, g in gradients.items() if is_one(n)]).norm()
            assert norm.item() == pytest.approx(limit, rel=1e-3)
    logged = [line for line in recorder.lines if "mtp/grad_norm" in line]
    assert len(logged) == 2
    assert all(line["mtp/grad_norm"] > 0.01 for line in logged)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_mtp_loss_is_on_completions_only(
    make_grpo: MakeGRPO, make_policy: MakePolicy, accumulation: int
) -> None:
    """Against plain loops over each row: targets are completion tokens, the context is whole.

    The gradient is weight * sum / (tokens of an optimizer step), as TRL's dapo loss is divided:
    of two steps a generation, an accumulation of 2 takes all tokens, one of 1 takes half.
    """
    policy = make_policy()
    plain = copy.deepcopy(policy)
    ours, _ = make_grpo(policy, mtp_loss_weight=0.7)
    rows = [row for row in problems(2) for _ in range(4)]
    inputs = [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]
    ours.model.train()
    ours.current_gradient_accumulation_steps = accumulation
    batch = ours._generate_and_score_completions(inputs)
    ours._compute_loss(ours.model, batch).backward()

    total, count = torch.zeros(()), 0
    plain.eval()
    hidden: list[Tensor] = []
    plain.model.mtp_modules[0].register_forward_hook(lambda *call: hidden.append(call[2]))
    for i in range(8):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        ids = torch.cat([prompt, completion])
        hidden.clear()
        plain.model.mtp_request = MTPRequest(ids.unsqueeze(0))
        plain(input_ids=ids.unsqueeze(0))
        plain.model.take_extras()
        logits = plain.lm_head(hidden[0][0])
        first = max(len(prompt), 2)
        total = total + F.cross_entropy(logits[first - 2 : -2], ids[first:], reduction="sum")
        count += len(ids) - first
    assert ours._metrics["train"]["mtp/loss/0"][0] == pytest.approx(
        (total / count).item(), rel=1e-4
    )
    (0.7 * total / (int(batch["num_items_in_batch"]) * accumulation / 2)).backward()
    for name, parameter in plain.named_parameters():
        if is_module(name):
            torch.testing.assert_close(
                policy.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-6
            )


def test_accumulation_equals_one_large_batch(make_grpo: MakeGRPO, make_policy: MakePolicy) -> None:
    """1 x 8 against 2 x 4 against 8 x 1: gradients of trunk and modules, biases; balance terms too."""
    results = []
    for size in (8, 4, 1):
        policy = make_policy(num_nextn_predict_layers=2)
        trainer, recorder = make_grpo(
            policy,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=1,
            max_grad_norm=1e9,
            mtp_max_grad_norm=1e9,
            bias_update_rate=0.01,
            sequence_balance_weight=0.1,
            router_entropy_weight=0.1,
        )
        trainer.train()
        biases = [r.e_score_correction_bias for r in policy.model.routers]
        results.append((recorder.gradients[0], biases))
    for gradients, biases in results[1:]:
        for name, gradient in gradients.items():
            # The same sums in other orders and paddings, of order 0.1.
            torch.testing.assert_close(gradient, results[0][0][name], rtol=1e-3, atol=1e-5)
        for one, other in zip(biases, results[0][1], strict=True):
            assert torch.equal(one, other)


def test_load_is_counted_in_the_loss_pass_only(
    make_grpo: MakeGRPO, make_policy: MakePolicy
) -> None:
    """Rollouts, old log-probs and the reference run the same policy, and do not count."""
    policy = make_policy()
    ours, _ = make_grpo(policy)
    rows = [row for row in problems(2) for _ in range(4)]
    inputs = [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]
    ours.model.train()
    ours.current_gradient_accumulation_steps = 1
    batch = ours._generate_and_score_completions(inputs)
    assert all(router.load_E is None for router in policy.model.routers)
    ours._compute_loss(ours.model, batch)
    real = int(batch["prompt_mask"].sum() + batch["completion_mask"].sum())
    assert [int(r.load_E.sum()) for r in policy.model.routers] == [2 * real, 2 * (real - 8)]


def test_requests_have_seeds_of_their_own(make_grpo: MakeGRPO, make_policy: MakePolicy) -> None:
    """Different for every prompt, sample and step; the same in a second run."""
    runs = []
    for _ in range(2):
        trainer, _ = make_grpo(make_policy())
        trainer.train()
        runs.append(trainer.engine.seeds)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == len(runs[0]) == 16


def test_weights_are_sent_once_an_update(make_grpo: MakeGRPO, make_policy: MakePolicy) -> None:
    """Everything that a checkpoint holds, biases and modules included, before each rollout."""
    policy = make_policy()
    trainer, _ = make_grpo(policy)
    sent = []
    engine_sync = trainer.engine.sync
    trainer.engine.sync = lambda tensors: sent.append(engine_sync(tensors))
    trainer.train()
    assert len(sent) == 2
    names = set(trainer.engine.synced)
    assert names == {name for name, _ in checkpoint.named_tensors(policy)}
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names
    assert "model.layers.2.shared_head.norm.weight" in names


def test_samples_hold_what_was_scored(
    make_grpo: MakeGRPO, make_policy: MakePolicy, tmp_path: Path
) -> None:
    trainer, recorder = make_grpo(make_policy())
    trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * 8 + [1] * 8
    for line in lines:
        assert line["prompt"][0]["role"] == "user"
        assert reward_digits([line["completion"]]) == [line["rewards"]["reward_digits"]]
    for start in range(0, 16, 4):
        group = lines[start : start + 4]
        total = torch.tensor(
            [x["rewards"]["reward_digits"] + 0.5 * x["rewards"]["reward_length"] for x in group]
        )
        expected = (total - total.mean()) / (total.std() + 1e-4)
        assert [x["advantage"] for x in group] == pytest.approx(expected.tolist(), abs=1e-4)
    assert {
        "reward",
        "rewards/reward_digits/mean",
        "mismatch/logprob_diff_max",
        "mismatch/kl_k3",
        "moe/max_violation",
        "mtp/loss/0",
        "mtp/acceptance",
        "parity/max_abs_logprob_diff",
        "time/rollout",
        "time/sync",
        "time/reward",
        "rollout/tokens_per_second",
    } <= recorder.lines[0].keys()


@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_mismatch_is_that_of_the_engine(
    make_grpo: MakeGRPO,
    make_policy: MakePolicy,
    tokenizer: PreTrainedTokenizerBase,
    shift: float,
) -> None:
    """An engine whose log-probs are all 0.05 too high: |d| = 0.05, k3 = exp(-0.05) - 1 + 0.05."""
    policy = make_policy()
    engine = StubEngine(policy, tokenizer.eos_token_id, shift)
    trainer, recorder = make_grpo(policy, engine=engine, max_steps=1, temperature=0.8)
    trainer.train()
    line = recorder.lines[0]
    # Float32 log-probs of about 6 nats.
    assert line["mismatch/logprob_diff_mean"] == pytest.approx(shift, abs=1e-5)
    assert line["mismatch/logprob_diff_max"] == pytest.approx(shift, abs=1e-5)
    assert line["mismatch/kl_k3"] == pytest.approx(0.0012294 if shift else 0.0, abs=1e-6)


def test_resumed_training_is_bit_identical(
    make_grpo: MakeGRPO, make_policy: MakePolicy, tmp_path: Path
) -> None:
    """Three steps against one and a resumption: the same requests, weights, biases, optimizer."""
    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "bias_update_rate": 0.01}
    whole, _ = make_grpo(make_policy(), **fields)
    whole.train()
    steps = tmp_path / "steps"
    expected = {n: t.clone() for n, t in whole.policy.state_dict().items()}
    optimizer = torch.load(steps / "checkpoint-3" / "optimizer.pt", weights_only=False)

    torch.manual_seed(123)  # what the resumed process would have drawn by then
    policy = checkpoint.load(steps / "checkpoint-1", attn_implementation="sdpa")
    policy.set_experts_implementation("eager")
    resumed, _ = make_grpo(policy, **fields)
    resumed._step = resumed.args.gradient_accumulation_steps  # as `run` sets it
    resumed.train(resume_from_checkpoint=str(steps / "checkpoint-1"))
    assert resumed.engine.seeds == whole.engine.seeds[8:]
    for name, tensor in expected.items():
        assert torch.equal(policy.state_dict()[name], tensor), name
    again = torch.load(steps / "checkpoint-3" / "optimizer.pt", weights_only=False)
    for one, other in zip(optimizer["state"].values(), again["state"].values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
