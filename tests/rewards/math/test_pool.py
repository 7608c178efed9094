"""The keeper and its children: limits, kills, restarts, threads, forks, and their end."""

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
from rewards.math.pool import Outcome, Pool, Question

TRUE, FALSE, TIMEOUT = Outcome.TRUE, Outcome.FALSE, Outcome.TIMEOUT
# Enough for an ordinary comparison on a machine that is busy with other things.
PATIENT = 30.0
# Does not end in reasonable time, and no bound on its size gives it away.
ENDLESS = (
    r"\int_0^1 \frac{\sin(x^x) e^{x^5}}{\ln(2+x)} dx \cdot \sum_{k=1}^{10^9} \frac{1}{k^k}",
    "5",
)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(children=2)
    yield pool
    pool.close()


def keeper_pid(pool: Pool) -> int:
    assert pool._keeper is not None
    return pool._keeper.pid


def children_of(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_one_keeper_answers_many_batches(pool: Pool) -> None:
    questions: list[Question] = [
        (r"\sqrt{8}", r"2\sqrt{2}"),
        (r"\sqrt{8}", "3"),
        ("x^2", None),
        ("x^", None),
    ]
    assert pool.ask(questions, PATIENT) == [TRUE, FALSE, TRUE, FALSE]
    first = keeper_pid(pool)
    assert pool.ask([], PATIENT) == []
    assert pool.ask([("x+1", str(number)) for number in range(50)], PATIENT) == [FALSE] * 50
    assert keeper_pid(pool) == first


def test_more_questions_than_a_pipe_holds(pool: Pool) -> None:
    questions: list[Question] = [("x+1", "1+x" if n % 3 else "2+x") for n in range(3000)]
    outcomes = pool.ask(questions, PATIENT)
    assert outcomes == [TRUE if n % 3 else FALSE for n in range(3000)]


def test_a_question_that_hangs_is_killed_and_the_others_are_answered(pool: Pool) -> None:
    pool.ask([("x", "y"), ("x", "z")], PATIENT)
    keeper, before = keeper_pid(pool), set(children_of(keeper_pid(pool)))
    start = time.monotonic()
    assert pool.ask([ENDLESS, ("x+1", "1+x"), ENDLESS, ("x", "y")], 0.5) == [
        TIMEOUT,
        TRUE,
        TIMEOUT,
        FALSE,
    ]
    # Half a second each when there are two processors, ten times that at most, and the kills.
    assert time.monotonic() - start < 20.0
    assert keeper_pid(pool) == keeper
    killed = before - set(children_of(keeper))
    assert killed
    assert not any(map(is_alive, killed))


def test_many_that_hang_take_turns_on_all_children(pool: Pool) -> None:
    pool.ask([("x", "y")], PATIENT)
    start = os.times().elapsed
    before = time.process_time()
    assert pool.ask([ENDLESS] * 8, 0.25) == [TIMEOUT] * 8
    # Eight quarters of a second on two children: one second, on a machine with two free processors;
    # ten times that with none. Meanwhile this process only waits.
    assert os.times().elapsed - start < 12.0
    assert time.process_time() - before < 0.5


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}",
        "(((((9!)!)!)!)!)!",
        "10^{10^{10}}!",
        r"\left(10^{10}\right)^{10^{10}}",
        "(" * 60 + "1,2" + ",3)" * 60,
        "2^{-10^{12}}",
    ],
)
def test_what_is_too_large_is_refused_before_it_is_computed(pool: Pool, answer: str) -> None:
    start = time.monotonic()
    assert pool.ask([("x", answer)] * 10, PATIENT) == [TIMEOUT] * 10
    # Parsing takes hundredths of a second. Computing any of these would take its whole time limit.
    assert time.monotonic() - start < PATIENT


@pytest.mark.parametrize(
    "formula", ["2^{2005}", "100!", r"\frac{1}{2004!}", "10^{100}", "x^{5000}"]
)
def test_large_numbers_of_real_problems_are_computed(pool: Pool, formula: str) -> None:
    assert pool.ask([(formula, f"{formula} + 0"), (formula, f"{formula} + 1")], PATIENT) == [
        TRUE,
        FALSE,
    ]


def test_a_child_that_is_killed_fails_one_question(pool: Pool) -> None:
    pool.ask([("x", "y")], PATIENT)
    # As the kernel would when memory is short; the one that waits for a question is replaced.
    for child in children_of(keeper_pid(pool)):
        os.kill(child, signal.SIGKILL)
    outcomes = pool.ask([("x+1", "1+x")] * 6, PATIENT)
    assert set(outcomes) <= {TRUE, Outcome.ERROR}
    assert outcomes.count(TRUE) >= 4
    assert pool.ask([("x+1", "1+x")], PATIENT) == [TRUE]


def test_a_keeper_that_dies_is_started_again(pool: Pool) -> None:
    pool.ask([("x", "y")], PATIENT)
    first = keeper_pid(pool)
    children = children_of(first)
    threading.Timer(0.3, os.kill, (first, signal.SIGKILL)).start()
    assert pool.ask([("x+1", "1+x"), ENDLESS], 1.0) == [TRUE, TIMEOUT]
    assert keeper_pid(pool) != first
    # Their questions have ended with it.
    assert wait_until_gone(children, 20.0)


def test_works_off_the_main_thread_and_from_several(pool: Pool) -> None:
    wrong: list[int] = []

    def ask(number: int) -> None:
        questions: list[Question] = [
            (rf"\sqrt{{{number}}}", rf"\sqrt{{{other}}}") for other in range(3)
        ]
        if pool.ask(questions, PATIENT) != [TRUE if number == n else FALSE for n in range(3)]:
            wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_has_a_keeper_of_its_own(pool: Pool) -> None:
    pool.ask([("x", "y")], PATIENT)
    mine = keeper_pid(pool)
    # As when another thread asks at the moment of the fork: in the child nobody will release it.
    pool._lock.acquire()
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(250)
        try:
            outcomes = pool.ask([("x+1", "1+x")], PATIENT)
            other = keeper_pid(pool) != mine
            pool.close()
            code = 0 if outcomes == [TRUE] and other else 2
        finally:
            os._exit(code)
    pool._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.ask([("x+1", "1+x")], PATIENT) == [TRUE]
    assert keeper_pid(pool) == mine


ASKING = (
    "import sys\n"
    "from rewards.math.pool import shared_pool\n"
    "pool = shared_pool()\n"
    "pool.ask([('x', 'y')], 30)\n"
    "print(pool._keeper.pid, flush=True)\n"
)


def test_nothing_is_left_when_python_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASKING], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert not is_alive(int(done.stdout))


def test_nothing_is_left_when_python_is_killed_while_a_formula_hangs() -> None:
    code = f"{ASKING}pool.ask([{ENDLESS!r}] * 50, 100)"
    asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None
    keeper = int(asking.stdout.readline())
    deadline = time.monotonic() + PATIENT
    while not (children := children_of(keeper)) and time.monotonic() < deadline:
        time.sleep(0.02)
    asking.kill()
    asking.wait()
    asking.stdout.close()
    # The keeper sees its input end, kills the children and ends.
    assert wait_until_gone([keeper, *children], PATIENT)


def test_a_keeper_that_cannot_start_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "latex2sympy2_extended"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('No module named sympy')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RewardError, match=r"No module named sympy; .*pip install math-verify"):
        Pool().ask([("x", "y")], PATIENT)
