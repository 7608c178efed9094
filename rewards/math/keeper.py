"""The process beside the trainer that has formulas compared, in children that it can kill.

Run by path, by `rewards.math.pool`: `keeper.py FOLDER CHILDREN MEMORY PATIENCE`, with the folder that
holds the package `rewards`. One JSON question a line comes in, `[id, gold, answer, seconds]` (a null
answer asks only whether the gold can be read), and one JSON reply a line goes out, `[id, outcome]`.

The algebra is imported once, here; the children are forked from this process, which has a single
thread, in milliseconds. A child that takes too long is killed and replaced. All of them end when the
trainer does, however it ends: then the input ends, and a child also has a timer of its own.
"""

import contextlib
import json
import os
import resource
import selectors
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPARE_SECONDS = 1.0
# A child is replaced after this many questions, whatever the libraries have cached in it.
QUESTIONS = 5000
POLL_SECONDS = 0.05
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
WARM_UP = (
    (r"\frac{\sqrt{3}}{2}", r"\frac{3}{2\sqrt{3}}"),
    (r"2x^2-3x+\pi", r"x(2x-3)+\pi"),
    (r"\left(1, \frac{-7}{2}\right]", "(1, -3.5]"),
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        r"\begin{bmatrix} 1 & 2 \\ 3 & 5-1 \end{bmatrix}",
    ),
    ("y = 2x + 3", "2x - y = -3"),
    (r"3 + 4i, \sin 2", r"\sin 2, 4i + 3"),
)


@dataclass
class Child:
    """A forked process that answers one question at a time."""

    pid: int
    questions: int
    replies: int
    asked: int = 0
    busy_with: int | None = None
    deadline: float = 0.0
    processor_deadline: float = 0.0
    unread: bytes = b""


class Keeper:
    """Questions from stdin to idle children, their replies to stdout."""

    def __init__(self, children: int, memory: int, patience: float, judge: Any) -> None:
        self.count, self.memory, self.patience, self.judge = children, memory, patience, judge
        self.waiting: deque[tuple[int, str, str | None, float]] = deque()
        self.children: list[Child] = []
        self.selector = selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ)
        self.input = b""
        self.is_open = True

    def run(self) -> None:
        """Answer until the input ends, then leave nothing behind."""
        try:
            while self.is_open:
                self._ask_idle_children()
                for key, _ in self.selector.select(self._patience()):
                    if key.fd == 0:
                        self._read_questions()
                    else:
                        self._read_reply(key.data)
                self._kill_late_children()
        finally:
            for child in list(self.children):
                self._end(child)

    def _read_questions(self) -> None:
        part = os.read(0, 1 << 16)
        self.is_open = bool(part)
        *lines, self.input = (self.input + part).split(b"\n")
        self.waiting.extend(map(tuple, map(json.loads, lines)))

    def _ask_idle_children(self) -> None:
        while self.waiting:
            child = next((one for one in self.children if one.busy_with is None), None)
            if child is None:
                if len(self.children) >= self.count:
                    return
                child = self._fork()
            number, gold, answer, seconds = self.waiting.popleft()
            child.busy_with = number
            child.asked += 1
            child.deadline = time.monotonic() + self.patience * seconds
            child.processor_deadline = _processor_seconds(child.pid) + seconds
            # A child that has died shows when its pipe of replies is read.
            with contextlib.suppress(BrokenPipeError):
                os.write(child.questions, json.dumps([gold, answer, seconds]).encode() + b"\n")

    def _read_reply(self, child: Child) -> None:
        part = os.read(child.replies, 1 << 16)
        if not part:
            self._end(child)
            _reply(child.busy_with, "died")
            return
        child.unread += part
        if child.unread.endswith(b"\n"):
            outcome, child.unread = json.loads(child.unread), b""
            number, child.busy_with = child.busy_with, None
            if outcome == "memory" or child.asked >= QUESTIONS:
                self._end(child)
            _reply(number, outcome)

    def _patience(self) -> float | None:
        return POLL_SECONDS if any(one.busy_with is not None for one in self.children) else None

    def _kill_late_children(self) -> None:
        now = time.monotonic()
        for child in [one for one in self.children if one.busy_with is not None]:
            if now >= child.deadline or _processor_seconds(child.pid) >= child.processor_deadline:
                number = child.busy_with
                self._end(child)
                _reply(number, "timeout")

    def _fork(self) -> Child:
        question_reader, question_writer = os.pipe()
        reply_reader, reply_writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            # A child holds its own two pipes and nothing of its siblings' or the trainer's.
            inherited = [0, 1, question_writer, reply_reader]
            inherited += [fd for one in self.children for fd in (one.questions, one.replies)]
            for descriptor in inherited:
                os.close(descriptor)
            try:
                _answer(question_reader, reply_writer, self.memory, self.judge)
            finally:
                os._exit(0)
        os.close(question_reader)
        os.close(reply_writer)
        child = Child(pid, question_writer, reply_reader)
        self.children.append(child)
        self.selector.register(reply_reader, selectors.EVENT_READ, child)
        return child

    def _end(self, child: Child) -> None:
        self.children.remove(child)
        self.selector.unregister(child.replies)
        os.close(child.questions)
        os.close(child.replies)
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)


def _answer(questions: int, replies: int, memory: int, judge: Any) -> None:
    """In the child: one question after the other, until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    # Without a Python handler the timer's signal ends the process even inside a long C call.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with os.fdopen(questions, "rb") as lines:
        for line in lines:
            gold, answer, seconds = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, seconds + SPARE_SECONDS)
            try:
                outcome = judge(gold, answer)
            except MemoryError:
                outcome = "memory"
            except RecursionError:
                outcome = "depth"
            except Exception as error:
                outcome = type(error).__name__
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.write(replies, json.dumps(outcome).encode() + b"\n")


def _reply(number: int | None, outcome: Any) -> None:
    os.write(1, json.dumps([number, outcome]).encode() + b"\n")


def _processor_seconds(pid: int) -> float:
    """Processor time that a process has used; where the system does not tell, the clock's time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    # Fields 14 and 15 of proc(5), user and system time; the first after the name is field 3.
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def _judge(folder: str) -> Any:
    sys.path.append(folder)
    from rewards.math import algebra, judging
    from rewards.math.structure import TooDeepError

    def judge(gold: str, answer: str | None) -> Any:
        try:
            return judging.readable(gold) if answer is None else judging.equal(gold, answer)
        except algebra.TooLargeError:
            return "size"
        except TooDeepError:
            return "depth"

    # The first formulas fill the parser's tables; they must not count against a question.
    for gold, answer in WARM_UP:
        assert judging.equal(gold, answer), (gold, answer)
    return judge


def main() -> None:
    """Import the algebra, say so, and answer."""
    folder, children, memory, patience = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        judge = _judge(folder)
    except Exception as error:
        _reply(None, f"{type(error).__name__}: {error}")
        return
    _reply(None, "ready")
    Keeper(int(children), int(memory), float(patience), judge).run()


if __name__ == "__main__":
    main()
