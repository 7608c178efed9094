"""The rules for single fields: which exist, which posttrain sets itself, and their limits."""

from collections.abc import Collection, Mapping
from typing import Any

from posttrain.recipe.kinds import did_you_mean
from posttrain.recipe.source import Key, Source

_ROLLOUT = "this is the rollout engine's: set `rollout.{}`"
_OWN_ENGINE = "rollouts run in posttrain's own vLLM engine; see the section `rollout`"
_RESERVED = {
    "output_dir": "results go to <output_root>/<name>/<stage>: set `output_root` or `name`",
    "seed": "one seed rules the whole run: set the top-level `seed`",
    "resume_from_checkpoint": "resume with the option --resume",
    "do_train": "a stage always trains: use the command `posttrain eval` to score alone",
    "do_eval": "set the section `eval`",
    "do_predict": "use the command `posttrain eval`",
    "model_init_kwargs": "set the fields of `policy`",
    "trust_remote_code": "policies are built from posttrain's own code; leave it out",
    "router_aux_loss_coef": "balance is kept by the router's bias and the sequence-wise loss; leave it out",
    "reward_weights": "set `weight` on each item of `rewards`",
    "remove_unused_columns": "rewards need the columns of the data; leave it out",
    "eval_strategy": "accuracy is measured by generation before and after: set `data.eval`",
    "fp16": "gradients in float16 are not scaled here: set `bf16`, or train in float32",
    "save_only_model": "a step checkpoint is there for --resume; leave it out",
    "auto_find_batch_size": "a changed batch breaks the groups; set `per_device_train_batch_size` lower",
    "load_best_model_at_end": "the final checkpoint is the last one; leave it out",
    "vllm_structured_outputs_regex": _OWN_ENGINE,
    "vllm_gpu_memory_utilization": _ROLLOUT.format("gpu_memory_utilization"),
    "vllm_max_model_length": _ROLLOUT.format("max_model_len"),
    "vllm_tensor_parallel_size": _ROLLOUT.format("tensor_parallel_size"),
    "vllm_enable_sleep_mode": _OWN_ENGINE,
    "vllm_group_port": _OWN_ENGINE,
    "vllm_mode": _OWN_ENGINE,
    "vllm_model_impl": _OWN_ENGINE,
    "vllm_server_base_url": _OWN_ENGINE,
    "vllm_server_host": _OWN_ENGINE,
    "vllm_server_port": _OWN_ENGINE,
    "vllm_server_timeout": _OWN_ENGINE,
    "use_vllm": _OWN_ENGINE,
    "use_transformers_continuous_batching": _OWN_ENGINE,
    "use_transformers_paged": _OWN_ENGINE,
    "transformers_continuous_batching_config": _OWN_ENGINE,
    "cache_implementation": _OWN_ENGINE,
}

# Words that TRL declares as plain strings, and compares with these alone.
_WORDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "sft": {"loss_type": ("nll", "dft")},
    "grpo": {
        "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
        "importance_sampling_level": ("token", "sequence"),
        "vllm_importance_sampling_mode": (
            "token_truncate",
            "token_mask",
            "sequence_truncate",
            "sequence_mask",
        ),
        "scale_rewards": ("group", "batch", "none", True, False),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    },
}
_NOT_BELOW_ZERO = (
    "learning_rate",
    "weight_decay",
    "mtp_loss_weight",
    "bias_update_rate",
    "sequence_balance_weight",
    "beta",
    "epsilon",
    "epsilon_high",
)


def trainer_value(source: Source, key: Key, value: Any) -> None:
    """Note a fault for a value that a trainer would refuse late, or take and misread."""
    words = _WORDS.get(str(key[0]), {}).get(str(key[-1]))
    if words is not None and value is not None and value not in words:
        names = [word for word in words if isinstance(word, str)]
        source.fault(key, f"expected {did_you_mean(str(value), names)}, got {value!r}")
    if key[-1] in _NOT_BELOW_ZERO and value is not None and value < 0:
        source.fault(key, f"must not be below 0, got {value}")


def reserved(source: Source, key: Key) -> bool:
    """Note a fault when posttrain sets this trainer field itself."""
    remedy = _RESERVED.get(str(key[-1])) if key[0] in ("sft", "grpo") else None
    if remedy:
        source.fault(key, f"posttrain sets this itself: {remedy}")
    return remedy is not None


def unknown(source: Source, key: Key, known: Collection[str]) -> None:
    """Note a fault for a field that does not exist."""
    ours = _RESERVED if key[0] in ("sft", "grpo") else {}
    hint = did_you_mean(str(key[-1]), [name for name in known if name not in ours])
    if hint.startswith("one of"):
        hint = (
            f"the fields here are {hint[7:]}" if len(known) <= 20 else "and none has a similar name"
        )
        source.fault(key, f"unknown field; {hint}")
    else:
        source.fault(key, f"unknown field; did you mean {hint}?")


def bounds(source: Source, key: Key, value: Any, limits: Mapping[str, Any]) -> None:
    """Note a fault for a value outside a section field's limits."""
    if value is None:
        return
    if "one_of" in limits and value not in limits["one_of"]:
        source.fault(key, f"expected {did_you_mean(value, limits['one_of'])}, got {value!r}")
    if "at_least" in limits and value < limits["at_least"]:
        source.fault(key, f"must be at least {limits['at_least']}, got {value}")
    if "above" in limits and not value > limits["above"]:
        source.fault(key, f"must be above {limits['above']}, got {value}")
    if "at_most" in limits and value > limits["at_most"]:
        source.fault(key, f"must be at most {limits['at_most']}, got {value}")
