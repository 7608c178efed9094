"""Routing replay through TRL: every pass gets its rows' record, and the mismatch falls into its parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.policy import checkpoint
from posttrain.policy.model import PolicyForCausalLM
from posttrain.rollout.engine import EngineError
from posttrain.training.replay import is_reference
from tests.training.conftest import StubEngine

MakePolicy = Callable[..., PolicyForCausalLM]
MakeGRPO = Callable[..., Any]
THREE_LAYERS = {"num_hidden_layers": 3}  # two with experts


def trained(
    make_grpo: MakeGRPO, policy: PolicyForCausalLM, eos: int, routing: str, **fields: Any
) -> tuple[dict[str, Tensor], Any, Any]:
    engine = StubEngine(policy, eos, routing=routing)
    trainer, recorder = make_grpo(policy, engine=engine, **fields)
    torch.manual_seed(1)
    trainer.train()
    return {n: t.clone() for n, t in policy.state_dict().items()}, trainer, recorder


@pytest.mark.parametrize("recompute", [False, True])
def test_replay_of_own_choices_trains_the_same_policy(
    make_grpo: MakeGRPO,
    make_policy: MakePolicy,
    tokenizer: PreTrainedTokenizerBase,
    recompute: bool,
) -> None:
    """Two steps of two micro-batches, with an engine that chooses as the trainer does: no bit differs."""
    fields = {"gradient_checkpointing": recompute, "bias_update_rate": 0.01}
    states = []
    for replay in ("off", "r2", "r3"):
        policy = make_policy(**THREE_LAYERS)
        state, _, recorder = trained(
            make_grpo, policy, tokenizer.eos_token_id, "own", replay=replay, **fields
        )
        states.append(state)
        assert recorder.lines[0]["mismatch/tokens_differing"] == 0
        assert recorder.lines[0]["mismatch/unrecorded"] == 0
    for other in states[1:]:
        for name, tensor in states[0].items():
            assert torch.equal(tensor, other[name]), name


class Watch:
    """Notes, for every row of every pass with gradients or without, the experts that were used."""

    def __init__(self, policy: PolicyForCausalLM) -> None:
        self.rows: dict[bool, list[tuple[tuple[int, ...], Tensor]]] = {True: [], False: []}
        self.chosen: list[Tensor] = []
        self.starts: set[int] = set()  # how far prompts are padded
        for router in policy.model.trunk_routers:
            router.register_forward_hook(lambda *call: self.chosen.append(call[2][2]))
        policy.model.register_forward_pre_hook(lambda *call: self.chosen.clear())
        policy.model.register_forward_hook(self.note, with_kwargs=True)

    def note(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if mask is None:  # the stub engine's own
            return
        used = torch.stack(self.chosen, dim=1).unflatten(0, tuple(ids.shape))
        for row, real, experts in zip(ids, mask.bool(), used, strict=True):
            self.rows[torch.is_grad_enabled()].append((tuple(row[real].tolist()), experts[real]))
            self.starts.add(int(real.int().argmax()))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_iterations": 2},
        {
            "gradient_accumulation_steps": 1,
            "steps_per_generation": 2,
            "gradient_checkpointing": True,
        },
        pytest.param(
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda fields: "-".join(fields),
)
@pytest.mark.parametrize("replay", ["r2", "r3"])
def test_every_row_is_computed_with_its_record(
    make_grpo: MakeGRPO,
    make_policy: MakePolicy,
    tokenizer: PreTrainedTokenizerBase,
    fields: dict[str, Any],
    replay: str,
) -> None:
    """However TRL shuffles, splits, pads and repeats a rollout batch, and after updates too."""
    policy = make_policy(**THREE_LAYERS)
    watch = Watch(policy)
    fields = {"max_steps": 2, "learning_rate": 0.02, "seed": 0} | fields
    _, trainer, _ = trained(
        make_grpo, policy, tokenizer.eos_token_id, "other", replay=replay, **fields
    )
    engines = trainer.engine.records
    records: dict[tuple[int, ...], list[Tensor]] = {}
    for ids, experts in watch.rows[False]:
        records.setdefault(ids, []).append(experts[:-1].sort(-1).values)
    differ = 0
    for ids, experts in watch.rows[True]:
        used = experts[:-1].sort(-1).values
        if replay == "r3":
            assert torch.equal(used, engines[ids].sort(-1).values)
        else:  # the old pass's, which is one of the two without gradients
            assert any(torch.equal(used, known) for known in records[ids])
            differ += int((used != engines[ids].sort(-1).values).sum())
    assert len(watch.rows[True]) >= 8
    assert len(watch.starts) > 1  # or the padding would not be tried
    assert (differ > 0) == (replay == "r2")


def test_the_mismatch_falls_into_its_parts(
    make_grpo: MakeGRPO, make_policy: MakePolicy, tokenizer: PreTrainedTokenizerBase
) -> None:
    """An engine 0.05 nats off that takes other experts: the one is precision, the other routing."""
    lines, scored = {}, {}
    for replay in ("off", "r2", "r3"):
        policy = make_policy(**THREE_LAYERS)
        engine = StubEngine(policy, tokenizer.eos_token_id, shift=0.05, routing="other")
        trainer, recorder = make_grpo(policy, engine=engine, replay=replay, max_steps=1)
        log_split = trainer.log_split
        trainer.log_split = lambda parts, records, name=replay, log=log_split: (
            scored.setdefault(name, parts),
            log(parts, records),
        )
        trainer.train()
        lines[replay] = recorder.lines[0]
    for replay, line in lines.items():
        parts = scored[replay]
        # Float32 log-probs of about 6 nats, padded otherwise than in the stub.
        torch.testing.assert_close(
            parts.precision_N, torch.full_like(parts.precision_N, 0.05), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            parts.engine_N - parts.own_N, parts.precision_N + parts.routing_N, atol=2e-6, rtol=0
        )
        assert line["mismatch/precision_mean"] == pytest.approx(0.05, abs=1e-5)
        assert line["mismatch/precision_k3"] == pytest.approx(0.0012294, abs=1e-6)
        assert line["mismatch/routing_mean"] > 0.01
        assert line["mismatch/staleness_max"] == pytest.approx(0, abs=1e-5)
        assert 0.3 < line["mismatch/choices_differing"] < 0.7
        assert {"mismatch/choices_differing/layer_1", "mismatch/choices_differing/layer_2"} < set(
            line
        )
        trained_on = "precision" if replay == "r3" else "without_replay"
        for name, key in (("mean", "logprob_diff_mean"), ("k3", "kl_k3")):
            whole = line[f"mismatch/{trained_on}_{name}"]
            assert line[f"mismatch/{key}"] == pytest.approx(
                whole, rel=0.2
            )  # means of micro-batches
        torch.testing.assert_close(parts.routing_N, scored["off"].routing_N, atol=1e-5, rtol=0)


def test_staleness_grows_with_updates_on_one_rollout(
    make_grpo: MakeGRPO, make_policy: MakePolicy, tokenizer: PreTrainedTokenizerBase
) -> None:
    fields = {"replay": "r3", "num_iterations": 2, "max_steps": 2, "learning_rate": 0.01}
    _, _, recorder = trained(make_grpo, make_policy(), tokenizer.eos_token_id, "other", **fields)
    fresh, stale = (line["mismatch/staleness_mean"] for line in recorder.lines[:2])
    assert fresh < 1e-5 < 1e-3 < stale
    assert "mismatch/precision_mean" in recorder.lines[0]
    assert "mismatch/precision_mean" not in recorder.lines[1]  # no rollout, nothing new to split


def test_without_the_split_one_pass_is_made(
    make_grpo: MakeGRPO, make_policy: MakePolicy, tokenizer: PreTrainedTokenizerBase
) -> None:
    for split, passes in ((False, 8), (True, 16)):  # rows without gradients, of eight completions
        policy = make_policy()
        watch = Watch(policy)
        fields = {"replay": "r3", "mismatch_split": split, "max_steps": 1}
        _, _, recorder = trained(make_grpo, policy, tokenizer.eos_token_id, "other", **fields)
        assert len(watch.rows[False]) == passes
        assert ("mismatch/routing_mean" in recorder.lines[0]) == split


def test_r3_needs_an_engine_that_records(make_grpo: MakeGRPO, make_policy: MakePolicy) -> None:
    trainer, _ = make_grpo(make_policy(), replay="r3")
    with pytest.raises(EngineError, match=r"grpo\.replay is r3"):
        trainer.train()


def test_the_reference_routes_itself(
    make_grpo: MakeGRPO,
    make_policy: MakePolicy,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """Its log-probs are the same whatever the policy replays."""
    seen = []
    checkpoint.save(make_policy(), tokenizer, tmp_path / "start")
    for replay in ("off", "r3"):
        policy = checkpoint.load(tmp_path / "start", attn_implementation="sdpa")
        engine = StubEngine(policy, tokenizer.eos_token_id, routing="other")
        trainer, _ = make_grpo(policy, engine=engine, replay=replay, beta=0.1, max_steps=1)
        torch.manual_seed(2)
        trainer.train()
        seen.append(torch.cat([b["ref_per_token_logps"] for b in trainer._buffered_inputs]))
        assert ("routed_experts" in trainer._buffered_inputs[0]) == (replay == "r3")
    assert torch.equal(*seen)


def test_a_policy_without_its_adapters_is_the_reference(make_policy: MakePolicy) -> None:
    policy = make_policy()
    assert not is_reference(policy, None)
    assert is_reference(policy, policy)
    model = get_peft_model(policy, LoraConfig(target_modules=["o_proj"]))
    assert not is_reference(model, None)
    with model.disable_adapter():
        assert is_reference(model, None)
    model.add_adapter("ref", LoraConfig(target_modules=["o_proj"]))
    assert not is_reference(model, None)
    model.set_adapter("ref")
    assert is_reference(model, None)


@pytest.mark.parametrize(("bias", "moves"), [("frozen", False), ("update", True)])
def test_router_bias_frozen_or_updated(
    make_grpo: MakeGRPO, make_policy: MakePolicy, bias: str, moves: bool
) -> None:
    """The load is measured in both, and the engine is sent the biases before every rollout."""
    policy = make_policy()
    before = [r.e_score_correction_bias.clone() for r in policy.model.routers]
    trainer, recorder = make_grpo(policy, router_bias=bias, bias_update_rate=0.01)
    sent: list[list[Tensor]] = []
    name = "e_score_correction_bias"
    trainer.engine.sync = lambda tensors: sent.append(
        [t.clone() for n, t in tensors if n.endswith(name)]
    )
    trainer.train()
    for router, start, first, second in zip(policy.model.routers, before, *sent, strict=True):
        assert torch.equal(first, start)
        assert torch.equal(router.e_score_correction_bias, start) != moves
        assert torch.equal(second, start) != moves
    assert all(line["moe/max_violation"] > 0 for line in recorder.lines[:2])


def test_router_entropy_is_rewarded_at_its_weight(
    make_grpo: MakeGRPO, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is less by weight * entropy; with a large weight the routers level out."""
    entropies = {}
    for weight in (0.0, 1e-9, 50.0):
        policy = make_policy(initializer_range=1.0)
        fields = {"router_entropy_weight": weight, "max_steps": 3, "learning_rate": 0.04}
        trainer, recorder = make_grpo(policy, mtp_loss_weight=0.0, **fields)
        added: list[tuple[float, float]] = []
        monkeypatch.setattr(trainer, "add_extras", watched(trainer, added))
        trainer.train()
        for less, entropy in added:
            assert less == pytest.approx(weight * entropy, rel=1e-4, abs=1e-6)
        logged = [line.get("moe/router_entropy") for line in recorder.lines[:3]]
        entropies[weight] = logged
    assert entropies[0.0] == [None] * 3
    assert entropies[50.0][0] == pytest.approx(entropies[1e-9][0], rel=1e-5)
    assert entropies[50.0][-1] > entropies[1e-9][-1] + 0.05


