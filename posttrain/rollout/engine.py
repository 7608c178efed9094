"""vLLM in this process: start it, generate, score, count drafts, close it.

On a CPU the engine runs eagerly in the trainer's threads with vLLM's faults corrected. The same code
starts vLLM on CUDA; that path has not been run yet.
"""

import contextlib
import hashlib
import json
import logging
import os
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from posttrain import environment
from posttrain.rollout import corrections
from posttrain.rollout.sync import Link, SyncError, SyncReport
from posttrain.rollout.worker import EXTENSION

if TYPE_CHECKING:
    from vllm import SamplingParams

MLA_KERNEL = (512, 64)
"""The only (kv_lora_rank, qk_rope_head_dim) that vLLM's CPU kernel for latent attention takes."""


QUIET = (
    "vllm.renderers.base",  # no tokenizer in the engine
    "vllm.v1.worker.cpu_worker",  # no threads of its own
    "vllm.model_executor.model_loader.reload.layerwise",  # a module without weights gets none
)
"""Loggers whose warnings tell what is meant here."""


class EngineError(RuntimeError):
    """The engine cannot be started, or used, as asked."""


class RolloutSettings(Protocol):
    """What a recipe's `rollout` section says; vLLM's names where it has one."""

    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float
    kv_cache_memory_gib: float
    dtype: str
    num_speculative_tokens: int
    tensor_parallel_size: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """One generated sequence. logprobs: of each token, under the distribution it was drawn from.

    finish_reason: "stop" (the last token ends the text) or "length".
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


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

    def __init__(self, llm: Any, link: Link, stop_token_ids: list[int], owns_group: bool) -> None:
        self.llm = llm
        self.link = link
        self.stop_token_ids = stop_token_ids
        self._owns_group = owns_group
        self._usable = True
        self._kept: Counter[int] = Counter()  # tokens of a draft that were kept -> drafts

    @classmethod
    def start(
        cls, checkpoint: Path | str, config: RolloutSettings, *, load_weights: bool = True
    ) -> "Engine":
        """Start vLLM on a checkpoint folder in the released layout.

        Without `load_weights` only config.json is read, and nothing can be generated before a
        sync. Where torch.distributed runs with several processes, each must start its engine at
        the same time. Random state, threads and environment of this process stay as they were.
        Raises EngineError for settings that vLLM would take and compute wrongly.
        """
        folder = Path(checkpoint)
        model = json.loads((folder / "config.json").read_text())
        check(model, config, environment.on_cpu())
        prepare(model)
        owns_group = not torch.distributed.is_initialized()
        with untouched(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside vLLM and torch
            from vllm import LLM

            corrections.register()
            llm = LLM(**arguments(folder, model, config, load_weights))
            link = Link(llm, model["num_hidden_layers"])
        engine = cls(llm, link, stop_tokens(folder, model), owns_group)
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
        if count_drafts:
            for output in outputs:
                if metrics := output.outputs[0].spec_decode_metrics:
                    self._kept.update(dict(enumerate(metrics.histogram)))
        return [
            Completion(
                list(output.outputs[0].token_ids),
                list(output.outputs[0].logprobs.logprobs),
                output.outputs[0].finish_reason,
            )
            for output in outputs
        ]

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Return the log-probs at temperature 1 of tokens 1..n-1 of each sequence, by prefill."""
        from vllm import SamplingParams

        request = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, flat_logprobs=True
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
        """Shut vLLM down and free its memory; another engine can then be started."""
        from vllm import envs
        from vllm.distributed import parallel_state

        self._usable = False
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.link
        envs.disable_envs_cache()
        if self._owns_group:
            parallel_state.cleanup_dist_env_and_memory()
        else:
            parallel_state.destroy_model_parallel()

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
        engine = self.llm.llm_engine
        with untouched():
            try:
                return self.llm.generate(
                    [{"prompt_token_ids": list(prompt)} for prompt in prompts],
                    requests,
                    use_tqdm=False,
                )
            except BaseException:  # an interruption too must leave no request behind
                left = list(engine.output_processor.request_states)
                engine.abort_request(left, internal=True)
                raise


