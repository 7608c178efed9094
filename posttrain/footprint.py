"""What a policy holds in memory while it trains and generates, from its real shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DeepseekV3Config

from posttrain import environment
from posttrain.policy.model import PolicyForCausalLM
from posttrain.rollout.launch import MLA_KERNEL

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shapes:
    """Numbers of parameters: all, those one token uses, and those of the MTP modules (in neither of the former)."""

    trunk: int
    active: int
    mtp: int

    @property
    def total(self) -> int:
        """All that is trained and stored."""
        return self.trunk + self.mtp


@dataclass(frozen=True)
class Layout:
    """How `accelerate launch` spreads a model: what of it each process holds.

    stage: 0 nothing is shared out, 1 optimizer states, 2 gradients too, 3 parameters too (FSDP, ZeRO-3).
    """

    kind: str
    processes: int
    machines: int = 1
    stage: int = 0
    mixed_precision: bool = False
    states_on_host: bool = False
    parameters_on_host: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any] | None, processes: int) -> "Layout":
        """Read it from an accelerate configuration; None is plain data parallelism."""
        config = config or {}
        kind = str(config.get("distributed_type", "NO"))
        common: dict[str, Any] = {
            "processes": processes,
            "machines": int(config.get("num_machines", 1)),
            "mixed_precision": config.get("mixed_precision", "no") not in ("no", False),
        }
        if kind == "FSDP":
            fsdp = config.get("fsdp_config", {})
            offload = bool(fsdp.get("fsdp_offload_params"))
            stage = 3 if fsdp.get("fsdp_reshard_after_forward", True) else 2
            name = f"FSDP{fsdp.get('fsdp_version', 1)}"
            return cls(
                name, stage=stage, states_on_host=offload, parameters_on_host=offload, **common
            )
        if kind == "DEEPSPEED":
            zero = config.get("deepspeed_config", {})
            stage = int(zero.get("zero_stage", 2))
            return cls(
                f"ZeRO-{stage}",
                stage=stage,
                states_on_host=zero.get("offload_optimizer_device", "none") != "none",
                parameters_on_host=zero.get("offload_param_device", "none") != "none",
                **common,
            )
        return cls("DDP" if processes > 1 else "one process", **common)


@dataclass(frozen=True)
class Part:
    """One thing that takes memory in each process: its bytes, on the accelerator or on the host."""

    what: str
    bytes: float
    on_host: bool = False


def shapes(config: DeepseekV3Config) -> Shapes:
    """Count the policy's parameters by building it on the meta device."""
    with torch.device("meta"):
        policy = PolicyForCausalLM(config)
    trunk = mtp = routed = 0
    first_mtp = config.num_hidden_layers
    for name, parameter in policy.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"] and int(parts[2]) >= first_mtp:
            mtp += parameter.numel()
            continue
        trunk += parameter.numel()
        if ".mlp.experts." in name:
            routed += parameter.numel()
    idle = routed - routed * config.num_experts_per_tok // config.n_routed_experts
    return Shapes(trunk, trunk - idle, mtp)


def training(shapes: Shapes, layout: Layout, dtype: str, fields: Mapping[str, Any]) -> list[Part]:
    """Return the parts that last from step to step.

    `fields` are the stage's trainer fields. Activations and buffers of communication come on top.
    """
    optimizer = str(fields.get("optim", "adamw"))
    mixed = fields.get("bf16", dtype == "bfloat16") or layout.mixed_precision
    size, width, copies = 4, 4, 0  # what trains is held in float32
    if layout.kind.startswith("ZeRO") and mixed:
        size, width, copies = 2, 4, 4  # 16-bit parameters, float32 copies and states
    states = _state_numbers(optimizer) * (1 if "8bit" in optimizer else width) + copies
    hosted = layout.parameters_on_host
    parts = [
        ("parameters", size, 3, hosted),
        ("gradients", size, 2, False),
        ("optimizer states", states, 1, layout.states_on_host),
    ]
    if fields.get("beta"):
        parts.append(("reference policy", size, 3, hosted))
    return [
        Part(
            f"{what}, {each} bytes each",
            shapes.total * each / (layout.processes if layout.stage >= shared_from else 1),
            on_host,
        )
        for what, each, shared_from, on_host in parts
    ]


def rollout(shapes: Shapes, config: DeepseekV3Config, section: Any) -> list[Part]:
    """Return the engine's parts: weights, one whole sequence in the cache, and as many as it may run at once."""
    size = BYTES[section.dtype]
    drafting = section.num_speculative_tokens > 0
    split = section.tensor_parallel_size
    numbers = shapes.trunk + (shapes.mtp if drafting else 0)
    weights = numbers * size / split
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if drafting else 0)
    # The latent is whole in every process of a tensor-parallel engine.
    one = layers * cache_numbers(config) * size * section.max_model_len
    spread = f", split over {split}" if split > 1 else ""
    length, many = section.max_model_len, section.max_num_seqs
    return [
        Part(f"rollout weights, {section.dtype}{spread}", weights),
        Part(f"cache of one sequence of {length:,} tokens", one),
        Part(f"cache of {many:,} such sequences", one * many),
    ]


def loading(shapes: Shapes, layout: Layout, dtype: str) -> Part:
    """Return what each process holds on the host before the model is spread: all of it.

    In float32, as which accelerate spreads it under FSDP; DeepSpeed takes it as it is.
    """
    size = BYTES[dtype] if layout.kind.startswith("ZeRO") else 4
    return Part("the whole policy while it loads", float(shapes.total * size), on_host=True)


def cache_numbers(config: DeepseekV3Config) -> int:
    """Return how many numbers a layer caches for a token: MLA's latent, or whole keys and values.

    On a CPU vLLM keeps the latent only at the released sizes; keys and values are then padded to one size.
    """
    latent = (config.kv_lora_rank, config.qk_rope_head_dim)
    if environment.on_cpu() and latent != MLA_KERNEL:
        return int(
            2 * config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        )
    return int(sum(latent))


def _state_numbers(optimizer: str) -> int:
    """Return how many numbers an optimizer keeps for a parameter; unknown ones count as Adam."""
    for name, numbers in (
        ("sgd", 0),
        ("adafactor", 0),
        ("lion", 1),
        ("rmsprop", 1),
        ("adagrad", 1),
    ):
        if name in optimizer:
            return numbers
    return 2
