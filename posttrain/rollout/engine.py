"""vLLM in this process: start it, generate, score, count drafts, close it.

On a CPU the engine runs eagerly in the trainer's threads with vLLM's faults corrected. The same code
starts vLLM on CUDA; that path has not been run yet.
"""

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from posttrain import environment
from posttrain.rollout import corrections, launch
from posttrain.rollout.launch import EngineError, RolloutSettings, check
from posttrain.rollout.routing import returned
from posttrain.rollout.sync import Link, SyncError, SyncReport

if TYPE_CHECKING:
    from vllm import SamplingParams

__all__ = [
    "Completion",
    "DraftCounts",
    "Engine",
    "EngineError",
    "RolloutSettings",
    "check",
    "request_seed",
]


@dataclass(frozen=True)
class Completion:
    """One generated sequence. logprobs: of each token, under the distribution it was drawn from.

    finish_reason: "stop" (the last token ends the text) or "length". experts: of an engine that
    records routing, the choices [S-1, L, K] for all of prompt and completion but its last token.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    experts: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class DraftCounts:
    """Drafts since the engine started; accepted_per_position[k]: drafts whose token k was kept."""

    drafts: int
    accepted_per_position: tuple[int, ...]

    def __sub__(self, earlier: "DraftCounts") -> "DraftCounts":
        pairs = zip(self.accepted_per_position, earlier.accepted_per_position, strict=True)
        return DraftCounts(self.drafts - earlier.drafts, tuple(a - b for a, b in pairs))

    @property
    def acceptance(self) -> float:
        """Share of the first drafted tokens that were kept; nan without drafts."""
        return self.accepted_per_position[0] / self.drafts if self.drafts else float("nan")


def request_seed(run_seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """Return a request's seed, the same in every process and on every resumption.

    The first 63 bits of the BLAKE2b hash of the four numbers.

    >>> request_seed(42, 0, 0, 0)
    347772239599717967
    """
    key = f"{run_seed},{step},{prompt_index},{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


class Engine:
    """A running vLLM engine on one policy. Use `Engine.start`; close it when done."""

    # vLLM keeps one set of process groups for all engines of a process.
    _running: ClassVar[int] = 0
    _made_group: ClassVar[bool] = False

    def __init__(
        self, llm: Any, link: Link, stop_token_ids: list[int], records_routing: bool
    ) -> None:
        self.llm = llm
        self.link = link
        self.stop_token_ids = stop_token_ids
        self.records_routing = records_routing
        self._usable = True
        self._kept: Counter[int] = Counter()  # tokens of a draft that were kept -> drafts

    @classmethod
    def start(
        cls,
        checkpoint: Path | str,
        config: RolloutSettings,
        *,
        load_weights: bool = True,
        record_routing: bool = False,
    ) -> "Engine":
        """Start vLLM on a checkpoint folder in the released layout.

        Without `load_weights` only config.json is read, and nothing can be generated before a
        sync. Where torch.distributed runs with several processes, each must start its engine at
        the same time; with tensor_parallel_size > 1 a group of them runs one engine, and must
        also generate, score and sync at the same time, each with requests of its own.
        With `record_routing` completions come with their expert choices (see `routing`).
        Random state, threads and environment of this process stay as they were.
        Raises EngineError for settings that vLLM would take and compute wrongly.
        """
        folder = Path(checkpoint)
        model = json.loads((folder / "config.json").read_text())
        on_cpu = environment.on_cpu()
        check(model, config, on_cpu, record_routing)
        launch.prepare(model, record_routing)
        if not cls._running:
            cls._made_group = not torch.distributed.is_initialized()
        with launch.untouched(), launch.quiet():
            from vllm import LLM

            corrections.register()
            llm = LLM(**launch.arguments(folder, model, config, load_weights, record_routing))
            link = Link(llm, model["num_hidden_layers"])
            if record_routing and on_cpu:
                llm.collective_rpc("policy_record_routing")
        engine = cls(llm, link, launch.stop_tokens(folder, model), record_routing)
        cls._running += 1
        engine._usable = load_weights
        return engine

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: "Sequence[SamplingParams] | SamplingParams",
        *,
        count_drafts: bool = True,
    ) -> list[Completion]:
        """Complete each prompt (token ids); log-probs are those after temperature and top-p.

        The checkpoint's end-of-sequence tokens stop a completion, unless `ignore_eos` is set, and
        are part of it. `n` must be 1: repeat the prompt, with a seed for each.
        """
        from vllm import SamplingParams

        if isinstance(sampling, SamplingParams):
            sampling = [sampling] * len(prompts)
        outputs = self._run(prompts, [self._request(s) for s in sampling])
        experts = self._experts(outputs) if self.records_routing else [None] * len(outputs)
        if count_drafts:
            for output in outputs:
                if metrics := output.outputs[0].spec_decode_metrics:
                    self._kept.update(dict(enumerate(metrics.histogram)))
        return [
            Completion(
                list(output.outputs[0].token_ids),
                list(output.outputs[0].logprobs.logprobs),
                output.outputs[0].finish_reason,
                record,
            )
            for output, record in zip(outputs, experts, strict=True)
        ]

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Return the log-probs at temperature 1 of tokens 1..n-1 of each sequence, by prefill."""
        from vllm import SamplingParams

        request = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, flat_logprobs=True
        )
        outputs = self._run(sequences, [request] * len(sequences))
        return [list(output.prompt_logprobs.logprobs) for output in outputs]

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]]) -> SyncReport:
        """Replace all weights by a stream of (checkpoint name, tensor), and verify them.

        Raises SyncError; the engine then refuses to generate until a sync has passed.
        """
        self._usable = False
        report = self.link.sync(named_tensors)
        self._usable = True
        return report

    def draft_counts(self) -> DraftCounts:
        """Return how many drafts `generate` has made and kept since the start."""
        depth = self.llm.llm_engine.vllm_config.num_speculative_tokens
        longer = [sum(n for kept, n in self._kept.items() if kept > k) for k in range(depth)]
        return DraftCounts(self._kept.total(), tuple(longer))

    def close(self) -> None:
        """Shut vLLM down and free its memory; the trainer's process group stays as it is."""
        from vllm import envs
        from vllm.distributed import parallel_state
        from vllm.v1.engine import core

        self._usable = False
        clean = core.cleanup_dist_env_and_memory
        core.cleanup_dist_env_and_memory = lambda: None  # it would destroy every group there is
        try:
            self.llm.llm_engine.engine_core.shutdown()
        finally:
            core.cleanup_dist_env_and_memory = clean
        del self.llm, self.link
        envs.disable_envs_cache()
        Engine._running -= 1
        if not Engine._running:
            parallel_state.destroy_model_parallel()
            if Engine._made_group:
                parallel_state.destroy_distributed_environment()
            elif parallel_state._WORLD is not None:
                parallel_state._WORLD.destroy()
                parallel_state._WORLD = None
        gc.collect()

    def _experts(self, outputs: list[Any]) -> list[Tensor]:
        """Return the expert choices of each output; see `routing`."""
        if not environment.on_cpu():
            model = self.llm.llm_engine.model_config.hf_text_config.to_dict()
            layers, experts = launch.moe_layers(model), model["n_routed_experts"]
            if any(o.outputs[0].routed_experts is None for o in outputs):
                raise EngineError("vLLM returned completions without their expert choices")
            return [returned(o.outputs[0].routed_experts, layers, experts) for o in outputs]
        lengths = {
            o.request_id: len(o.prompt_token_ids) + len(o.outputs[0].token_ids) for o in outputs
        }
        records = self.llm.collective_rpc("policy_take_routing", args=(lengths,))[0]
        return [records[o.request_id] for o in outputs]

    def _request(self, sampling: "SamplingParams") -> "SamplingParams":
        if sampling.n != 1:
            raise ValueError(f"sampling.n must be 1, not {sampling.n}: repeat the prompt instead")
        request = sampling.clone()
        request.logprobs = 0
        request.flat_logprobs = True
        request.detokenize = False
        if not request.ignore_eos:
            request.stop_token_ids = sorted({*(request.stop_token_ids or ()), *self.stop_token_ids})
            request.__post_init__()
        return request

    def _run(self, prompts: Sequence[list[int]], requests: list["SamplingParams"]) -> list[Any]:
        if not self._usable:
            raise SyncError("the engine holds no verified weights; remedy: sync them first")
        everybody, own = _joined([(list(p), r) for p, r in zip(prompts, requests, strict=True)])
        engine = self.llm.llm_engine
        if self.records_routing and environment.on_cpu():  # of an interrupted run, or of scores
            self.llm.collective_rpc("policy_take_routing", args=({},))
        with launch.untouched():
            try:
                outputs = self.llm.generate(
                    [{"prompt_token_ids": prompt} for prompt, _ in everybody],
                    [request for _, request in everybody],
                    use_tqdm=False,
                )
            except BaseException:  # an interruption too must leave no request behind
                left = list(engine.output_processor.request_states)
                engine.abort_request(left, internal=True)
                raise
        return outputs[own]


def _joined(pairs: list[tuple[list[int], Any]]) -> tuple[list[tuple[list[int], Any]], slice]:
    """Join the requests of the processes that run one tensor-parallel engine between them.

    Each computes a part of every request and keeps the outputs of its own: (all requests, own).
    Without a seed the processes would draw different tokens: ValueError.
    """
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return pairs, slice(None)
    parts: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(parts, pairs, group=group.cpu_group)
    everybody = [pair for part in parts for pair in part]
    if any(request.seed is None and request.temperature > 0 for _, request in everybody):
        raise ValueError("a request has no seed; with tensor_parallel_size > 1 each must have one")
    first = sum(len(part) for part in parts[: group.rank_in_group])
    return everybody, slice(first, first + len(pairs))
