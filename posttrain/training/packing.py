"""Packed rows for attention back ends that take a mask: rows stay rows.

TRL lays all rows of a packed batch end to end, which flash attention needs; with a dense mask that
costs (B * S)^2 attention instead of B * S^2. Shapes: B rows, S positions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.policy.mtp import IGNORE


@dataclass
class PackedRows:
    """Collates rows of packed documents; a document starts where `position_ids` is 0.

    Each example has `input_ids`, `labels` and `seq_lengths`. There is no attention mask: positions
    tell documents apart. Padding has position 0 each and is 0 in `padding_mask`. The first token
    of a document is no label, as nothing in its document comes before it.
    """

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        shape = len(examples), max(len(example["input_ids"]) for example in examples)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORE),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "padding_mask": torch.zeros(shape, dtype=torch.long),
        }
        for row, example in enumerate(examples):
            n = len(example["input_ids"])
            batch["input_ids"][row, :n] = torch.tensor(example["input_ids"])
            batch["labels"][row, :n] = torch.tensor(example["labels"])
            batch["position_ids"][row, :n] = torch.cat(
                [torch.arange(length) for length in example["seq_lengths"]]
            )
            batch["padding_mask"][row, :n] = 1
        batch["labels"][batch["position_ids"] == 0] = IGNORE
        return batch
