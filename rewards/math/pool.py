"""Comparisons of formulas, several at a time, in processes that are killed when they take too long."""

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
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from rewards.errors import RewardError

_KEEPER = Path(__file__).with_name("keeper.py")
_FOLDER = Path(__file__).parents[2]
START_SECONDS = 120.0
MEMORY_BYTES = 2 * 1024**3
# On a machine that is busy with other things, a comparison may wait for a processor this many times
# its limit. A reward should not depend on the neighbours.
PATIENCE = 10.0
# The replies to this many questions fit into a pipe, so that neither side waits for the other.
WINDOW = 1000
# More children than this would not help: comparisons keep a processor busy.
MOST_CHILDREN = 16


class Outcome(Enum):
    """What came of one question."""

    TRUE = "true"
    FALSE = "false"
    TIMEOUT = "timeout"  # a limit was reached: of time, memory, nesting, or the size of a number
    ERROR = "error"  # the comparison broke off


_OUTCOMES: dict[Any, Outcome] = {
    True: Outcome.TRUE,
    False: Outcome.FALSE,
    **dict.fromkeys(("timeout", "memory", "depth", "size"), Outcome.TIMEOUT),
}
# A gold and an answer; without an answer, whether the gold can be read.
Question = tuple[str, str | None]


class Pool:
    """Questions to a keeper process and its children, from any thread; one batch at a time.

    Time limits are seconds of processor time for each question, and at most PATIENCE times that by the
    clock. The keeper starts with the first question; after a fork the child starts its own.
    """

    def __init__(self, children: int | None = None) -> None:
        self.children = children or min(MOST_CHILDREN, _processors())
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._keeper: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] | None = None
        self._pid = os.getpid()

    def ask(self, questions: Sequence[Question], seconds: float) -> list[Outcome]:
        """The outcome of each question. Raises RewardError when no keeper can be started."""
        if self._pid != os.getpid():
            # After a fork the lock may be held by a thread that is not here, and the pipes are
            # the parent's.
            self._reset()
        if not questions:
            return []
        with self._lock:
            outcomes: dict[int, Outcome] = {}
            # If the keeper is killed, by the kernel for its memory, the rest gets a second chance.
            for _ in range(2):
                rest = [number for number in range(len(questions)) if number not in outcomes]
                if rest:
                    self._ask(questions, rest, seconds, outcomes)
            return [outcomes.get(number, Outcome.ERROR) for number in range(len(questions))]

    def close(self) -> None:
        """End the keeper and its children, if there are any."""
        with self._lock:
            self._kill()

    def _ask(
        self,
        questions: Sequence[Question],
        rest: list[int],
        seconds: float,
        outcomes: dict[int, Outcome],
    ) -> None:
        if self._keeper is None or self._keeper.poll() is not None:
            self._start()
        keeper = self._keeper
        assert keeper is not None
        assert keeper.stdin is not None
        try:
            # The keeper kills what is late. This is for a keeper that does not answer at all.
            replies = _replies(keeper, PATIENCE * seconds + START_SECONDS)
            for begin in range(0, len(rest), WINDOW):
                window = rest[begin : begin + WINDOW]
                lines = [json.dumps([number, *questions[number], seconds]) for number in window]
                keeper.stdin.write("".join(f"{line}\n" for line in lines).encode("ascii"))
                keeper.stdin.flush()
                for _, (number, outcome) in zip(window, replies, strict=False):
                    outcomes[number] = _OUTCOMES.get(outcome, Outcome.ERROR)
        except BaseException as error:
            # Also on an interrupt: a late reply must not meet the next question.
            self._kill()
            if not isinstance(error, OSError | EOFError):
                raise

    def _start(self) -> None:
        self._kill()
        # -P keeps this folder, which has a `math`, off the keeper's path; a session of its own
        # keeps the terminal's Ctrl-C from it.
        arguments = [str(_FOLDER), str(self.children), str(MEMORY_BYTES), str(PATIENCE)]
        keeper = subprocess.Popen(
            [sys.executable, "-P", str(_KEEPER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._keeper = keeper
        # Runs once: from _kill, when this object goes, or when Python ends.
        self._end = weakref.finalize(self, _end, keeper, self._pid)
        try:
            _, said = next(_replies(keeper, START_SECONDS))
        except (OSError, EOFError) as error:
            said = f"it did not start ({type(error).__name__})"
        if said != "ready":
            self._kill()
            raise RewardError(
                f"reward 'math' cannot compare formulas: {said}; is "
                "math-verify installed? (pip install math-verify==0.9.0)"
            )

    def _kill(self) -> None:
        if self._end is not None:
            self._end()
        self._keeper = self._end = None


def _processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _replies(keeper: subprocess.Popen[bytes], seconds: float) -> Iterator[tuple[Any, Any]]:
    """Replies as they come. Raises TimeoutError after `seconds` without one, EOFError at the end."""
    assert keeper.stdout is not None
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(keeper.stdout, selectors.EVENT_READ)
        while True:
            deadline = time.monotonic() + seconds
            if not selector.select(deadline - time.monotonic()):
                raise TimeoutError
            part = os.read(keeper.stdout.fileno(), 1 << 16)
            if not part:
                raise EOFError
            *lines, line = (line + part).split(b"\n")
            yield from map(json.loads, lines)


def _end(keeper: subprocess.Popen[bytes], owner: int) -> None:
    """Let go of `keeper`, which kills its children and ends, in the process that started it alone."""
    if os.getpid() != owner:
        return
    for pipe in (keeper.stdin, keeper.stdout):
        if pipe is not None:
            # What was still buffered for a dead process is lost.
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        keeper.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()


@functools.cache
def shared_pool() -> Pool:
    """The pool of this process, shared by every reward that compares formulas."""
    return Pool()
