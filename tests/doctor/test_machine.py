"""The facts are those of this machine."""

import os
from pathlib import Path

from posttrain.doctor.machine import Machine, usable_cores


def test_look() -> None:
    machine = Machine.look()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    # MemTotal leaves out what the kernel keeps for itself
    assert 0.9 * pages < machine.memory_gib <= pages
    assert 0 < machine.free_gib <= machine.memory_gib
    assert machine.packages["torch"].startswith("2.13.0")
    assert machine.packages["math-verify"]
    assert machine.is_root == (os.geteuid() == 0)


def test_a_quota_lowers_the_cores(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("max 100000\n")
    free = usable_cores(quota)
    assert free == len(os.sched_getaffinity(0))
    quota.write_text("100000 100000\n")
    assert usable_cores(quota) == 1
    quota.write_text("50000 100000\n")  # half a core still runs one thread
    assert usable_cores(quota) == 1
