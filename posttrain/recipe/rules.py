"""The rules that tie a recipe's fields to one another; each fault says what holds, what was given, what helps."""

import os
from pathlib import Path
from typing import Any

import yaml

from posttrain.recipe import paths
from posttrain.recipe.fields import sampling_schema, trainer_schema
from posttrain.recipe.limits import unknown
from posttrain.recipe.policy_rules import check_config, mtp_modules
from posttrain.recipe.sections import DataSource, Recipe
from posttrain.recipe.source import Key, Source

_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "steps_per_generation",
    "generation_batch_size",
    "num_iterations",
)
_FIELD = "set `grpo.{}`"
_OWN_SAMPLING = {
    "n": _FIELD.format("num_generations"),
    "max_tokens": _FIELD.format("max_completion_length"),
    **{
        name: _FIELD.format(name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    },
    "seed": "requests are seeded from the top-level `seed`",
    "logprobs": "the loss needs that of each sampled token, and no other",
    "flat_logprobs": "leave it out",
    "detokenize": "leave it out",
}


def launched_processes(recipe: Recipe) -> int:
    """Return how many processes train: those running now, else those of the recipe's accelerate file, else 1."""
    running = os.environ.get("WORLD_SIZE", "")
    if running.isdigit():
        return int(running)
    if recipe.accelerate is None:
        return 1
    return int(accelerate_config(recipe.accelerate).get("num_processes", 1))


def accelerate_config(path: str) -> dict[str, Any]:
    """Read an `accelerate launch` configuration; ValueError or OSError when it is none."""
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("not a mapping")
    return config


def check(recipe: Recipe, source: Source, file: Path) -> None:
    """Note every broken rule; a rule whose own fields have faults already is passed over."""
    if Path(recipe.name).name != recipe.name:
        source.fault(
            ("name",), f"becomes a folder's name and must not hold a slash, got {recipe.name!r}"
        )
    paths.resolve(recipe, source, file)
    processes = _processes(recipe, source)
    _policy(recipe, source)
    _data(recipe, source)
    if recipe.sft is None and recipe.grpo is None and source.sound("sft", "grpo"):
        source.fault((), "there is nothing to train: give a section `sft`, `grpo` or both")
    packing = (recipe.sft or {}).get("packing_strategy", "bfd")
    if packing not in ("bfd", "bfd_split") and source.sound("sft.packing_strategy"):
        source.fault(
            ("sft", "packing_strategy"),
            f"must be bfd or bfd_split (wrapped lets a document see the one before it), got {packing}",
        )
    if recipe.grpo is not None:
        _sampling(recipe.grpo, source)
        _correction(recipe.grpo, source)
        _groups(recipe.grpo, processes, source)
        _lengths(recipe, source)
    _engine(recipe, processes, source)
    _rewards(recipe, source)


def _processes(recipe: Recipe, source: Source) -> int:
    if not source.sound("accelerate"):
        return 1
    try:
        return launched_processes(recipe)
    except (OSError, ValueError, yaml.YAMLError) as error:
        source.fault(
            ("accelerate",), f"{recipe.accelerate} is no accelerate configuration: {error}"
        )
        return 1


def _policy(recipe: Recipe, source: Source) -> None:
    policy = recipe.policy
    if policy.config is not None:
        check_config(policy.config, source)
    given = [
        name
        for name in ("path", "config")
        if (source.values.get("policy") or {}).get(name) is not None
    ]
    if len(given) != 1 and ("policy",) not in source.bad:
        got = "both" if given else "neither"
        source.fault(
            ("policy",),
            f"give exactly one of `path` (a checkpoint) and `config` (from scratch), got {got}",
        )
    if policy.tokenizer is None:
        policy.tokenizer = policy.path
        if policy.path is None and source.sound("policy.tokenizer", "policy.path"):
            source.fault(
                ("policy", "tokenizer"), "a policy from scratch needs one: a folder or a hub name"
            )
    if recipe.rollout.num_speculative_tokens and source.sound("rollout", "policy"):
        modules = mtp_modules(policy)
        if modules == 0:
            source.fault(
                ("rollout", "num_speculative_tokens"),
                "drafting needs an MTP module, and the policy has none: set `policy.num_nextn_predict_layers: 1`",
            )


def _data(recipe: Recipe, source: Source) -> None:
    data = recipe.data
    for stage, role in (("sft", "sft"), ("grpo", "train")):
        if (
            getattr(recipe, stage) is not None
            and getattr(data, role) is None
            and source.sound(f"data.{role}")
        ):
            source.fault(("data",), f"the stage `{stage}` needs the source `data.{role}`")
    held_out, count = data.eval, recipe.eval.count
    if held_out is not None and held_out.size is not None and held_out.size < count:
        key = ("eval", "count") if "eval" in source.values else ("data", "eval", "size")
        if source.sound("data.eval", "eval.count"):
            source.fault(
                key, f"eval.count {count} is more than the rows of data.eval, {held_out.size}"
            )
    scratch = recipe.policy.path is None and source.sound("policy")
    if recipe.sft is None and recipe.grpo is not None and scratch:
        source.fault(
            ("policy", "path"), "without a section `sft`, GRPO needs a checkpoint to start from"
        )
    for role in ("sft", "train", "eval"):
        one = getattr(data, role)
        if one is not None and source.sound(f"data.{role}"):
            _one_source(one, ("data", role), source)


def _one_source(data: DataSource, key: Key, source: Source) -> None:
    given = [name for name in ("hub", "path", "script") if getattr(data, name) is not None]
    if len(given) != 1:
        got = " and ".join(f"`{name}`" for name in given) or "none"
        source.fault(key, f"give exactly one of `hub`, `path` and `script`, got {got}")
        return
    if data.hub is None and data.name is not None:
        source.fault((*key, "name"), "a configuration's name goes with `hub`")
    if data.path is not None and data.split is not None:
        source.fault((*key, "split"), "a local file is one split; leave it out")
    if data.script is not None:
        if data.split is None or data.size is None:
            source.fault(
                key,
                "a script needs `split` and `size`, which are handed to its rows(split, size, seed)",
            )
        for name in ("prompt", "completion", "answer", "answer_after"):
            if getattr(data, name) is not None:
                source.fault((*key, name), "a script's rows are used as they are; leave it out")
    if data.answer_after is not None and data.answer_boxed:
        source.fault((*key, "answer_boxed"), "give `answer_after` or `answer_boxed`, not both")


def _groups(grpo: dict[str, Any], processes: int, source: Source) -> None:
    """Check that a generation batch holds whole groups, by TRL's rules."""
    fields = trainer_schema("grpo").fields

    def get(name: str) -> Any:
        value = grpo.get(name)
        return fields[name].default if value is None else value

    for name in _AT_LEAST_ONE:
        value = grpo.get(name)
        if value is not None and value < 1:
            source.fault(("grpo", name), f"must be at least 1, got {value}")
    if not source.sound("grpo.num_generations", *(f"grpo.{name}" for name in _AT_LEAST_ONE)):
        return
    group, device = get("num_generations"), get("per_device_train_batch_size")
    if group < 2:
        source.fault(
            ("grpo", "num_generations"), f"a group needs at least 2 answers to compare, got {group}"
        )
        return
    batch, steps = grpo.get("generation_batch_size"), grpo.get("steps_per_generation")
    if batch is not None and steps is not None:
        source.fault(
            ("grpo", "steps_per_generation"),
            "give this or `generation_batch_size`; each follows from the other",
        )
        return
    if batch is not None and batch % (device * processes):
        source.fault(
            ("grpo", "generation_batch_size"),
            f"must be a multiple of per_device_train_batch_size {device} x {processes} processes, got {batch}",
        )
        return
    how = "generation_batch_size"
    if batch is None:
        name = "gradient_accumulation_steps" if steps is None else "steps_per_generation"
        factor = get("gradient_accumulation_steps") if steps is None else steps
        batch = device * factor * processes
        how = f"per_device_train_batch_size {device} x {name} {factor} x {processes} processes ="
    if batch % group:
        key = "num_generations" if "num_generations" in grpo else "per_device_train_batch_size"
        lower, upper = batch - batch % group, batch - batch % group + group
        near = f"{lower} or {upper}" if lower else str(upper)
        source.fault(
            ("grpo", key),
            f"the batch of {how} {batch} must hold whole groups of num_generations {group}: make it {near}",
        )


def _sampling(grpo: dict[str, Any], source: Source) -> None:
    """Check the names of further sampling parameters, and that no field of its own rules them."""
    key = ("grpo", "generation_kwargs")
    given = grpo.get("generation_kwargs") or {}
    if not isinstance(given, dict):
        source.fault(key, f"expected a mapping of vLLM's SamplingParams, got {given!r}")
        return
    for name in given:
        if name in _OWN_SAMPLING:
            source.fault((*key, name), f"posttrain sets this itself: {_OWN_SAMPLING[name]}")
        elif name not in sampling_schema().fields:
            unknown(source, (*key, name), sampling_schema().fields)


def _correction(grpo: dict[str, Any], source: Source) -> None:
    """VESPO weighs tokens, and so must the correction beside it."""
    corrected = grpo.get("vllm_importance_sampling_correction", True)
    default = trainer_schema("grpo").fields["vllm_importance_sampling_mode"].default
    mode = grpo.get("vllm_importance_sampling_mode", default)
    if grpo.get("loss_type") == "vespo" and corrected and not mode.startswith("token_"):
        source.fault(
            ("grpo", "loss_type"),
            f"vespo goes with vllm_importance_sampling_mode token_truncate or token_mask, got {mode}",
        )


def _lengths(recipe: Recipe, source: Source) -> None:
    if not source.sound("grpo.max_completion_length", "rollout.max_model_len"):
        return
    grpo = recipe.grpo or {}
    longest = grpo.get("max_completion_length")
    if longest is None:
        longest = trainer_schema("grpo").fields["max_completion_length"].default
    room = recipe.rollout.max_model_len
    if room <= longest:
        source.fault(
            ("rollout", "max_model_len")
            if "rollout" in source.values
            else ("grpo", "max_completion_length"),
            f"must leave room for a prompt: rollout.max_model_len {room} is not above "
            f"grpo.max_completion_length {longest}",
        )


def _engine(recipe: Recipe, processes: int, source: Source) -> None:
    rollout = recipe.rollout
    if not source.sound("rollout", "accelerate"):
        return
    if processes % rollout.tensor_parallel_size:
        source.fault(
            ("rollout", "tensor_parallel_size"),
            f"must divide the number of processes {processes}, got {rollout.tensor_parallel_size}",
        )
    known = (recipe.policy.config or {}).get("max_position_embeddings")
    if known is not None and source.sound("policy.config") and rollout.max_model_len > known:
        source.fault(
            ("rollout", "max_model_len"),
            f"must be at most the policy's max_position_embeddings {known}, got {rollout.max_model_len}",
        )
    if 2 * recipe.parity.tokens >= rollout.max_model_len and source.sound("parity"):
        source.fault(
            ("parity", "tokens"),
            f"twice as many must be below rollout.max_model_len {rollout.max_model_len}, "
            f"got {recipe.parity.tokens}",
        )
    if recipe.eval.max_tokens >= rollout.max_model_len and source.sound("eval"):
        source.fault(
            ("eval", "max_tokens"),
            f"must be below rollout.max_model_len {rollout.max_model_len}, got {recipe.eval.max_tokens}",
        )


def _rewards(recipe: Recipe, source: Source) -> None:
    scored = recipe.grpo is not None or recipe.data.eval is not None
    if scored and not recipe.rewards and source.sound("rewards"):
        source.fault(
            ("rewards",),
            "GRPO and `data.eval` need at least one, the first says what is right: `- {name: math}`",
        )
    if (
        recipe.rewards
        and all(reward.weight == 0 for reward in recipe.rewards)
        and source.sound("rewards")
    ):
        source.fault(("rewards",), "every weight is 0: give one of them a weight")
    for i, reward in enumerate(recipe.rewards):
        if source.sound(f"rewards.{i}"):
            try:
                reward.load()
            except (ValueError, TypeError) as error:
                source.fault(("rewards", i, "name"), str(error))
