"""Callbacks: the metrics log, and stopping cleanly on Ctrl-C or SIGTERM."""

import json
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def peak_memory_gib() -> dict[str, float]:
    """Peak resident memory of this process, and of its device, in GiB."""
    peak = {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        peak["peak_device_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peak


class MetricsLog(TrainerCallback):
    """Appends one JSON line a logged step to `metrics.jsonl` (main process only).

    On a resumed run the lines of steps that will be repeated are dropped first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            keep_lines(self.path, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        line = {"step": state.global_step, "seconds": round(time.monotonic() - self.start, 3)}
        line |= {k: v for k, v in logs.items() if isinstance(v, int | float)}
        line |= peak_memory_gib()
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def keep_lines(path: Path, last_step: int) -> None:
    """Keep the lines of a JSON-lines log whose `step` is at most `last_step`."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


class StopOnSignal(TrainerCallback):
    """Saves a step checkpoint and stops after the running step, on SIGINT or SIGTERM.

    All processes stop at the same step if any of them was signalled. A second signal kills.
    Listens inside `with callback.listening():`.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signalled = False
        self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals, and give them back to whom they belonged, whatever happens."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        flag = torch.tensor(int(self.signalled), device=self.accelerator.device)
        if self.accelerator.reduce(flag, "sum").item():
            self.stopped = True
            control.should_save = state.global_step > 0
            control.should_training_stop = True
