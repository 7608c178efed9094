"""Rewards in processes: what goes wrong costs its own sample, and what is logged arrives."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rewards import Limits, RewardError, load
from rewards.processes import pool

LIMITS = Limits(seconds=1.0, workers=2)


def counts(metrics: dict[str, float], name: str) -> tuple[float, float]:
    return metrics[f"reward/{name}/timeouts"], metrics[f"reward/{name}/errors"]


@pytest.mark.parametrize(
    ("text", "timeouts", "errors"),
    [
        ("hang", 1, 0),
        ("spin", 1, 0),  # inside a C call that lets nothing else of its process run
        ("raise", 0, 1),
        ("exit", 0, 1),
        ("die", 0, 1),
        ("segfault", 0, 1),
        ("recurse", 0, 1),
    ],
)
def test_costs_its_own_sample_alone(file: Path, text: str, timeouts: int, errors: int) -> None:
    reward = load(f"{file}:obey", LIMITS)
    metrics: dict[str, float] = {}
    completions = ["a", "bb", text, "cc", "a", "a", "a", "dddd"]
    started = time.perf_counter()
    values = reward(completions=completions, log_metric=metrics.__setitem__)
    seconds = time.perf_counter() - started
    assert values == [1.0, 2.0, None, 2.0, 1.0, 1.0, 1.0, 4.0]
    assert counts(metrics, "obey") == (timeouts, errors)
    # Measured within the call; twice the limit for the part and the sample, and three starts.
    assert 0 < metrics["reward/obey/seconds"] <= seconds < 12
    assert reward(completions=["a", "bb"]) == [1.0, 2.0]


def test_penalty_instead_of_none(file: Path) -> None:
    reward = load(f"{file}:obey", Limits(seconds=1.0, failed=-1.5))
    assert reward(completions=["a", "raise", "die"]) == [1.0, -1.5, -1.5]


def test_prints_and_input_do_not_reach_the_wire(file: Path) -> None:
    assert load(f"{file}:obey", LIMITS)(completions=["print", "a"]) == [5.0, 1.0]


def test_what_a_reward_started_dies_with_it(file: Path) -> None:
    seconds = f"600.{os.getpid()}"
    seen: list[bool] = []
    watch = threading.Thread(target=lambda: seen.append(wait(lambda: alive(seconds))))
    watch.start()
    load(f"{file}:obey", LIMITS)(completions=[f"child {seconds}", "a"])
    watch.join()
    assert seen
    wait(lambda: not alive(seconds), 10)


def alive(word: str) -> bool:
    """Whether a process has this word on its command line; zombies have none."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes():
                return True
    return False


def test_batch_is_scored_in_parallel(file: Path) -> None:
    reward = load(f"{file}:pid", Limits(workers=2))
    # Where one is ready before the other, it takes all there is.
    wait(lambda: len(set(reward(completions=["a"] * 8))) == 2)
    first = reward(completions=["a"] * 8)
    assert os.getpid() not in first
    # Processes stay for the next batch.
    assert set(reward(completions=["a"] * 8)) == set(first)


def test_slow_samples_get_smaller_parts(file: Path) -> None:
    file.write_text(
        "import time\ndef slow(completions):\n    time.sleep(0.1 * len(completions))\n"
        "    return [len(completions)] * len(completions)\n"
    )
    reward = load(f"{file}:slow", Limits(seconds=2.0, workers=1))
    assert reward(completions=["a"] * 8) == [8.0] * 8
    # A quarter of 2 s, at a little more than 0.1 s a sample.
    assert max(reward(completions=["a"] * 8)) <= 4


def test_group_wise_loses_its_group(file: Path) -> None:
    reward = load(f"{file}:rank", LIMITS)
    prompts = [[{"role": "user", "content": p}] for p in "ppppqqqqrrrr"]
    completions = ["a", "bb", "ccc", "dddd", "a", "raise", "b", "c", "dddd", "ccc", "bb", "a"]
    metrics: dict[str, float] = {}
    values = reward(completions=completions, prompts=prompts, log_metric=metrics.__setitem__)
    assert values == [0.0, 1.0, 2.0, 3.0, None, None, None, None, 3.0, 2.0, 1.0, 0.0]
    assert counts(metrics, "rank") == (0, 4)


def test_group_wise_is_declared_by_function_or_limits(file: Path) -> None:
    prompts = ["p"] * 3 + ["q"] * 3
    completions = ["a", "raise", "a", "a", "a", "a"]
    lost = [None] * 3 + [1.0] * 3
    reward = load(f"{file}:obey", Limits(group_wise=True, workers=2))
    assert reward(completions=completions, prompts=prompts) == lost
    reward = load(f"{file}:rank", Limits(group_wise=False, workers=1))
    assert reward(completions=completions, prompts=prompts).count(None) == 1


def test_group_has_the_time_of_its_samples(file: Path) -> None:
    file.write_text(
        "import time\ndef slow(completions, prompts):\n    time.sleep(0.3 * len(completions))\n"
        "    return [1.0] * len(completions)\nslow.group_wise = True\n"
    )
    reward = load(f"{file}:slow", Limits(seconds=0.5, workers=1))
    assert reward(completions=["a"] * 4, prompts=["p"] * 4) == [1.0] * 4


