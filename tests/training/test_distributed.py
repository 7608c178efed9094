"""Two processes under `accelerate launch` against one process with twice the batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def launch(stage: str, out: Path, processes: int, batch: int) -> list[dict[str, Any]]:
    """Run `distributed.py`; return what each process left."""
    out.mkdir()
    program = Path(__file__).with_name("distributed.py")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--num_processes", processes, "--num_machines", 1, "--mixed_precision", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    if processes > 1:
        # With --cpu alone accelerate starts a single process, whatever --num_processes says; this
        # is its way to torch's launcher, and needs no GPU.
        command.append("--multi_gpu")
    command += ["--dynamo_backend", "no", "--main_process_port", port]
    command += [program, stage, out, batch]
    result = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_two_processes_equal_one(tmp_path: Path, stage: str) -> None:
    """Loss per token of the whole step, summed loads, one bias update: nothing knows how many.

    In SFT the micro-batches of both processes have other token counts; in GRPO each process holds
    one of the two groups, with replay of an engine that took other experts.
    """
    (one,) = launch(stage, tmp_path / "one", 1, 8)
    two = launch(stage, tmp_path / "two", 2, 4)

    for step in range(2):
        for router, expected in enumerate(one["loads"][step]):
            parts = [rank["loads"][step][router] for rank in two]
            assert torch.equal(sum(parts), expected)
            assert all(part.sum() > 0 for part in parts)
    assert two[0]["state"].keys() == one["state"].keys()
    for name, tensor in one["state"].items():
        assert torch.equal(two[0]["state"][name], two[1]["state"][name]), name
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(two[0]["state"][name], tensor), name
        else:
            # Two SGD steps of 0.1 over gradients of norm 1 at most, with float32 rounding.
            torch.testing.assert_close(two[0]["state"][name], tensor, rtol=1e-5, atol=2e-6)
    mismatch = ["mismatch/precision_mean", "mismatch/routing_mean", "mismatch/choices_differing"]
    keys = {
        "sft": ["loss", "moe/max_violation"],
        "grpo": ["loss", "reward", "moe/max_violation", *mismatch],
    }
    for line, expected in zip(two[0]["lines"], one["lines"], strict=True):
        for key in keys[stage]:
            # Mean differences of log-probs of 6 nats are equal to float32 rounding of those.
            assert line[key] == pytest.approx(expected[key], rel=1e-4, abs=2e-6), key