def check(model: dict[str, Any], config: RolloutSettings, on_cpu: bool) -> None:
    """Refuse what vLLM would compute wrongly; raises EngineError naming field, rule and remedy."""
    drafts, depth = config.num_speculative_tokens, model.get("num_nextn_predict_layers", 0)
    if drafts > 0 and not depth:
        raise EngineError(
            f"num_speculative_tokens is {drafts}, but the policy has no MTP module to draft with; "
            "remedy: set it to 0, or policy.num_nextn_predict_layers to 1"
        )
    if drafts > 1 and depth > 1 and on_cpu:
        raise EngineError(
            f"num_speculative_tokens is {drafts} with {depth} MTP modules: on a CPU vLLM runs the "
            "first module for every draft; remedy: set it to 1"
        )
    if config.tensor_parallel_size > 1:
        raise EngineError(
            f"tensor_parallel_size is {config.tensor_parallel_size}: weights split over several "
            "workers cannot be read back and verified yet; remedy: set it to 1"
        )
    for field, value in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
        if model.get("n_routed_experts") and model.get(field) != value:
            raise EngineError(
                f'config.json: {field} must be "{value}", not {model.get(field)!r}: without it '
                "vLLM routes without the bias; remedy: save the policy with posttrain"
            )


def prepare(model: dict[str, Any]) -> None:
    """Set the environment that vLLM reads, on import and while it starts."""
    environment.prepare()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if environment.on_cpu():
        latent = (model.get("kv_lora_rank"), model.get("qk_rope_head_dim"))
        # Other sizes keep full keys and values: right, with a larger cache.
        os.environ["VLLM_MLA_DISABLE"] = "0" if latent == MLA_KERNEL else "1"
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


def arguments(
    folder: Path, model: dict[str, Any], config: RolloutSettings, load_weights: bool
) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM`."""
    found: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "auto" if load_weights else "dummy",
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "seed": config.seed,
        "generation_config": "vllm",
        "use_tqdm_on_load": False,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": EXTENSION,
    }
    if config.num_speculative_tokens > 0:
        found["speculative_config"] = {
            "method": "mtp",
            "num_speculative_tokens": config.num_speculative_tokens,
        }
        found["per_request_spec_decode_metrics"] = "summary"
    if environment.on_cpu():
        found["enforce_eager"] = True
        found["kv_cache_memory_bytes"] = int(config.kv_cache_memory_gib * 2**30)
        if os.environ["VLLM_MLA_DISABLE"] == "0":
            # The AMX kernel takes the latent projection's weight away: it could not be verified.
            found["attention_config"] = {"backend": "CPU_MLA"}
    else:
        found["gpu_memory_utilization"] = config.gpu_memory_utilization
        found["kernel_config"] = {"moe_backend": "triton"}  # a layout that can be read back
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        found["distributed_executor_backend"] = "external_launcher"
        os.environ.setdefault("RANK", str(torch.distributed.get_rank()))
        os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    return found


def stop_tokens(folder: Path, model: dict[str, Any]) -> list[int]:
    """Return the checkpoint's end-of-sequence tokens: generation_config.json's, else config.json's."""
    file = folder / "generation_config.json"
    generation = json.loads(file.read_text()) if file.exists() else {}
    tokens = generation.get("eos_token_id", model.get("eos_token_id"))
    if tokens is None:
        return []
    return [tokens] if isinstance(tokens, int) else list(tokens)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Keep what vLLM would change in the trainer's process.

    Random states of python, numpy and torch; the environment, except for vLLM's own variables;
    `torch.set_num_threads`, which vLLM replaces by a function that does nothing; and where memory
    comes from: vLLM would bind all of the process to one NUMA node.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    variables = dict(os.environ)
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    torch.ops._C.init_cpu_memory_env = lambda nodes: None
    try:
        yield
    finally:
        del torch.ops._C.init_cpu_memory_env
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name in set(os.environ) - set(variables):
            if not name.startswith("VLLM_"):
                del os.environ[name]
        for name, value in variables.items():
            if os.environ.get(name) != value and not name.startswith("VLLM_"):
                os.environ[name] = value
