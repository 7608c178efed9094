"""What a reward may take, and what a sample gets that took more."""

import math
from dataclasses import dataclass

from rewards.errors import RewardError


@dataclass(frozen=True)
class Limits:
    """Limits of a reward that runs in processes of its own.

    seconds: by the clock, for one sample (for a group: times its samples). failed: the score of a
    sample whose reward hung or crashed; None drops the sample from this reward. group_wise: the
    reward compares the samples of a prompt, so they stay together and are lost together; None takes
    the function's attribute `group_wise`. workers: processes; None takes one a processor, 8 at
    most, shared between the trainer's processes on this machine.

    Raises RewardError for a value out of range.
    """

    seconds: float = 5.0
    failed: float | None = None
    group_wise: bool | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.seconds) or self.seconds <= 0:
            raise RewardError(
                f"`seconds` is {self.seconds!r}; give a number of seconds above 0 for one sample"
            )
        if self.failed is not None and not _is_number(self.failed):
            raise RewardError(
                f"`failed` is {self.failed!r}; give a finite number, or none to leave the sample out"
            )
        if self.workers is not None and (type(self.workers) is not int or self.workers < 1):
            raise RewardError(f"`workers` is {self.workers!r}; give a whole number of at least 1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