def test_logs_arrive_whole(file: Path) -> None:
    reward = load(f"{file}:logs", LIMITS)
    extra: dict[str, list[Any]] = {}
    metrics: list[tuple[str, float]] = []
    completions = ["a", "bbb", "raise", "ccccc", "dd"]
    values = reward(
        completions=completions,
        answer=["x", "xx", "xxx", "xxxx", "xxxxx"],
        trainer_state=SimpleNamespace(global_step=10),
        log_extra=extra.__setitem__,
        log_metric=lambda name, value: metrics.append((name, value)),
    )
    assert values == [11.0, 12.0, None, 14.0, 15.0]
    assert extra == {"upper": ["A", "BBB", None, "CCCCC", "DD"]}
    # Once a batch, over the samples that were scored, however the batch was cut.
    assert [value for name, value in metrics if name == "mean"] == [pytest.approx(11 / 4)]
    assert [name for name, _ in metrics].count("reward/logs/errors") == 1


def test_log_functions_of_the_caller_are_not_needed_unless_named(file: Path) -> None:
    assert load(f"{file}:obey", LIMITS)(completions=["a"]) == [1.0]
    with pytest.raises(RewardError, match="'sizes' needs 'log_metric', which a trainer passes"):
        load(f"{file}:sizes", LIMITS)(completions=["a"])