def watched(trainer: Any, added: list[tuple[float, float]]) -> Callable[..., Tensor]:
    """`add_extras` that notes by how much it lowers the loss, and a micro-batch's share of entropy."""
    add_extras = trainer.add_extras

    def watch(loss: Tensor, **how: Any) -> Tensor:
        entropy = trainer.policy.model.extras.router_entropy
        total = add_extras(loss, **how)
        if entropy is not None:
            added.append(((loss - total).item(), entropy.item() / how["accumulation"]))
        return total

    return watch


def test_r3_does_not_depend_on_the_old_pass(
    make_grpo: MakeGRPO, make_policy: MakePolicy, tokenizer: PreTrainedTokenizerBase
) -> None:
    """TRL makes none where its correction is off and every rollout serves one update."""
    policy = make_policy()
    watch = Watch(policy)
    fields = {"vllm_importance_sampling_correction": False, "replay": "r3", "max_steps": 1}
    _, trainer, _ = trained(make_grpo, policy, tokenizer.eos_token_id, "other", **fields)
    assert watch.rows[False] == []
    for ids, experts in watch.rows[True]:
        expected = trainer.engine.records[ids].sort(-1).values
        assert torch.equal(experts[:-1].sort(-1).values, expected)
    assert len(watch.rows[True]) == 8
