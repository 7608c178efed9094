"""A file of rewards that obey what a completion says: hang, raise, end the process ..."""

from pathlib import Path

import pytest

CODE = """
import asyncio, os, re, signal, subprocess, sys, time

def act(text):
    if text == "hang":
        time.sleep(600)
    if text == "spin":
        re.fullmatch("(a+)+b", "a" * 60)
    if text == "raise":
        raise KeyError(text)
    if text == "exit":
        sys.exit(0)
    if text == "die":
        os._exit(0)
    if text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "recurse":
        act(text)
    if text.startswith("child"):
        subprocess.Popen(["sleep", text.partition(" ")[2] or "600"])
        time.sleep(600)
    if text == "print":
        print("x" * 100_000)
        sys.stdin.read()
    return float(len(text))

def obey(completions, **columns):
    return [act(text) for text in completions]

async def obey_async(completions, **columns):
    async def one(text):
        await asyncio.sleep(600 if text == "hang async" else 0.3 if text == "slow" else 0)
        return act(text)
    return await asyncio.gather(*(one(text) for text in completions))

def rank(completions, prompts, **columns):
    values = [act(text) for text in completions]
    order = sorted(values)
    return [float(order.index(value)) for value in values]

rank.group_wise = True

def sizes(completions, log_metric, **columns):
    log_metric("size", len(completions))
    return [len(completions)] * len(completions)

def logs(completions, answer, log_extra, log_metric, trainer_state=None, **columns):
    log_extra("upper", [text.upper() for text in completions])
    log_metric("mean", sum(map(len, completions)) / len(completions))
    for text in completions:
        act(text)
    step = trainer_state.global_step if trainer_state else -1
    return [step + len(a) for a in answer]

def pid(completions, **columns):
    time.sleep(0.2)
    return [os.getpid()] * len(completions)

def state(completions, trainer_state):
    last = trainer_state.log_history[-1]["loss"]
    return [trainer_state.max_steps + last + len(trainer_state.log_history)] * len(completions)

def wrong(completions, answer):
    return answer

def keys(completions, **columns):
    assert "environments" not in columns
    return [len(columns)] * len(completions)

loops = set()

async def loop(completions, **columns):
    loops.add(id(asyncio.get_running_loop()))
    return [len(loops)] * len(completions)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "obedient.py"
    path.write_text(CODE)
    return path
