"""The worker processes of one reward, and the jobs that wait for them."""

import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rewards.errors import RewardError
from rewards.processes.child import Child, ChildEndedError


@dataclass(frozen=True)
class Job:
    """A part of a batch: a pickled request, its time limit in seconds, and whatever it is about."""

    payload: bytes
    seconds: float
    about: Any


@dataclass(frozen=True)
class Failure:
    """Why a job has no values."""

    kind: Literal["timeouts", "errors"]
    text: str
    trace: str = ""


class Pool:
    """Up to `workers` processes that have loaded the same reward, started when there is work.

    Any thread may use it, one batch at a time. After a fork the child starts its own processes.
    """

    def __init__(self, name: str, hello: bytes, workers: int) -> None:
        self._name, self._hello, self._workers = name, hello, workers
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._children: list[Child] = []
        self._started_once = False
        self._pid = os.getpid()

    def serve(
        self, jobs: deque[Job]
    ) -> Generator[tuple[Job, dict[str, Any] | Failure], None, None]:
        """Take jobs from the left until none is left; yield each with its reply, as they come.

        The caller may add jobs while it iterates, and must close the iterator if it stops early.
        Raises RewardError when no process can be started.
        """
        if self._pid != os.getpid():
            # The lock may be held by a thread that is not here, and the pipes are the parent's.
            self._reset()
        with self._lock:
            busy: dict[Child, Job] = {}
            try:
                while jobs or busy:
                    yield from self._assign(jobs, busy)
                    for child, reply in self._replies() if self._children else ():
                        if child in busy:
                            yield busy.pop(child), reply
                        else:
                            yield from self._started(child, reply, jobs)
            finally:
                # An interrupt, or a caller that gave up: a late reply must not meet the next job.
                for child in busy:
                    self._drop(child)

    def _assign(self, jobs: deque[Job], busy: dict[Child, Job]) -> Iterator[tuple[Job, Failure]]:
        for child in self._children:
            if jobs and child.ready and child not in busy:
                busy[child] = jobs.popleft()
                child.send(busy[child].payload, busy[child].seconds)
        starting = sum(not child.ready for child in self._children)
        while len(jobs) > starting and len(self._children) < self._workers:
            try:
                self._children.append(Child(self._hello))
            except OSError as error:
                # No memory or no processes left: those that run will do, if there are any.
                if not self._children:
                    yield from self._unstarted(str(error), jobs)
                return
            starting += 1

    def _replies(self) -> Iterator[tuple[Child, dict[str, Any] | Failure]]:
        """Wait until something happens; yield what has come or has failed."""
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                selector.register(child.stdout, selectors.EVENT_READ, child)
                if child.sending:
                    selector.register(child.stdin, selectors.EVENT_WRITE, child)
            due = min(child.deadline for child in self._children)
            events = selector.select(max(0.0, due - time.monotonic()))
        heard: set[Child] = set()
        for key, _ in events:
            child = key.data
            if key.fd == child.stdin:
                child.write()
                continue
            try:
                reply = child.read()
            except ChildEndedError as ended:
                self._drop(child)
                heard.add(child)
                yield child, Failure("errors", str(ended))
                continue
            if reply is not None:
                child.deadline = float("inf")
                heard.add(child)
                yield child, reply
        for child in [c for c in self._children if c not in heard]:
            if child.deadline <= time.monotonic():
                self._drop(child)
                yield child, Failure("timeouts", "it took longer than its time limit")

    def _started(
        self, child: Child, reply: dict[str, Any] | Failure, jobs: deque[Job]
    ) -> Iterator[tuple[Job, Failure]]:
        """Note that a process is ready, or that it will not be."""
        if child.ready:
            return  # it died with nothing to do
        if isinstance(reply, dict) and "ready" in reply:
            child.ready = self._started_once = True
            return
        self._drop(child)
        text = reply.text if isinstance(reply, Failure) else str(reply.get("failed"))
        yield from self._unstarted(text, jobs)

    def _unstarted(self, why: str, jobs: deque[Job]) -> Iterator[tuple[Job, Failure]]:
        """At first it is a fault of the set-up; later on an accident, which costs a job and not the run."""
        if not self._started_once:
            raise RewardError(f"reward '{self._name}': its process did not start: {why}")
        if jobs:
            yield jobs.popleft(), Failure("errors", f"its process did not start again: {why}")

    def _drop(self, child: Child) -> None:
        if child in self._children:
            self._children.remove(child)
        child.kill()
