"""Rewards in processes of their own, called by TRL's trainer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rewards

CODE = '''
import asyncio

def texts(completions):
    return [done[-1]["content"] for done in completions]

def digits(completions, answer, trainer_state, log_extra, log_metric, **columns):
    """As many as there are; a text of even length raises."""
    counts = [sum(c.isdigit() for c in text) for text in texts(completions)]
    log_extra("lengths", [len(text) for text in texts(completions)])
    log_metric("digits/step", trainer_state.global_step)
    if any(len(text) % 2 == 0 for text in texts(completions)):
        raise ValueError("an even length")
    return counts

async def waits(completions, completion_ids, prompts, **columns):
    await asyncio.sleep(0.01)
    return [len(ids) if prompt[-1]["role"] == "user" else -1 for ids, prompt in zip(completion_ids, prompts)]

def rank(completions, prompts):
    assert all(prompt == prompts[0] for prompt in prompts) or len(prompts) == 8
    order = sorted(map(len, texts(completions)))
    return [order.index(len(text)) / len(order) for text in texts(completions)]

rank.group_wise = True
'''


def test_sync_async_and_group_wise_through_trl(
    make_grpo: Callable[..., Any], make_policy: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    trainer, recorder = make_grpo(
        make_policy(),
        reward_funcs=[rewards.load(f"{file}:{name}") for name in ("digits", "waits", "rank")],
        reward_weights=[1.0, 0.5, 0.25],
    )
    trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    lost = {0: 0, 1: 0}
    for line in lines:
        text = line["completion"][-1]["content"]
        fails = len(text) % 2 == 0
        lost[line["step"]] += fails
        expected = None if fails else float(sum(c.isdigit() for c in text))
        assert line["rewards"]["digits"] == expected
        assert line["rewards"]["waits"] > 0
        assert 0 <= line["rewards"]["rank"] < 1
        assert line["extra"]["lengths"] == (None if fails else len(text))
    assert sum(lost.values()) > 0
    steps = [line for line in recorder.lines if "reward" in line]
    for step, line in enumerate(steps):
        assert line["reward/digits/errors"] == lost[step]
        assert line["digits/step"] == step
        for name in ("digits", "waits", "rank"):
            assert line[f"reward/{name}/timeouts"] == 0
            assert line[f"reward/{name}/seconds"] > 0
            assert f"rewards/{name}/mean" in line
        assert line["reward/waits/errors"] == line["reward/rank/errors"] == 0


def test_values_through_trl_are_those_of_the_function_itself(
    make_grpo: Callable[..., Any], make_policy: Callable[..., Any], tmp_path: Path
) -> None:
    """The same run with the plain function and with the loaded one."""
    (tmp_path / "mine.py").write_text(
        "def odd(completions, completion_ids, answer, **columns):\n"
        "    return [None if len(i) % 3 == 0 else len(i) / (1 + len(a)) for i, a in zip(completion_ids, answer)]\n"
    )
    scope: dict[str, Any] = {}
    exec((tmp_path / "mine.py").read_text(), scope)
    advantages = []
    for function in (scope["odd"], rewards.load(f"{tmp_path}/mine.py:odd")):
        (tmp_path / "samples.jsonl").unlink(missing_ok=True)
        trainer, _ = make_grpo(make_policy(), reward_funcs=[function], reward_weights=[1.0])
        trainer.train()
        text = (tmp_path / "samples.jsonl").read_text()
        advantages.append([json.loads(line)["advantage"] for line in text.splitlines()])
    assert advantages[1] == pytest.approx(advantages[0])
    assert any(advantage != 0 for advantage in advantages[0])
