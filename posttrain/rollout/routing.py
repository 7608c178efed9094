"""The expert choices of a rollout: which experts the engine used for each token, for replay in the trainer.

On CUDA vLLM returns them itself (`enable_return_routed_experts`). It refuses that on a CPU, so a
recorder sits between the worker and its model runner there. Every step it takes, from the routers, the
experts of each row of the batch, and from the runner which request and position a row is. A position counts
once and for all when its token is final:

    prompt             every row; a prompt that is computed in parts adds them up
    prefix cache       positions that were not computed: kept beside the cache, slot by slot, and read there
    rejected drafts    the row of the same position that comes later wins
    preemption         what is computed anew does not replace what the tokens were drawn with

The last token of a sequence is never computed and has no record.
Shapes: T rows of a step, L MoE layers, K experts a token, S tokens of a sequence.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.policy.replay import MISSING, record_dtype


class RoutingRecorder:
    """Records what the routers of a CPU worker's model choose, until `take`.

    model_runner: vLLM's runner, whose `execute_model` it wraps. The drafter's routers are not part.
    """

    def __init__(self, model_runner: Any) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        self.runner = model_runner
        found = [m for m in model_runner.get_model().modules() if isinstance(m, MoERunner)]
        self.layers = sorted(found, key=lambda layer: layer.layer_id)
        router = self.layers[0].router
        self.dtype = record_dtype(router.global_num_experts)
        self.chosen: list[Tensor | None] = [None] * len(self.layers)
        for place, layer in enumerate(self.layers):
            layer.router.set_capture_fn(partial(self.chosen.__setitem__, place))
        self.in_slots = self._slots(router.top_k)
        self.execute = model_runner.execute_model
        model_runner.execute_model = self._execute
        self.clear()

    def clear(self) -> None:
        """Forget the requests that ran so far; what belongs to the prefix cache stays."""
        self.requests: dict[str, int] = {}  # name -> number, in the order of arrival
        self.known: list[int] = []  # of each request, how much of its prompt has a record
        self.parts: list[tuple[np.ndarray, np.ndarray, Tensor]] = []  # request, position, experts

    def take(self, lengths: dict[str, int]) -> dict[str, Tensor]:
        """Return a record [S-1, L, K] for each request and its number of tokens S; then forget all."""
        records = {
            name: self.in_slots.new_full((length - 1, *self.in_slots.shape[1:]), MISSING)
            for name, length in lengths.items()
        }
        if self.parts:
            number_T = np.concatenate([part[0] for part in self.parts])
            position_T = np.concatenate([part[1] for part in self.parts])
            experts_TLK = torch.cat([part[2] for part in self.parts])
            order = np.argsort(number_T, kind="stable")  # within a request, later rows stay later
            bounds = np.searchsorted(number_T[order], np.arange(len(self.requests) + 1))
            for name, record in records.items():
                number = self.requests[name]
                rows = order[bounds[number] : bounds[number + 1]]
                rows = rows[position_T[rows] < len(record)]  # not drafts beyond the end
                last = np.full(len(record), -1)
                last[position_T[rows]] = rows
                seen = np.flatnonzero(last >= 0)
                record[torch.from_numpy(seen)] = experts_TLK[torch.from_numpy(last[seen])]
        self.clear()
        return records

    def _slots(self, experts_per_token: int) -> Tensor:
        """Make room for the experts of every slot of the key-value cache: [slots, L, K]."""
        table = self.runner.input_batch.block_table[0]
        blocks = self.runner.kv_cache_config.num_blocks * table.blocks_per_kv_block
        slots = blocks * table.block_size
        return torch.full((slots, len(self.layers), experts_per_token), MISSING, dtype=self.dtype)

    def _execute(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.execute(scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            self._add(scheduler_output.total_num_scheduled_tokens)
        return result

    def _add(self, rows: int) -> None:
        """Keep the step that just ran; its batch stands in the runner until tokens are drawn."""
        batch = self.runner.input_batch
        names = batch.req_ids[: batch.num_reqs]
        number_R = np.array([self._number(name) for name in names])
        prompt_R = batch.num_prompt_tokens[: batch.num_reqs]
        tokens_R = batch.num_tokens_no_spec[: batch.num_reqs]
        # Once a token is drawn, the positions before it were computed: those records stand.
        first_R = np.where(tokens_R > prompt_R, tokens_R - 1, 0)

        row_T = self.runner.req_indices.np[:rows]
        position_T = self.runner.positions[:rows].numpy()
        experts_TLK = torch.stack(self.chosen, dim=1).to(self.dtype)  # type: ignore[arg-type]
        slots_T = batch.block_table[0].slot_mapping.gpu[:rows]
        self.in_slots[slots_T] = experts_TLK
        keep = position_T >= first_R[row_T]
        if keep.all():
            self.parts.append((number_R[row_T], position_T.copy(), experts_TLK))
        else:
            kept = torch.from_numpy(keep)
            self.parts.append((number_R[row_T[keep]], position_T[keep], experts_TLK[kept]))

        start_R = batch.num_computed_tokens_cpu
        count_R = np.bincount(row_T, minlength=batch.num_reqs)
        for row in np.flatnonzero(tokens_R == prompt_R).tolist():  # prompts, in parts or whole
            number, start = int(number_R[row]), int(start_R[row])
            if start > self.known[number]:
                self._add_cached(row, number, self.known[number], start)
            self.known[number] = max(self.known[number], start + int(count_R[row]))

    def _number(self, name: str) -> int:
        """Return a request's number; vLLM adds `-` and a random part to the name it was given."""
        name = name.rpartition("-")[0] or name
        number = self.requests.setdefault(name, len(self.requests))
        if number == len(self.known):
            self.known.append(0)
        return number

    def _add_cached(self, row: int, number: int, first: int, end: int) -> None:
        """Keep what the prefix cache holds of positions first..end-1 of the request in this row."""
        table = self.runner.input_batch.block_table[0]
        position_T = np.arange(first, end)
        block_T = table.block_table.np[row][position_T // table.block_size]
        slots_T = torch.from_numpy(block_T * table.block_size + position_T % table.block_size)
        self.parts.append((np.full(end - first, number), position_T, self.in_slots[slots_T.long()]))


def returned(routed_experts: Any, moe_layers: list[int], num_experts: int) -> Tensor:
    """Return vLLM's own record [S-1, all layers, K] as ours [S-1, L, K]."""
    chosen = torch.from_numpy(routed_experts[:, moe_layers].astype(np.int32))
    return chosen.to(record_dtype(num_experts))
