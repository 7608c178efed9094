"""What both trainers share: schedule, step checkpoints, saving, clipping, the metrics log."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from posttrain.policy import checkpoint
from posttrain.policy.model import PolicyForCausalLM
from posttrain.training import policy_trainer
from posttrain.training.callbacks import keep_lines
from posttrain.training.config import PolicyGRPOConfig, PolicySFTConfig
from posttrain.training.policy_trainer import (
    COMPLETE,
    last_step_checkpoint,
    multi_step_factor,
    write_json,
)

# step, factor: 100 steps, 10 of warm-up (arXiv 2401.02954, section 2.3)
SCHEDULE = [
    (0, 0.0),
    (1, 0.1),
    (9, 0.9),
    (10, 1.0),
    (79, 1.0),
    (80, 0.316),
    (89, 0.316),
    (90, 0.1),
    (99, 0.1),
]


@pytest.mark.parametrize(("step", "factor"), SCHEDULE)
def test_multi_step_table(step: int, factor: float) -> None:
    assert multi_step_factor(step, 10, 100) == pytest.approx(factor)


def test_multi_step_without_warmup_and_on_any_length() -> None:
    """Drops fall on the first step at or after 80% and 90%, as whole numbers say."""
    assert multi_step_factor(0, 0, 10) == 1.0
    for total in range(1, 400):
        for step in range(total):
            expected = 1.0 if 10 * step < 8 * total else 0.316 if 10 * step < 9 * total else 0.1
            assert multi_step_factor(step, 0, total) == expected


@pytest.mark.parametrize("config", [PolicySFTConfig, PolicyGRPOConfig])
def test_only_our_schedule_is_taken_from_transformers(config: Any, tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
    assert config(**fields, lr_scheduler_type="deepseek_multi_step").multi_step_schedule
    assert not config(**fields, lr_scheduler_type="cosine").multi_step_schedule
    with pytest.raises(ValueError, match="no_such_schedule"):
        config(**fields, lr_scheduler_type="no_such_schedule")


def test_the_trainer_follows_the_schedule(
    make_sft: Callable[..., Any],
    make_policy: Callable[..., PolicyForCausalLM],
    rows: Callable[[int], list[dict[str, Any]]],
) -> None:
    trainer, recorder = make_sft(
        make_policy(),
        rows(10),
        max_steps=10,
        per_device_train_batch_size=1,
        lr_scheduler_type="deepseek_multi_step",
        warmup_steps=2,
        learning_rate=0.01,
    )
    trainer.train()
    rates = [line["learning_rate"] for line in recorder.lines if "loss" in line]
    factors = [0.0, 0.5, 1, 1, 1, 1, 1, 1, 0.316, 0.1]
    assert rates == pytest.approx([0.01 * f for f in factors])


def test_an_older_step_goes_only_when_the_newer_is_whole(
    make_sft: Callable[..., Any],
    make_policy: Callable[..., PolicyForCausalLM],
    rows: Callable[[int], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With save_total_limit 1 there is a whole step checkpoint at every moment after the first."""
    seen = []

    def note(path: Path, content: Any) -> None:
        last = last_step_checkpoint(tmp_path / "steps")
        seen.append(last.name if last else None)
        write_json(path, content)

    monkeypatch.setattr(policy_trainer, "write_json", note)
    trainer, _ = make_sft(
        make_policy(),
        rows(4),
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
    )
    trainer.train()
    assert seen == [None, "checkpoint-1", "checkpoint-2"]
    assert [p.name for p in (tmp_path / "steps").glob("checkpoint-*")] == ["checkpoint-3"]
    assert trainer.args.save_total_limit == 1


def test_saved_models_are_stock_checkpoints_with_biases_and_modules(
    make_sft: Callable[..., Any],
    make_policy: Callable[..., PolicyForCausalLM],
    rows: Callable[[int], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """A step checkpoint and `save_model`: transformers loads the trunk, `load` the whole policy."""
    policy = make_policy()
    trainer, _ = make_sft(
        policy, rows(4), bias_update_rate=0.01, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    step = last_step_checkpoint(tmp_path / "steps")
    assert step == tmp_path / "steps" / "checkpoint-1"
    ids = torch.arange(5, 17).view(2, 6)
    policy.eval()
    expected = policy(input_ids=ids).logits
    for folder in (step, tmp_path / "final"):
        loaded = checkpoint.load(folder)
        assert all(
            torch.equal(tensor, loaded.state_dict()[name])
            for name, tensor in policy.state_dict().items()
        )
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert type(stock) is DeepseekV3ForCausalLM
        # The same float32 operations; transformers may choose another kernel for the experts.
        torch.testing.assert_close(stock(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert (folder / "chat_template.jinja").exists()


def test_last_step_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert last_step_checkpoint(tmp_path / "none") is None
    for step, whole in ((90, True), (100, True), (110, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            write_json(folder / COMPLETE, {"step": step})
    found = last_step_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-100", "by number, not by name"


def test_write_json_replaces_whole(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"a": [1, 2.5]})
    with pytest.raises(TypeError):
        write_json(file, {"b": object()})
    assert json.loads(file.read_text()) == {"a": [1, 2.5]}
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".json"] == ["summary.json"]


def test_keep_lines_drops_repeated_and_broken_ones(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    keep_lines(log, 3)
    assert not log.exists()
    lines = [json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (1, 2, 3, 3, 4, 5)]
    log.write_text("".join(lines) + '{"step": 2, "lo')
    keep_lines(log, 3)
    assert log.read_text() == "".join(lines[:4])


def test_max_violation_is_the_mean_over_trunk_layers(
    make_sft: Callable[..., Any],
    make_policy: Callable[..., PolicyForCausalLM],
    rows: Callable[[int], list[dict[str, Any]]],
) -> None:
    """Loads set by hand: (8 - 2) / 2 = 3 and (4 - 2) / 2 = 1 in the trunk; the module's apart."""
    policy = make_policy(num_hidden_layers=3)
    trainer, _ = make_sft(policy, rows(2))
    loads = ([8, 8, 0, 0, 0, 0, 0, 0], [4, 4, 2, 2, 2, 2, 0, 0], [16, 0, 0, 0, 0, 0, 0, 0])
    for router, load in zip(policy.model.routers, loads, strict=True):
        router.load_E = torch.tensor(load)
    trainer.update_balance()
    metrics = trainer._metrics["train"]
    assert metrics["moe/max_violation"] == [2.0]
    assert metrics["moe/max_violation/layer_1"] == [3.0]
    assert metrics["moe/max_violation/layer_2"] == [1.0]
    assert metrics["moe/max_violation/layer_3"] == [7.0]
