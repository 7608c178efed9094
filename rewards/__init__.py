"""Reward functions for reinforcement learning, free of torch and of the trainer.

A reward is `fn(completions, **columns) -> list[float | None]`, TRL's signature: one number for each
completion, None where the reward does not apply. `load` finds one by name or by path, and runs it
under `Limits`.
"""

from rewards.checks import check_values
from rewards.errors import RewardError
from rewards.loading import BUILT_IN, Reward, load
from rewards.processes.limits import Limits

__all__ = ["BUILT_IN", "Limits", "Reward", "RewardError", "check_values", "load"]
