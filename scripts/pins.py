"""Resolve the whole environment to exact versions: requirements/cpu.txt and requirements/cuda.txt.

    make pins ARGS="..."          # ARGS: further options for `uv pip compile`, such as --upgrade

The sources are pyproject.toml and requirements/exclude*.txt. Needs `uv`, which set-up does not. The
CPU file needs the `+cpu` build of torch: name a folder that has its wheel in PIP_FIND_LINKS, or
pass `--torch-backend cpu` to look in PyTorch's own index.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MACHINES = ("x86_64", "aarch64")
PYTHONS = ("3.11", "3.12")
HEADS = {
    "cpu": "# Every package of the CPU environment, exactly. `make setup` installs this; `make pins` writes it.\n",
    "cuda": "# Every package of the CUDA environment, exactly. `make setup` installs this; `make pins` writes it.\n"
    "# Resolved, but not yet run on a GPU.\n"
    "# `===` keeps pip from taking a `+cpu` build of torch that it may have at hand.\n",
}


def resolve(device: str, options: list[str]) -> list[Requirement]:
    """Universal resolution of the project with one device's extra and the tools of `dev`."""
    environ = {k: v for k, v in os.environ.items() if k != "UV_FIND_LINKS"}
    if device == "cpu" and "PIP_FIND_LINKS" in os.environ:
        environ["UV_FIND_LINKS"] = os.environ["PIP_FIND_LINKS"].replace(" ", ",")
    command = ["uv", "pip", "compile", "pyproject.toml", "--extra", device, "--extra", "dev"]
    command += ["--universal", "--python-version", "3.11", "--override", "requirements/exclude.txt"]
    if device == "cpu":
        command += ["--override", "requirements/exclude-cpu.txt"]
    command += ["--no-annotate", "--no-header", "--quiet", *options]
    text = subprocess.run(
        command, cwd=ROOT, env=environ, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("-")]


def lines(requirements: list[Requirement]) -> list[str]:
    """One line a package and version, with the plainest condition on Python and machine.

    >>> lines([Requirement('six==1 ; python_version >= "3.12"'), Requirement("attrs==2")])
    ['attrs==2', 'six==1 ; python_version == "3.12"']
    """
    places = [(machine, python) for machine in MACHINES for python in PYTHONS]
    found: dict[str, set[tuple[str, str]]] = {}
    for requirement in requirements:
        for machine, python in places:
            environment = {
                "platform_machine": machine,
                "python_version": python,
                "python_full_version": f"{python}.0",
                "platform_system": "Linux",
                "platform_python_implementation": "CPython",
                "implementation_name": "cpython",
                "sys_platform": "linux",
                "os_name": "posix",
            }
            if requirement.marker is None or requirement.marker.evaluate(environment):
                pin = f"{requirement.name}{requirement.specifier}"
                found.setdefault(pin, set()).add((machine, python))
    return sorted(pin + condition(where, places) for pin, where in found.items())


def condition(where: set[tuple[str, str]], places: list[tuple[str, str]]) -> str:
    """Marker that holds in exactly these of all places; only whole rows or columns can be said."""
    if where == set(places):
        return ""
    for axis, name in ((0, "platform_machine"), (1, "python_version")):
        values = {place[axis] for place in where}
        if where == {place for place in places if place[axis] in values}:
            return " ; " + " or ".join(f'{name} == "{value}"' for value in sorted(values))
    return " ; " + " or ".join(
        f'platform_machine == "{machine}" and python_version == "{python}"'
        for machine, python in sorted(where)
    )


def main(options: list[str]) -> int:
    """Write both files whole; 2 when `uv` is missing, 1 when the CPU build of torch is."""
    if shutil.which("uv") is None:
        print("pins: `uv` is not on the PATH. Remedy: pip install uv", file=sys.stderr)
        return 2
    for device, head in HEADS.items():
        pins = lines(resolve(device, options))
        torch = next(pin for pin in pins if pin.startswith("torch=="))
        if device == "cpu" and "+cpu" not in torch:
            print(f"pins: resolved to {torch}, not to a +cpu build; see the head of this script")
            return 1
        if device == "cuda":
            pins[pins.index(torch)] = torch.replace("==", "===")
        target = ROOT / "requirements" / f"{device}.txt"
        whole = target.with_suffix(".new")
        whole.write_text(head + "\n".join(pins) + "\n")
        os.replace(whole, target)
        print(f"{target.relative_to(ROOT)}: {len(pins)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
