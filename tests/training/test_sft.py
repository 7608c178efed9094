"""SFT through TRL's real path: what reaches which parameter, and what must not depend on batching."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from posttrain.policy.model import PolicyForCausalLM
from posttrain.policy.mtp import MTPRequest
from posttrain.recipe import DataSection, DataSource, PolicySection, Recipe
from posttrain.training import sft
from tests.training.conftest import POLICY

MakePolicy = Callable[..., PolicyForCausalLM]
MakeSFT = Callable[..., Any]
Rows = Callable[[int], list[dict[str, Any]]]


def is_module(name: str) -> bool:
    """Whether a parameter belongs to an MTP module: behind the two trunk layers."""
    return name.startswith(("model.layers.2.", "model.layers.3."))


def assert_same(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float, atol: float
) -> None:
    assert one.keys() == other.keys()
    for name in one:
        if one[name] is None or other[name] is None:
            assert one[name] is other[name], name
        else:
            torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol)


# The same token losses, divided by the same number, summed over batches of another shape: float32
# rounding of gradients of order 1e-2 to 1.
SUMMED = {"rtol": 1e-4, "atol": 2e-6}


def test_every_mtp_parameter_gets_a_gradient(
    make_sft: MakeSFT, make_policy: MakePolicy, rows: Rows
) -> None:
    """Through TRL's rebound forward, which withholds the labels from the policy."""
    policy = make_policy(num_nextn_predict_layers=2)
    trainer, recorder = make_sft(policy, rows(8), mtp_loss_weight=0.3)
    trainer.train()
    gradients = {n: g for n, g in recorder.gradients[0].items() if is_module(n)}
    assert len(gradients) == 2 * 17
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    assert {"mtp/loss/0", "mtp/loss/1", "mtp/acceptance"} <= recorder.lines[0].keys()


def test_weight_zero_leaves_the_modules_be(
    make_sft: MakeSFT, make_policy: MakePolicy, rows: Rows
) -> None:
    """No gradient, no weight decay, no bias update, no log line."""
    policy = make_policy()
    before = {n: t.clone() for n, t in policy.state_dict().items() if is_module(n)}
    trainer, recorder = make_sft(
        policy, rows(8), mtp_loss_weight=0.0, weight_decay=0.1, max_steps=2
    )
    trainer.train()
    assert all(g is None for n, g in recorder.gradients[0].items() if is_module(n))
    assert all(torch.equal(policy.state_dict()[n], t) for n, t in before.items())
    assert not any(key.startswith("mtp/") for key in recorder.lines[0])


