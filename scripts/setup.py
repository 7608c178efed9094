"""Make .venv and install every pinned package into it. Standard library only; safe to repeat.

    python3 scripts/setup.py [--device auto|cpu|cuda] [--venv .venv]

The pins are complete, so pip resolves nothing: what vLLM would drag in and must not (torchvision,
torchaudio, torchcodec) stays out. A stamp in the environment records what was installed.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 11), (3, 12))
MACHINES = ("x86_64", "aarch64")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP = "posttrain.stamp"


def fail(message: str) -> NoReturn:
    """Print what is wrong and its remedy; exit 1."""
    print(f"setup: {message}", file=sys.stderr)
    sys.exit(1)


def suitable_python() -> None:
    """Return if this interpreter will do; else start again under one that does, or fail."""
    if sys.version_info[:2] in PYTHONS:
        return
    for major, minor in reversed(PYTHONS):
        other = shutil.which(f"python{major}.{minor}")
        if other and subprocess.run([other, "--version"], capture_output=True).returncode == 0:
            os.execv(other, [other, __file__, *sys.argv[1:]])
    fail(
        f"needs Python 3.11 or 3.12, this is {platform.python_version()} ({sys.executable}). "
        "Remedy: make setup PYTHON=/path/to/python3.12"
    )


def detect_device() -> str:
    """`cuda` where the NVIDIA driver lists a GPU, `cpu` otherwise."""
    sys.path.insert(0, str(ROOT))
    from posttrain import environment

    return "cuda" if environment.gpus() else "cpu"


def wanted_stamp(device: str) -> str:
    """What the environment is made of: device, Python, pins, project file and this script."""
    digest = hashlib.sha256()
    for name in (f"requirements/{device}.txt", "pyproject.toml", "scripts/setup.py"):
        digest.update((ROOT / name).read_bytes())
    return f"{device} python{sys.version_info[0]}.{sys.version_info[1]} {digest.hexdigest()}\n"


def pip(venv: Path, *arguments: str, silent: bool = False) -> bool:
    """Run the environment's `pip install`, errors only (or nothing); whether it succeeded.

    Byte code is left to the first import: compiling all 24,000 modules takes as long as the rest.
    """
    command = [str(venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command += ["install", "-qq", "--no-compile", *arguments]
    return subprocess.run(command, stderr=subprocess.DEVNULL if silent else None).returncode == 0


def install_torch_cpu(venv: Path, pin: str) -> None:
    """Install the CPU build of torch, else the default build with a notice, else fail.

    It may be at hand (a wheel folder, a mirror); if not, PyTorch's own index has it.
    """
    if pip(venv, "--no-deps", pin, silent=True):
        return
    print(f"setup: {pin} is not at hand; asking PyTorch's CPU index", flush=True)
    index = ("--index-url", TORCH_CPU_INDEX, "--retries", "1", "--timeout", "30")
    if pip(venv, "--no-deps", pin, *index, silent=True):
        return
    default = pin.replace("+cpu", "").replace("==", "===")
    print(
        f"setup: PyTorch's CPU index is out of reach. Installing the default build, {default}: it "
        "brings several GB of CUDA libraries that stay unused.\n"
        "       Remedy: put the +cpu wheel into a folder, name it in PIP_FIND_LINKS, repeat.",
        flush=True,
    )
    if not pip(venv, default):
        fail(f"no build of {pin} could be installed; see pip's message above")


def main() -> int:
    """Bring the environment up to date; 0 when it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    arguments = parser.parse_args()
    suitable_python()
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        fail(
            f"vLLM publishes no wheel for {sys.platform} on {platform.machine()}, only for Linux on "
            f"{' and '.join(MACHINES)}. Remedy: use a Linux machine or container"
        )
    device = detect_device() if arguments.device == "auto" else arguments.device
    venv: Path = arguments.venv.absolute()
    stamp = venv / STAMP
    wanted = wanted_stamp(device)
    present = stamp.read_text() if stamp.exists() else ""
    if present == wanted:
        os.utime(stamp)
        return 0

    started = time.monotonic()
    same_kind = present.split()[:2] == wanted.split()[:2]
    if not same_kind or not (venv / "bin/python").exists():
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)])
        if made.returncode != 0:
            fail("could not make the environment. Remedy on Debian: apt install python3-venv")
    stamp.unlink(missing_ok=True)

    pins = [
        line
        for line in (ROOT / f"requirements/{device}.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    print(f"setup: installing {len(pins)} packages for {device} into {venv.name}", flush=True)
    rest = venv / "pins.txt"
    if device == "cpu":
        torch = next(line for line in pins if line.startswith("torch=="))
        pins.remove(torch)
        install_torch_cpu(venv, torch)
    rest.write_text("\n".join(pins) + "\n")
    if not pip(venv, "--no-deps", "-r", str(rest)):
        fail("pip could not install the pinned packages; see its message above, then repeat")
    # The build back end is among the pins: without isolation nothing else is fetched.
    if not pip(venv, "--no-deps", "--no-build-isolation", "-e", str(ROOT)):
        fail("pip could not install the project itself; see its message above")
    stamp.write_text(wanted)
    print(f"setup: ready after {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
