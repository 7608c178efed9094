"""One worker process as the trainer sees it: send a request, take the reply, or kill it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from rewards.processes.wire import HEADER, frame

_WORKER = Path(__file__).with_name("worker.py")
START_SECONDS = 120.0
MAX_REPLY = 64 * 2**20
_PART = 2**20


class ChildEndedError(Exception):
    """The process ended in the middle of its work; the text says how."""


class Child:
    """A fresh interpreter that has loaded one reward; it never blocks the caller.

    A fork of the trainer would copy its threads' locks and its CUDA state; this starts from nothing.
    """

    def __init__(self, hello: bytes) -> None:
        path = json.dumps(
            [entry or str(Path.cwd()) for entry in sys.path if isinstance(entry, str)]
        )
        # -P keeps the folder of the worker's file off its path; a session of its own keeps the
        # terminal's Ctrl-C from it, and makes it the leader of whatever it starts.
        process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self.stdin, self.stdout = process.stdin.fileno(), process.stdout.fileno()
        for pipe in (self.stdin, self.stdout):
            os.set_blocking(pipe, False)
        # Runs once: from `kill`, when this object goes, or when Python ends.
        self._end = weakref.finalize(self, _end, process, os.getpid())
        self._out = memoryview(path.encode() + b"\n" + frame(hello))
        self._in = bytearray()
        self.ready = False
        self.deadline = time.monotonic() + START_SECONDS

    def send(self, payload: bytes, seconds: float) -> None:
        """Begin a request whose reply is due in `seconds`."""
        self._out = memoryview(frame(payload))
        self._in.clear()
        self.deadline = time.monotonic() + seconds

    @property
    def sending(self) -> bool:
        """Whether a part of the request is still to be written."""
        return len(self._out) > 0

    def write(self) -> None:
        """Write as much of the request as goes through now."""
        try:
            self._out = self._out[os.write(self.stdin, self._out[:_PART]) :]
        except BlockingIOError:
            pass
        except OSError:
            # It has ended; reading will say so.
            self._out = self._out[:0]

    def read(self) -> dict[str, Any] | None:
        """The reply, once it is here whole; raises ChildEndedError when there will be none."""
        try:
            part = os.read(self.stdout, _PART)
        except BlockingIOError:
            return None
        if not part:
            raise ChildEndedError(self._ended())
        self._in += part
        if len(self._in) < HEADER.size:
            return None
        (size,) = HEADER.unpack_from(self._in)
        if size > MAX_REPLY:
            raise ChildEndedError(f"its reply has {size:,} bytes, more than {MAX_REPLY:,}")
        if len(self._in) < HEADER.size + size:
            return None
        reply: dict[str, Any] = json.loads(self._in[HEADER.size :])
        return reply

    def kill(self) -> None:
        """End the process and everything that it started."""
        self._end()

    def _ended(self) -> str:
        self._end()
        code = self._process.returncode
        if code is not None and code < 0 and code != -signal.SIGKILL:
            return f"its process was ended by {signal.Signals(-code).name}"
        return "its process ended"


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill and reap a process and its group, in the process that started it alone."""
    if os.getpid() != owner:
        return
    # Not reaped before this, so the number of the group is still its own.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            # What was still buffered for the dead process is lost.
            with contextlib.suppress(OSError):
                pipe.close()
