"""MBPP's reward: 1.0 when a completion's program passes all of its tests, else 0.0.

Each program runs in a Python process of its own: no environment, no input, an empty temporary folder, limits on CPU
time, memory, file size, open files and processes (root is exempt from the last), and a deadline after which its whole
process group is killed.

This keeps accidents in check, not attacks. It is no full sandbox: a program can still read files that this user can
read, reach the network, and find ways to look correct that its tests do not foresee. Run it where that does no harm.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)

# The limits are set inside the new process: a function run between fork and exec could hang a threaded trainer.
_HARNESS = """
import json, os, resource, sys

def main():
    limits, parts, word = json.load(sys.stdin)
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    verdict, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    names = {"__name__": "program"}
    for part in parts:
        exec(compile(part, "<program>", "exec"), names)
    os.write(verdict, word.encode())

main()
"""


def passes(
    completions: list[Any],
    test_list: list[list[str]],
    test_setup_code: list[str] | None = None,
    seconds: int = 6,
    **columns: Any,
) -> list[float]:
    """Return 1.0 for every completion whose program passes all tests of its row.

    The program is the last fenced code block, or the whole text where there is none. As in MBPP, it runs first, then
    `test_setup_code`, then the asserts, all of it within `seconds`, an option of the recipe.
    """
    setups = test_setup_code or [""] * len(completions)
    jobs = [
        [program(_text(completion)), setup or "", *tests]
        for completion, tests, setup in zip(completions, test_list, setups, strict=True)
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return [
            1.0 if passed else 0.0 for passed in pool.map(lambda job: _passed(job, seconds), jobs)
        ]


def program(text: str) -> str:
    """Return the last fenced block of a completion, or all of it.

    >>> program("Here:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


def _passed(parts: Sequence[str], seconds: int) -> bool:
    """Run the parts one after the other; what reaches the end says a word that only the harness knows."""
    limits = {
        "RLIMIT_CPU": seconds,
        "RLIMIT_AS": MEMORY_BYTES,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 64,
        "RLIMIT_CORE": 0,
    }
    # A program that leaves early with exit code 0 has not said the word.
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="mbpp-") as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _HARNESS],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(json.dumps([limits, parts, word]).encode(), timeout=seconds)
        finally:
            # Whatever the program started is in its group, also after it has ended itself.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return output.read(len(word) + 1) == word.encode()


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
