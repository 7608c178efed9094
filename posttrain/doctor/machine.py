"""What this machine has, as far as a run depends on it. Standard library only; imports nothing heavy."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions, entry_points
from pathlib import Path

from posttrain import environment

GIB = 2**30
MATRIX_EXTENSIONS = {
    "AVX2": "avx2",
    "AVX512": "avx512f",
    "AVX512-BF16": "avx512_bf16",
    "AMX": "amx_tile",
    "NEON": "asimd",
    "BF16": "bf16",
}
"""Instruction sets that decide vLLM's and torch's kernels, by their name in /proc/cpuinfo."""


@dataclass(frozen=True)
class Machine:
    """Facts. packages: normalised name -> version; instructions: keys of MATRIX_EXTENSIONS."""

    processor: str
    architecture: str
    cores: int
    instructions: frozenset[str]
    memory_gib: float
    free_gib: float
    shm_gib: float
    gpus: tuple[str, ...]
    python: str
    packages: Mapping[str, str]
    plugins: frozenset[str]
    environ: Mapping[str, str]
    is_root: bool

    @classmethod
    def look(cls) -> "Machine":
        """Read them off /proc, the driver, and the installed packages."""
        cpu = _fields(Path("/proc/cpuinfo"))
        memory = _fields(Path("/proc/meminfo"))
        flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
        shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
        return cls(
            processor=cpu.get("model name", platform.processor() or "unknown processor"),
            architecture=platform.machine(),
            cores=usable_cores(),
            instructions=frozenset(n for n, flag in MATRIX_EXTENSIONS.items() if flag in flags),
            memory_gib=_kib(memory["MemTotal"]),
            free_gib=_kib(memory["MemAvailable"]),
            shm_gib=shm.f_bavail * shm.f_frsize / GIB if shm else 0.0,
            gpus=tuple(environment.gpus()),
            python=platform.python_version(),
            packages={normal(d.name): d.version for d in distributions()},
            plugins=frozenset(p.name for p in entry_points(group="vllm.general_plugins")),
            environ=dict(os.environ),
            is_root=os.geteuid() == 0,
        )


def normal(name: str) -> str:
    """Spell a package's name as requirement files do.

    >>> normal("Ruamel.YAML_x")
    'ruamel-yaml-x'
    """
    return name.lower().replace("_", "-").replace(".", "-")


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: its affinity, less where a container's quota allows less."""
    cores = len(os.sched_getaffinity(0))
    if quota.exists():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            cores = min(cores, max(1, round(int(allowed) / int(period))))
    return cores


def _fields(path: Path) -> dict[str, str]:
    """`name: value` lines; the first of several with one name, such as one processor of many."""
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _kib(text: str) -> float:
    return int(text.split()[0]) * 1024 / GIB
