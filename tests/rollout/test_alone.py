"""Sizes and process counts that need processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("alone.py")
ROOT = Path(__file__).parents[2]


def start(check: str, folder: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), check, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_released_latent_size_runs_on_the_mla_kernel(tmp_path: Path) -> None:
    output, _ = start("latent", tmp_path / "checkpoint").communicate(timeout=280)
    assert output.rstrip().endswith("passed"), output


@pytest.mark.slow
@pytest.mark.parametrize("check", ["sharded", "split"])
def test_two_processes(tmp_path: Path, check: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        start(check, tmp_path / "checkpoint", RANK=str(r), LOCAL_RANK=str(r), **group)
        for r in range(2)
    ]
    outputs = [process.communicate(timeout=280)[0] for process in processes]
    for output in outputs:
        assert output.rstrip().endswith("passed"), "\n".join(outputs)
