"""MBPP's reward runs programs: right ones pass, wrong, endless and evasive ones do not."""

import os
import time
from pathlib import Path

import pytest

import rewards

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def score(*completions: object, setup: str | None = None, seconds: int = 6) -> list[float | None]:
    reward = rewards.load(f"{ROOT}/recipes/rewards/mbpp.py:passes", seconds=seconds)
    many = len(completions)
    return list(
        reward(
            completions=list(completions),
            test_list=[TESTS] * many,
            test_setup_code=None if setup is None else [setup] * many,
        )
    )


def test_scores() -> None:
    right = "def add(a, b):\n    return a + b\n"
    assert score(
        f"Here it is:\n```python\n{right}```\nIt adds.",
        f"```\nold\n```\nbetter:\n```py\n{right}```",
        right,
        [{"role": "assistant", "content": f"```python\n{right}"}],
        right.replace("\n", "\r\n"),
        "def add(a, b):\n    return a - b\n",
        "def add(a, b) return a + b",
        "",
    ) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "program",
    ["raise SystemExit(0)", "import os\nos._exit(0)", "print(input())\nraise SystemExit",
     "import sys\nsys.stdout.write(sys.stdin.read())\nsys.exit(0)"],
)  # fmt: skip
def test_leaving_early_is_not_passing(program: str) -> None:
    assert score(program) == [0.0]


def test_setup_runs_after_the_program() -> None:
    assert score("def add(a, b):\n    return base + a + b", setup="base = 0") == [1.0]


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    right = "def add(a, b): return a + b\n"
    assert score(
        "x = 'a' * (1 << 40)",
        f"{right}open('big', 'wb').write(b'x' * (2 << 20))",
        f"{right}import os\nassert 'SECRET' not in os.environ and os.listdir('.') == []",
    ) == [0.0, 0.0, 1.0]


def test_the_deadline() -> None:
    started = time.monotonic()
    assert score("while True: pass", "import time\ntime.sleep(60)", seconds=1) == [0.0, 0.0]
    assert time.monotonic() - started < 15  # 1 s allowed; the rest is for a busy machine


def test_what_a_program_starts_is_ended_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    program = (
        f"import subprocess\nchild = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid))\nwhile True: pass"
    )
    assert score(program, seconds=2) == [0.0]
    stat = Path(f"/proc/{mark.read_text()}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(int(mark.read_text()), 9)
    pytest.fail("the program's child lived on")