def test_trainer_state_crosses(file: Path) -> None:
    history = [{"loss": float(step)} for step in range(250)]
    state = SimpleNamespace(max_steps=1000, log_history=history, callbacks=[print])
    # The newest hundred lines of the log, of which the last says 249.
    assert load(f"{file}:state", LIMITS)(completions=["a"], trainer_state=state) == [1349.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, float("nan"), 1.0], "'wrong' returned nan for completion 1; return a finite"),
        ([1.0, 1.0, float("inf")], "'wrong' returned inf for completion 2; return a finite"),
        ([1.0, 1.0, "1"], "'wrong' returned '1' for completion 2; return a number"),
        ([1.0, 1.0], "column 'answer' has 2 values for 3 completions; pass one for each"),
    ],
)
def test_wrong_values_are_an_error_with_the_row(
    file: Path, answer: list[Any], message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        load(f"{file}:wrong", LIMITS)(completions=["a"] * 3, answer=answer)


def test_wrong_number_of_extra_values(file: Path) -> None:
    file.write_text(
        "def extra(completions, log_extra):\n    log_extra('x', [1])\n    return [0] * 2\n"
    )
    with pytest.raises(RewardError, match=r"log_extra\('x'\) got 1 values for 2 completions"):
        load(f"{file}:extra")(completions=["a", "b"], log_extra=print)


def test_column_that_cannot_cross_is_named(file: Path) -> None:
    with pytest.raises(RewardError, match="'obey': column 'hook' cannot be handed to its process"):
        load(f"{file}:obey", LIMITS)(completions=["a"], hook=[lambda: 1])


def test_live_environments_stay_here_unless_named(file: Path) -> None:
    live = [threading.Lock()]
    assert load(f"{file}:keys")(completions=["a"], environments=live, x=[1]) == [1.0]


def test_function_that_cannot_be_loaded_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = load(f"{file}:obey", LIMITS)
    file.unlink()
    with pytest.raises(RewardError, match=r"'obey': its process did not start: .*no file"):
        reward(completions=["a"])


def test_process_that_cannot_start_again_costs_its_samples(file: Path) -> None:
    reward = load(f"{file}:obey", Limits(seconds=1.0, workers=1))
    assert reward(completions=["a", "b"]) == [1.0, 1.0]
    file.unlink()
    assert reward(completions=["die", "a"]) == [None, None]
    assert reward(completions=["a"]) == [None]


def test_no_process_to_be_had(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = load(f"{file}:obey", Limits(workers=1))

    def refuse(hello: bytes) -> Any:
        raise BlockingIOError("Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "Child", refuse)
        with pytest.raises(RewardError, match="did not start: Resource temporarily unavailable"):
            reward(completions=["a"])
    assert reward(completions=["a"]) == [1.0]
    monkeypatch.setattr(pool, "Child", refuse)
    assert reward(completions=["a", "die", "b"]) == [None, None, None]


def test_first_batch_is_cut_small(file: Path) -> None:
    """Nobody knows yet what a sample takes."""
    reward = load(f"{file}:sizes", Limits(workers=1))
    silent = {"log_metric": lambda *a: None}
    assert max(reward(completions=["a"] * 1000, **silent)) == 64
    assert max(reward(completions=["a"] * 1000, **silent)) == 1000


def test_async_runs_side_by_side(file: Path) -> None:
    reward = load(f"{file}:obey_async", Limits(seconds=2.0, workers=1))
    started = time.perf_counter()
    assert asyncio.run(reward(completions=["slow"] * 50)) == [4.0] * 50
    # 15 s in a row.
    assert time.perf_counter() - started < 5


def test_async_leaves_the_loop_free(file: Path) -> None:
    reward = load(f"{file}:obey_async", Limits(workers=1))
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def both() -> list[Any]:
        ticking = asyncio.create_task(tick())
        values = await reward(completions=["slow", "slow"])
        ticking.cancel()
        return values

    assert asyncio.run(both()) == [4.0, 4.0]
    # 30 in the 0.3 s of the reward alone; none if the loop were held.
    assert ticks > 10


@pytest.mark.parametrize(
    "text", ["hang async", pytest.param("hang", marks=pytest.mark.slow), "raise", "die"]
)
def test_async_costs_its_own_sample_alone(file: Path, text: str) -> None:
    reward = load(f"{file}:obey_async", Limits(seconds=1.0, workers=1))
    metrics: dict[str, float] = {}
    count = 12 if text == "hang async" else 3
    completions = ["slow"] * count + [text]
    started = time.perf_counter()
    values = asyncio.run(reward(completions=completions, log_metric=metrics.__setitem__))
    assert values == [4.0] * count + [None]
    expected = (1, 0) if text.startswith("hang") else (0, 1)
    assert counts(metrics, "obey_async") == expected
    if text == "hang async":
        # The part, then its samples side by side: each 1 s, and the start of a second process.
        # One by one the slow ones would take 3.6 s more.
        assert time.perf_counter() - started < 5


def test_async_keeps_its_event_loop(file: Path) -> None:
    reward = load(f"{file}:loop", Limits(workers=1))
    assert [asyncio.run(reward(completions=["a"])) for _ in range(3)] == [[1.0]] * 3


def test_works_off_the_main_thread_and_from_several(file: Path) -> None:
    reward = load(f"{file}:obey", LIMITS)
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        results[i] = reward(completions=["x" * i, "hang" if i == 1 else "y"])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: [0.0, 1.0], 1: [1.0, None], 2: [2.0, 1.0]}


def test_forked_process_starts_its_own(file: Path) -> None:
    code = f"""
import os
import rewards
if __name__ == "__main__":
    reward = rewards.load({str(file)!r} + ":pid", rewards.Limits(workers=1))
    [here] = reward(completions=["a"])
    child = os.fork()
    if child == 0:
        [there] = reward(completions=["a"])
        os._exit(0 if there != here else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert reward(completions=["a"]) == [here]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("text", ["hang", pytest.param("spin", marks=pytest.mark.slow)])
def test_worker_ends_with_a_trainer_that_was_killed(file: Path, text: str, tmp_path: Path) -> None:
    file.write_text(
        file.read_text()
        + f"\ndef told(completions):\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "    return obey(completions)\n"
    )
    code = (
        f"import rewards\nrewards.load({str(file)!r} + ':told', rewards.Limits(seconds=0.5, workers=1))"
        f"(completions=[{text!r}])"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code])
    wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    worker = int((tmp_path / "pid").read_text())
    trainer.kill()
    trainer.wait()
    # By the clock when it sleeps, after (0.5 s + 2 s) of each processor when it computes.
    wait(lambda: not running(worker))


def wait(done: Any, seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.05)
    return True


def running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_processes_end_with_the_reward(file: Path) -> None:
    reward = load(f"{file}:pid", Limits(workers=1))
    [pid] = reward(completions=["a"])
    assert running(int(pid))
    del reward
    assert not running(int(pid))


def test_batch_that_is_given_up_leaves_no_late_reply(file: Path) -> None:
    """One part is wrong at once; the other's process still works, and must not answer later."""
    file.write_text(
        "import time\ndef late(completions, answer):\n"
        "    time.sleep(0.5 if 5.0 in answer else 0)\n    return answer\n"
    )
    reward = load(f"{file}:late", Limits(workers=2))
    for _ in range(2):  # so that both are ready
        assert reward(completions=["a"] * 4, answer=[5.0] * 4) == [5.0] * 4
    with pytest.raises(RewardError, match="returned 'x' for completion 0"):
        reward(completions=["a"] * 4, answer=["x", "x", 5.0, 5.0])
    time.sleep(0.7)
    assert reward(completions=["a"] * 4, answer=[2.0] * 4) == [2.0] * 4


def test_reward_works_on_after_an_interrupt(file: Path) -> None:
    reward = load(f"{file}:logs", Limits(workers=2))

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reward(completions=["a"] * 2, answer=["x"] * 2, log_extra=interrupt, log_metric=print)
    none = {"log_extra": lambda *a: None, "log_metric": lambda *a: None}
    assert reward(completions=["a"], answer=["xxxx"], **none) == [3.0]


def test_options_and_own_modules_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_of_mine.py").write_text(
        "def scale(completions, factor=1):\n    return [factor * len(c) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = load("package_of_mine:scale", factor=3)
    monkeypatch.chdir("/")
    assert reward(completions=["ab"]) == [6.0]


def test_relative_path_holds_after_a_change_of_directory(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    reward = load("obedient.py:obey")
    monkeypatch.chdir("/")
    assert reward(completions=["ab"]) == [2.0]
