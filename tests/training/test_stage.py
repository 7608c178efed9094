"""A stage's folder, its policy, its summary, and a run that is told to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import environment
from posttrain.policy import checkpoint
from posttrain.recipe import DataSection, DataSource, PolicySection, Recipe, RecipeError
from posttrain.rollout.launch import EngineError
from posttrain.tasks import TaskError
from posttrain.training import sft
from posttrain.training.policy_trainer import last_step_checkpoint
from posttrain.training.stage import Stage
from tests.training.conftest import POLICY, TOKENIZER

SCRIPT = """\
def rows(split, size, seed):
    return [
        {"prompt": f"{i} + {i}", "completion": f"#### {2 * i}", "answer": str(2 * i)}
        for i in range(size)
    ]
"""


def recipe_of(folder: Path, dtype: str = "float32", **fields: Any) -> Recipe:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return Recipe(
        name="tiny",
        output_root=str(folder),
        policy=PolicySection(config=POLICY, tokenizer=str(TOKENIZER), dtype=dtype),
        data=DataSection(sft=DataSource(script=str(script), split="sft", size=24)),
        sft={
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        | fields,
    )


def test_resuming_nothing_says_what_to_do(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="start without --resume"):
        Stage.start(recipe, "sft", resume=True)
    # One that was never finished is none.
    (tmp_path / "tiny/sft/steps/checkpoint-7").mkdir(parents=True)
    with pytest.raises(checkpoint.CheckpointError, match="no whole step checkpoint"):
        Stage.start(recipe, "sft", resume=True)


@pytest.mark.parametrize("finished", [True, False])
def test_a_new_run_starts_in_an_empty_folder_and_keeps_a_finished_one(
    tmp_path: Path, finished: bool
) -> None:
    recipe = recipe_of(tmp_path)
    folder = tmp_path / "tiny" / "sft"
    (folder / "steps/checkpoint-3").mkdir(parents=True)
    (folder / "steps/checkpoint-3/complete.json").write_text("{}")
    if finished:
        (folder / "checkpoint").mkdir()
    for log in ("metrics.jsonl", "samples.jsonl", "summary.json"):
        (folder / log).write_text('{"step": 1}\n')
    stage = Stage.start(recipe, "sft", resume=True)
    assert stage.resume_from == str(folder / "steps/checkpoint-3")
    assert (folder / "metrics.jsonl").exists()
    # What is at fault before training begins costs nothing that was there.
    recipe.data.sft = replace(recipe.data.sft, path="nofile.jsonl", script=None)
    with pytest.raises(TaskError):
        sft.run(recipe)
    assert (folder / "steps/checkpoint-3").exists()
    sft.run(recipe_of(tmp_path))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert next(json.loads(x)["step"] for x in lines if "loss" in x) == 1
    assert not (folder / "samples.jsonl").exists()
    assert not (folder / "steps/checkpoint-3").exists()
    assert "name: tiny" in (folder / "recipe.yaml").read_text()
    assert (folder.with_name("sft.1") / "steps/checkpoint-3").exists() == finished


def test_trls_refusals_name_the_section(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, max_length=8, eval_packing=True, save_strategy="best")
    with pytest.raises(RecipeError, match="tiny: sft: "):
        sft.run(recipe)


def test_the_policy_from_scratch_follows_the_seed(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    first, second = (Stage.start(recipe, "sft", resume=False).policy(None) for _ in range(2))
    recipe.seed += 1
    third = Stage.start(recipe, "sft", resume=False).policy(None)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)
    assert first.config.vocab_size == len(Stage.start(recipe, "sft", resume=False).tokenizer)


def test_a_resumed_policy_names_the_one_it_started_from(tmp_path: Path) -> None:
    """TRL loads the reference of the KL term by this name: not a step of the run itself."""
    recipe = recipe_of(tmp_path)
    stage = Stage.start(recipe, "grpo", resume=False)
    checkpoint.save(stage.policy(None), stage.tokenizer, tmp_path / "start")
    step = tmp_path / "tiny/grpo/steps/checkpoint-5"
    checkpoint.save(stage.policy(None), stage.tokenizer, step)
    (step / "complete.json").write_text("{}")
    resumed = Stage.start(recipe, "grpo", resume=True)
    assert resumed.resume_from == str(step)
    assert resumed.policy(tmp_path / "start").config.name_or_path == str(tmp_path / "start")


@pytest.mark.parametrize(("spread", "dtype"), [("", torch.float32), ("true", torch.bfloat16)])
def test_a_bfloat16_policy_trains_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: str, dtype: torch.dtype
) -> None:
    """From scratch and from a checkpoint; FSDP makes its own float32 of what it has spread."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", spread)
    stage = Stage.start(recipe_of(tmp_path, dtype="bfloat16"), "sft", resume=False)
    policy = stage.policy(None)
    checkpoint.save(policy, stage.tokenizer, tmp_path / "saved")
    for some in (policy, stage.policy(tmp_path / "saved")):
        assert some.lm_head.weight.dtype == dtype
        for router in some.model.routers:
            assert router.e_score_correction_bias.dtype == torch.float32


