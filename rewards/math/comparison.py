"""Algebra with a time limit: a worker process that is killed and started again when it hangs."""

import contextlib
import functools
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewards.errors import RewardError

_WORKER = Path(__file__).with_name("worker.py")
START_SECONDS = 120.0
# On a machine that is busy with other things, the worker may wait for a processor this many times
# its limit. A reward should not depend on the neighbours.
PATIENCE = 10


class ComparisonTimeoutError(Exception):
    """The comparison took longer than its time limit."""


class ComparisonFailedError(Exception):
    """The worker could not answer: it ran out of memory, of stack, or died."""


class Algebra:
    """Questions to one worker process, from any thread; one at a time.

    Time limits are seconds of the worker's processor time, and at most PATIENCE times that by the
    clock. The process starts with the first question, and after a fork the child starts its own.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] | None = None
        self._pid = os.getpid()

    def readable(self, gold: str, seconds: float) -> bool:
        """Whether `gold`, as LaTeX, is a formula. Raises as `equal` does."""
        return self._ask(gold, None, seconds)

    def equal(self, gold: str, answer: str, seconds: float) -> bool:
        """Whether two formulas in LaTeX are equal.

        Raises ComparisonTimeoutError after `seconds`, ComparisonFailedError when the worker fails
        on this pair, RewardError when no worker can be started.
        """
        return self._ask(gold, answer, seconds)

    def close(self) -> None:
        """End the worker process, if there is one."""
        with self._lock:
            self._kill()

    def _ask(self, gold: str, answer: str | None, seconds: float) -> bool:
        if self._pid != os.getpid():
            # After a fork the lock may be held by a thread that is not here, and the pipes are
            # the parent's.
            self._reset()
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            process = self._process
            assert process is not None
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, answer, seconds]).encode() + b"\n")
                process.stdin.flush()
                reply = self._reply(process, seconds)
            except BaseException as error:
                # Also on an interrupt: a late reply must not meet the next question.
                self._kill()
                if isinstance(error, OSError | EOFError):
                    raise ComparisonFailedError("the worker died") from None
                raise
            if "error" in reply:
                raise ComparisonFailedError(reply["error"])
            return bool(reply["result"])

    def _start(self) -> None:
        self._kill()
        # -P keeps this folder, which has a `math`, off the worker's path; a session of its own
        # keeps the terminal's Ctrl-C from it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Runs once: from _kill, when this object goes, or when Python ends.
        self._end = weakref.finalize(self, _end, self._process, self._pid)
        try:
            reply = self._reply(self._process, START_SECONDS)
        except (ComparisonTimeoutError, EOFError) as error:
            self._kill()
            reply = {"failed": f"it did not start ({type(error).__name__})"}
        if "failed" in reply:
            self._kill()
            raise RewardError(
                f"reward 'math' cannot compare formulas: {reply['failed']}; is "
                "math-verify installed? (pip install math-verify==0.9.0)"
            )

    @staticmethod
    def _reply(process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        assert process.stdout is not None
        deadline = time.monotonic() + PATIENCE * seconds
        processor_deadline = _processor_seconds(process.pid) + seconds
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = min(
                    deadline - time.monotonic(),
                    processor_deadline - _processor_seconds(process.pid),
                )
                if left <= 0:
                    raise ComparisonTimeoutError
                if not selector.select(left):
                    continue
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    raise EOFError
                line += part
        return json.loads(line)

    def _kill(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None


def _processor_seconds(pid: int) -> float:
    """Processor time that a process has used; where the system does not tell, the clock's time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    # Fields 14 and 15 of proc(5), user and system time; the first after the name is field 3.
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill and reap `process`, in the process that started it alone."""
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            # What was still buffered for the dead process is lost.
            with contextlib.suppress(OSError):
                pipe.close()


@functools.cache
def shared_algebra() -> Algebra:
    """The worker of this process, shared by every reward that compares formulas."""
    return Algebra()
