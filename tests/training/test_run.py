"""A whole run with the real engine: SFT, GRPO stopped by a signal, and the rest of it resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.policy import checkpoint
from posttrain.recipe import (
    DataSection,
    DataSource,
    EvalSection,
    PolicySection,
    Recipe,
    RewardSection,
    RolloutSection,
)
from posttrain.training import grpo
from posttrain.training.policy_trainer import last_step_checkpoint
from posttrain.training.stage import SUMMARY_KEYS
from tests.training.conftest import POLICY, TOKENIZER

ROOT = Path(__file__).parents[2]
COMMON: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
    "bias_update_rate": 0.01,
    "logging_steps": 1,
}


def recipe_of(folder: Path, grpo_steps: int) -> Recipe:
    script = str(ROOT / "data/arithmetic/problems.py")
    return Recipe(
        name="tiny",
        output_root=str(folder),
        policy=PolicySection(
            # Sizes that vLLM's kernels take.
            config=POLICY
            | {"qk_nope_head_dim": 24, "hidden_size": 64, "moe_intermediate_size": 32},
            tokenizer=str(TOKENIZER),
        ),
        data=DataSection(
            sft=DataSource(script=script, split="sft", size=24, role="sft"),
            train=DataSource(script=script, split="train", size=24, role="train"),
            eval=DataSource(script=script, split="eval", size=8, role="eval"),
        ),
        sft=COMMON | {"max_steps": 2, "per_device_train_batch_size": 2},
        grpo=COMMON
        | {
            "max_steps": grpo_steps,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
            "save_steps": 100_000,
        },
        rollout=RolloutSection(
            max_model_len=64, kv_cache_memory_gib=0.125, num_speculative_tokens=1, dtype="float32"
        ),
        rewards=[
            RewardSection("math"),
            RewardSection("tests.training.conftest:reward_digits", weight=0.1),
        ],
        eval=EvalSection(count=8, max_tokens=8),
    )


PROGRAM = """
import sys
from pathlib import Path
from posttrain import environment
environment.prepare()
from posttrain.training import grpo, sft
from tests.training.test_run import recipe_of
recipe = recipe_of(Path(sys.argv[1]), 100_000)
sft.run(recipe)
print(grpo.run(recipe)["status"])
"""


def value(summary: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        summary = summary[part]
    return summary


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_sft_then_grpo_stopped_and_resumed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "tiny/grpo"
    metrics = folder / "metrics.jsonl"
    started = time.monotonic()
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() - started < 900
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    assert output.splitlines()[-1] == "interrupted"
    last = last_step_checkpoint(folder / "steps")
    assert last is not None
    step = int(last.name.rpartition("-")[2])
    assert not (folder / "checkpoint").exists()

    summary = grpo.run(recipe_of(tmp_path, step + 2), resume=True)
    assert (summary["status"], summary["steps"]) == ("complete", step + 2)
    assert json.loads((folder / "summary.json").read_text()) == summary
    for key in ("stage", "wall_seconds", "peak_rss_gib", *SUMMARY_KEYS):
        assert value(summary, key) is not None, key
    assert summary["parity"]["max_abs_logprob_diff"] < 1e-4  # the gate's tolerance
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, step + 3))
    assert all("rollout/draft_acceptance" in line for line in lines if "loss" in line)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [s for s in range(step + 2) for _ in range(8)]
    assert samples[0].keys() >= {"prompt", "completion", "rewards", "advantage"}
    assert samples[0]["rewards"].keys() == {"math", "reward_digits"}

    start = checkpoint.load(tmp_path / "tiny/sft/checkpoint")
    end = checkpoint.load(folder / "checkpoint")
    for (name, before), (_, after) in zip(
        checkpoint.named_tensors(start), checkpoint.named_tensors(end), strict=True
    ):
        part = name.endswith(("e_score_correction_bias", "eh_proj.weight", "q_proj.weight"))
        assert not (part and torch.equal(before, after)), name