def test_loss_is_main_plus_lambda_mtp_plus_alpha_balance(
    make_sft: MakeSFT, make_policy: MakePolicy, rows: Rows
) -> None:
    """Gradients of the trainer equal those of the sum written out (eq. 17-25)."""
    policy = make_policy(num_nextn_predict_layers=2)
    plain = copy.deepcopy(policy)
    fields = {"mtp_loss_weight": 0.3, "sequence_balance_weight": 0.05}
    trainer, recorder = make_sft(policy, rows(6), **fields)
    trainer.train()

    batch = next(iter(trainer.get_train_dataloader()))
    labels, mask = batch["labels"], batch["attention_mask"]
    items = int((labels[:, 1:] != -100).sum())
    plain.train()
    plain.model.wants_balance_loss = True
    hidden: list[torch.Tensor] = []
    for module in plain.model.mtp_modules:
        module.register_forward_hook(lambda *call: hidden.append(call[2]))
    plain.model.mtp_request = MTPRequest(labels)  # so that the modules run; its loss is not used
    logits = plain(input_ids=batch["input_ids"], attention_mask=mask).logits
    main = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    depths = [
        F.cross_entropy(
            plain.lm_head(h)[:, : -(k + 2)].flatten(0, 1),
            labels[:, k + 2 :].flatten(),
            reduction="sum",
        )
        for k, h in enumerate(hidden)
    ]
    loss = main / items + 0.3 / 2 * (depths[0] + depths[1]) / items
    loss = loss + 0.05 * plain.model.take_extras().balance_loss
    loss.backward()
    assert recorder.lines[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert recorder.lines[0]["perplexity"] == pytest.approx(math.exp(main.item() / items), rel=1e-5)
    assert_same(recorder.gradients[0], {n: p.grad for n, p in plain.named_parameters()}, **SUMMED)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_accumulation_equals_one_large_batch(
    make_sft: MakeSFT, make_policy: MakePolicy, rows: Rows, alpha: float
) -> None:
    """1 x 8 against 4 x 2: gradients, and biases after the step; documents of unequal length.

    The balance loss is a mean over documents, so it agrees where micro-batches have equally many.
    """
    results = []
    for size in (8, 2):
        policy = make_policy(num_nextn_predict_layers=2)
        trainer, recorder = make_sft(
            policy,
            rows(8),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            sequence_balance_weight=alpha,
            bias_update_rate=0.01,
        )
        trainer.train()
        biases = [r.e_score_correction_bias for r in policy.model.routers]
        results.append((recorder.gradients[0], biases, recorder.lines[0]))
    assert_same(results[0][0], results[1][0], **SUMMED)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(one, other)
    for key in ("loss", "perplexity", "moe/max_violation"):
        assert results[0][2][key] == pytest.approx(results[1][2][key], rel=1e-5), key


def test_packing_equals_no_packing(make_sft: MakeSFT, make_policy: MakePolicy, rows: Rows) -> None:
    """Documents of a packed row see nothing of each other: attention, MTP, balance, counts."""
    results = []
    for packing in (False, True):
        policy = make_policy(num_nextn_predict_layers=2)
        trainer, recorder = make_sft(
            policy,
            rows(8),
            packing=packing,
            max_length=64,
            sequence_balance_weight=0.1,
            bias_update_rate=0.01,
        )
        batches = list(trainer.get_train_dataloader())
        assert len(batches) == 1
        assert ("attention_mask" in batches[0]) != packing
        trainer.train()
        biases = [r.e_score_correction_bias for r in policy.model.routers]
        results.append((recorder.gradients[0], biases, recorder.lines[0]))
    assert_same(results[0][0], results[1][0], **SUMMED)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(one, other)
    assert results[0][2]["loss"] == pytest.approx(results[1][2]["loss"], rel=1e-5)


def test_loss_is_on_completions_only(
    make_sft: MakeSFT,
    make_policy: MakePolicy,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """What is scored is the assistant's message and the end of the text."""
    data = rows(6)
    trainer, _ = make_sft(make_policy(), data)
    scored = set()
    for batch in trainer.get_train_dataloader():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            assert torch.equal(ids[labels != -100], labels[labels != -100])
            scored.add(tokenizer.decode(labels[labels != -100]))
    assert scored == {row["completion"][0]["content"] + tokenizer.eos_token for row in data}


def test_balance_is_updated_once_an_optimizer_step(
    make_sft: MakeSFT, make_policy: MakePolicy, rows: Rows
) -> None:
    """Two steps of four micro-batches: each bias is 0.01 times a whole number from its start."""
    policy = make_policy()
    before = [r.e_score_correction_bias.clone() for r in policy.model.routers]
    trainer, recorder = make_sft(
        policy,
        rows(8),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=2,
        bias_update_rate=0.01,
    )
    trainer.train()
    for router, start in zip(policy.model.routers, before, strict=True):
        steps = (router.e_score_correction_bias - start) / 0.01
        # Float32 rounding of 0.1 + 0.01.
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert steps.abs().max() <= 2.001
        assert steps.abs().sum() > 0
        assert router.load_E is None
    violations = [line["moe/max_violation"] for line in recorder.lines if "loss" in line]
    assert len(violations) == 2
    assert all(v > 0 for v in violations)


def test_gradient_checkpointing_changes_nothing(
    make_sft: MakeSFT, make_policy: MakePolicy, rows: Rows
) -> None:
    results = []
    for recompute in (False, True):
        policy = make_policy()
        trainer, recorder = make_sft(
            policy, rows(4), gradient_checkpointing=recompute, bias_update_rate=0.01
        )
        trainer.train()
        biases = [r.e_score_correction_bias for r in policy.model.routers]
        results.append((recorder.gradients[0], biases))
    assert_same(results[0][0], results[1][0], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_evaluation_loss_counts_no_load(
    make_sft: MakeSFT, make_policy: MakePolicy, rows: Rows
) -> None:
    trainer, _ = make_sft(make_policy(), rows(4))
    trainer.train()
    held_out = Dataset.from_list(rows(3)).select_columns(["prompt", "completion"])
    metrics = trainer.evaluate(held_out)
    assert metrics["eval_loss"] > 0
    assert all(router.load_E is None for router in trainer.policy.model.routers)


# --- a stage, from a recipe


def recipe_of(folder: Path, policy: dict[str, Any], **fields: Any) -> Recipe:
    """A recipe of four small steps, on this folder's script of problems."""
    script = folder / "script.py"
    if not script.exists():
        script.write_text(
            "def rows(split, size, seed):\n"
            "    return [\n"
            '        {"prompt": f"{i} + {i}", "completion": f"#### {2 * i}", "answer": str(2 * i)}\n'
            "        for i in range(size)\n"
            "    ]\n"
        )
    return Recipe(
        name="tiny",
        output_root=str(folder),
        policy=PolicySection(
            config=policy, tokenizer=str(Path(__file__).parents[2] / "data/arithmetic/tokenizer")
        ),
        data=DataSection(
            sft=DataSource(script=str(script), split="sft", size=24, role="sft", where="")
        ),
        sft={
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "deepseek_multi_step",
            "warmup_steps": 1,
            "save_steps": 2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "bias_update_rate": 0.01,
        }
        | fields,
    )


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}


def same_state(one: Any, other: Any) -> bool:
    """Equality of nested state, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_state, one, other))
    return bool(one == other)


def test_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    """4 steps against 2 and a resumption: weights, biases, optimizer, schedule, data, log."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    sft.run(recipe_of(whole, POLICY))
    # Stopped after step 2, in the middle of writing step 4 and its log line.
    shutil.copytree(whole, cut)
    (cut / "tiny/sft/steps/checkpoint-4/complete.json").unlink()
    shutil.rmtree(cut / "tiny/sft/checkpoint")
    with (cut / "tiny/sft/metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    summary = sft.run(recipe_of(cut, POLICY), resume=True)
    assert (summary["status"], summary["steps"]) == ("complete", 4)

    for part in ("steps/checkpoint-4", "checkpoint"):
        tensors = [folder_tensors(f / "tiny" / "sft" / part) for f in (whole, cut)]
        assert any("e_score_correction_bias" in name for name in tensors[0])
        assert same_state(*tensors)
    for file in ("optimizer.pt", "scheduler.pt"):
        states = [
            torch.load(f / "tiny/sft/steps/checkpoint-4" / file, weights_only=False)
            for f in (whole, cut)
        ]
        assert same_state(*states), file
    logs = [
        [json.loads(line) for line in (f / "tiny/sft/metrics.jsonl").read_text().splitlines()]
        for f in (whole, cut)
    ]
    kept = [[line for line in log if "loss" in line] for log in logs]
    assert [line["step"] for line in kept[0]] == [line["step"] for line in kept[1]] == [1, 2, 3, 4]
    for one, other in zip(*kept, strict=True):
        for key in ("loss", "learning_rate", "mtp/loss/0", "moe/max_violation"):
            assert one[key] == other[key], (key, one["step"])
