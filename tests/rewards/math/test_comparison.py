"""The worker process: time limit, memory limit, restart, threads, forks, and its end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards import RewardError
from rewards.math import comparison
from rewards.math.comparison import Algebra, ComparisonFailedError, ComparisonTimeoutError

# Enough for an ordinary comparison on a machine that is busy with other things.
PATIENT = 30.0


@pytest.fixture
def algebra() -> Iterator[Algebra]:
    algebra = Algebra()
    yield algebra
    algebra.close()


def worker_pid(algebra: Algebra) -> int:
    assert algebra._process is not None
    return algebra._process.pid


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_worker_answers_many_questions(algebra: Algebra) -> None:
    assert algebra.equal(r"\sqrt{8}", r"2\sqrt{2}", PATIENT)
    first = worker_pid(algebra)
    assert not algebra.equal(r"\sqrt{8}", "3", PATIENT)
    assert algebra.readable("x^2", PATIENT)
    assert not algebra.readable("x^", PATIENT)
    assert worker_pid(algebra) == first


def test_a_question_that_hangs_is_killed_and_the_next_is_answered(algebra: Algebra) -> None:
    algebra.equal("x", "x", PATIENT)
    first = worker_pid(algebra)
    start = time.monotonic()
    with pytest.raises(ComparisonTimeoutError):
        algebra.equal("5", "9^{9^{9^9}}", 0.5)
    # Half a second when the worker has a processor, ten times that at most, and the kill.
    assert time.monotonic() - start < 20.0
    assert not is_alive(first)
    assert algebra.equal("x+1", "1+x", PATIENT)


def test_a_worker_that_dies_fails_one_question(algebra: Algebra) -> None:
    algebra.equal("x", "x", PATIENT)
    process = algebra._process
    assert process is not None
    # Stopped, it takes the question without answering; then it is killed as the kernel would.
    process.send_signal(signal.SIGSTOP)
    threading.Timer(0.3, process.kill).start()
    with pytest.raises(ComparisonFailedError):
        algebra.equal("x", "x", PATIENT)
    assert algebra.equal("x", "x", PATIENT)


def test_works_off_the_main_thread_and_from_several(algebra: Algebra) -> None:
    wrong: list[int] = []

    def ask(number: int) -> None:
        for other in range(3):
            equal = algebra.equal(rf"\sqrt{{{number}}}", rf"\sqrt{{{other}}}", PATIENT)
            if equal != (number == other):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_has_a_worker_of_its_own(algebra: Algebra) -> None:
    algebra.equal("x", "x", PATIENT)
    mine = worker_pid(algebra)
    # As when another thread asks at the moment of the fork: in the child nobody will release it.
    algebra._lock.acquire()
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(250)
        try:
            equal = algebra.equal("x+1", "1+x", PATIENT)
            other = worker_pid(algebra) != mine
            algebra.close()
            code = 0 if equal and other else 2
        finally:
            os._exit(code)
    algebra._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert is_alive(mine)
    assert algebra.equal("x", "x", PATIENT)
    assert worker_pid(algebra) == mine


def test_nothing_is_left_when_python_ends() -> None:
    code = (
        "from rewards.math.comparison import shared_algebra\n"
        "algebra = shared_algebra()\n"
        "assert algebra.equal('x', 'x', 30)\n"
        "print(algebra._process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert not is_alive(int(done.stdout))


def test_a_worker_without_its_parent_ends_itself() -> None:
    worker = Path(comparison.__file__).with_name("worker.py")
    process = subprocess.Popen(
        [sys.executable, "-P", str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"ready": True}
    # Nobody is there to kill it: its own alarm must, one second after the limit.
    process.stdin.write(json.dumps(["5", "9^{9^{9^9}}", 0]).encode() + b"\n")
    process.stdin.flush()
    assert process.wait(timeout=250) == -signal.SIGPROF
    process.stdin.close()
    process.stdout.close()


def test_a_worker_that_cannot_start_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "math_verify.py"
    broken.write_text("raise ImportError('No module named math_verify')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        RewardError, match=r"No module named math_verify; .*pip install math-verify"
    ):
        Algebra().equal("x", "x", PATIENT)