def test_a_bfloat16_run_computes_and_saves_in_it(tmp_path: Path) -> None:
    """A rate of 1e-4 moves weights of 0.2 by less than bfloat16's 1/256: only float32 keeps it."""
    recipe = recipe_of(tmp_path, dtype="bfloat16", learning_rate=1e-4, save_steps=1)
    start = Stage.start(recipe, "sft", resume=False).policy(None).state_dict()
    sft.run(recipe)
    stored = {f: checkpoint.Shards(tmp_path / "tiny/sft" / f).headers for f in RESULTS}
    for name, header in stored["checkpoint"].items():
        bias = name.endswith("e_score_correction_bias")
        assert header.dtype == ("F32" if bias else "BF16"), name
        assert stored["steps/checkpoint-2"][name].dtype == "F32", name
    end = checkpoint.load(tmp_path / "tiny/sft/steps/checkpoint-2").state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    moved = (end[name] - start[name]).abs()
    assert (moved > 0).float().mean() > 0.9
    assert moved.max() < 1e-3


RESULTS = ("checkpoint", "steps/checkpoint-2")


def test_signals_go_back_to_their_owners_when_training_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    recipe = recipe_of(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        assert signal.getsignal(signal.SIGTERM) != before
        raise RuntimeError("the batch is bad")

    monkeypatch.setattr(sft.PolicySFTTrainer, "compute_loss", fail)
    with pytest.raises(RuntimeError, match="the batch is bad"):
        sft.run(recipe)
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_engine_that_could_not_run_the_policy_is_told_before_training(tmp_path: Path) -> None:
    """vLLM's attention on a CPU takes no heads of 8 + 8."""
    recipe = recipe_of(tmp_path)
    recipe.data.eval = recipe.data.sft
    if environment.on_cpu():
        with pytest.raises(EngineError, match="qk_nope_head_dim 8 \\+ qk_rope_head_dim 8 is 16"):
            sft.run(recipe)


def test_a_run_leaves_what_it_promises(tmp_path: Path) -> None:
    summary = sft.run(recipe_of(tmp_path, report_to=["tensorboard"]))
    folder = tmp_path / "tiny" / "sft"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["stage"] == "sft"
    assert summary["status"] == "complete"
    assert summary["steps"] == 2
    assert summary["wall_seconds"] > 0
    assert summary["train"]["tokens_per_second"] > 0
    assert summary["peak_rss_gib"] > 0
    assert summary["moe"]["max_violation"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert {"perplexity", "mtp/loss/0", "mtp/acceptance", "moe/max_violation"} <= lines[0].keys()
    assert any(folder.glob("tensorboard/**/events*"))
    assert (folder / "recipe.yaml").exists()
    policy = checkpoint.load(folder / "checkpoint")
    assert policy.config.num_nextn_predict_layers == 1


PROGRAM = """
import sys
from pathlib import Path
from posttrain import environment
environment.prepare()
from posttrain.training import sft
from tests.training.test_stage import recipe_of
print(sft.run(recipe_of(Path(sys.argv[1]), max_steps=100_000, save_steps=100_000))["status"])
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_a_whole_step_and_resumes(tmp_path: Path, number: int) -> None:
    """The running step ends, a whole checkpoint is written, and a resumption goes on from it."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "tiny/sft/metrics.jsonl"
    started = time.monotonic()
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() - started < 900
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert output.splitlines()[-1] == "interrupted"
    folder = tmp_path / "tiny" / "sft"
    last = last_step_checkpoint(folder / "steps")
    assert last is not None
    step = int(last.name.rpartition("-")[2])
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("interrupted", step)
    assert not (folder / "checkpoint").exists()

    summary = sft.run(recipe_of(tmp_path, max_steps=step + 2), resume=True)
    assert (summary["status"], summary["steps"]) == ("complete", step + 2)
    steps = [json.loads(x) for x in metrics.read_text().splitlines()]
    assert [x["step"] for x in steps if "loss" in x] == list(range(1, step + 3))
