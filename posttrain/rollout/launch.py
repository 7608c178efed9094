"""How vLLM is started inside the trainer's process: its arguments, its environment, its manners."""

import contextlib
import json
import logging
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from posttrain import environment
from posttrain.rollout.worker import EXTENSION

MLA_KERNEL = (512, 64)
"""The only (kv_lora_rank, qk_rope_head_dim) that vLLM's CPU kernel for latent attention takes."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""The sizes of qk_nope_head_dim + qk_rope_head_dim that its CPU kernel for full attention takes."""

QUIET = (
    "vllm.renderers.base",  # the engine has no tokenizer
    "vllm.model_executor.model_loader.reload.layerwise",  # a module without weights gets none
)
"""Loggers whose warnings, at work, tell what is meant here."""


class EngineError(ValueError):
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


def check(
    model: dict[str, Any], config: RolloutSettings, on_cpu: bool, record_routing: bool = False
) -> None:
    """Refuse what vLLM cannot do or would compute wrongly.

    Raises EngineError naming field, rule and remedy.
    """
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
    if record_routing and not moe_layers(model):
        raise EngineError(
            "expert choices cannot be recorded: the policy has no layer with experts; remedy: leave "
            "routing replay and the split of the mismatch off"
        )
    if record_routing and not on_cpu and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        raise EngineError(
            "VLLM_USE_V2_MODEL_RUNNER is 0, but vLLM returns expert choices from that runner only; "
            "remedy: unset it, or leave routing replay and the split of the mismatch off"
        )
    nope, rope = model.get("qk_nope_head_dim", 128), model.get("qk_rope_head_dim", 64)
    if on_cpu and _latent(model) != MLA_KERNEL and nope + rope not in CPU_HEAD_SIZES:
        raise EngineError(
            f"qk_nope_head_dim {nope} + qk_rope_head_dim {rope} is {nope + rope}, and vLLM's attention "
            f"on a CPU takes {', '.join(map(str, CPU_HEAD_SIZES))}; remedy: choose sizes that add up to one"
        )
    for field, value in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
        if model.get("n_routed_experts") and model.get(field) != value:
            raise EngineError(
                f'config.json: {field} must be "{value}", not {model.get(field)!r}: without it '
                "vLLM routes without the bias; remedy: save the policy with posttrain"
            )


def moe_layers(model: dict[str, Any]) -> list[int]:
    """Return which layers of the trunk have experts, by config.json."""
    if not model.get("n_routed_experts"):
        return []
    return list(range(model.get("first_k_dense_replace", 0), model["num_hidden_layers"]))


def _latent(model: dict[str, Any]) -> tuple[int | None, int | None]:
    return model.get("kv_lora_rank"), model.get("qk_rope_head_dim")


def prepare(model: dict[str, Any], record_routing: bool = False) -> None:
    """Set the environment that vLLM reads, on import and while it starts."""
    environment.prepare()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if environment.on_cpu():
        # Other sizes keep full keys and values: right, with a larger cache.
        os.environ["VLLM_MLA_DISABLE"] = "0" if _latent(model) == MLA_KERNEL else "1"
    elif record_routing:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # the only one that returns expert choices


def arguments(
    folder: Path,
    model: dict[str, Any],
    config: RolloutSettings,
    load_weights: bool,
    record_routing: bool = False,
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
        if record_routing:
            found["enable_return_routed_experts"] = True
            found["enable_prefix_caching"] = True  # what vLLM keeps such records beside
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes % config.tensor_parallel_size:
        raise EngineError(
            f"tensor_parallel_size {config.tensor_parallel_size} must divide the number of processes "
            f"{processes}; remedy: start as many with `accelerate launch --num_processes`"
        )
    if processes > 1:
        found["tensor_parallel_size"] = config.tensor_parallel_size
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
def quiet() -> Iterator[None]:
    """Keep back what vLLM says on its way up about choices made here (no tokenizer, no graphs).

    Errors pass; everything does when VLLM_LOGGING_LEVEL is set to other than WARNING.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside vLLM and torch
        import vllm.logger  # sets the levels

        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        log = logging.getLogger(vllm.__name__)
        level = log.level
        if os.environ["VLLM_LOGGING_LEVEL"] == "WARNING":
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


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
    kernels: Any = torch.ops._C
    kernels.init_cpu_memory_env = lambda nodes: None
    try:
        yield
    finally:
        del kernels.init_cpu_memory_env
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
