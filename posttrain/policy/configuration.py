"""config.json of a checkpoint: which ones are DeepSeek-V3's, and one that every reader understands."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DeepseekV3Config

from posttrain.policy.shards import CheckpointError, read_json

FILE = "config.json"
ARCHITECTURE = "DeepseekV3ForCausalLM"
RULES: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
"""What transformers' DeepSeek-V3 and vLLM's compute, whatever config.json says: other values would
load and give other numbers. vLLM creates the router bias only where topk_method is written down."""

BLOCK = (128, 128)
"""Rows and columns that share a scale in the released FP8 weights."""


def check(raw: dict[str, Any], file: Path | str) -> None:
    """Raise CheckpointError unless a config.json describes a DeepSeek-V3 causal language model."""
    architectures = raw.get("architectures") or [ARCHITECTURE]
    if ARCHITECTURE not in architectures:
        raise CheckpointError(
            f"{file}: architectures is {architectures}, must contain {ARCHITECTURE}; "
            "only checkpoints of the DeepSeek-V3 architecture are read"
        )
    if "model_type" not in raw:
        raise CheckpointError(f"{file}: model_type is missing, must be 'deepseek_v3'; write it in")
    for key, value in RULES.items():
        if raw.get(key, value) != value:
            raise CheckpointError(
                f"{file}: {key} is {raw[key]!r}, must be {value!r}: the policy computes nothing "
                "else; take a checkpoint of the DeepSeek-V3 architecture"
            )


def fp8_block(raw: dict[str, Any], file: Path) -> tuple[int, int]:
    """Return the block that shares a scale; CheckpointError for quantisation of any other kind."""
    quantised = raw.get("quantization_config") or raw.get("compression_config")
    if not quantised:
        return BLOCK
    method, block = quantised.get("quant_method"), quantised.get("weight_block_size")
    if method != "fp8" or not isinstance(block, list) or len(block) != 2:
        raise CheckpointError(
            f"{file}: quantization_config has quant_method {method!r} and weight_block_size "
            f"{block!r}; only block-wise 'fp8', as DeepSeek-V3 is released, can be dequantised; "
            "take the unquantised checkpoint"
        )
    return block[0], block[1]


def read(folder: Path) -> tuple[DeepseekV3Config, dict[str, Any], tuple[int, int]]:
    """Return the configuration, config.json as it stands, and the block of FP8 weights.

    Keys of DeepSeek's own code (rope_theta, rope_scaling with `type`, torch_dtype) are understood;
    references to remote code and to the quantisation are dropped, as neither will be true of what
    is made from it. Raises CheckpointError for another architecture, quantisation, or bad values.
    """
    file = folder / FILE
    if not file.is_file() and (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds an adapter, not a checkpoint; load its base model, then the adapter"
        )
    raw = read_json(file)
    check(raw, file)
    block = fp8_block(raw, file)
    dropped = ("auto_map", "quantization_config", "compression_config")
    try:
        config = DeepseekV3Config.from_dict({k: v for k, v in raw.items() if k not in dropped})
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: {error}; correct the value") from error
    return config, raw, block


def write(config: DeepseekV3Config, folder: Path, depth: int, dtype: torch.dtype) -> None:
    """Write config.json for weights of `dtype` with `depth` MTP modules.

    Beside what transformers writes: the router's method, without which vLLM creates no bias, and
    the older spellings of rotary parameters and type, so that readers before transformers 5 do
    not fall back to their defaults without a word. Both spellings say the same.
    """
    content = json.loads(config.to_json_string(use_diff=True))
    for key in ("auto_map", "quantization_config"):
        content.pop(key, None)
    check(content | {"architectures": [ARCHITECTURE]}, "the policy's configuration")
    rope = dict(content["rope_parameters"])
    theta = rope.pop("rope_theta")
    rope["type"] = rope["rope_type"]
    name = str(dtype).removeprefix("torch.")
    content |= RULES | {
        "architectures": [ARCHITECTURE],
        "num_nextn_predict_layers": depth,
        "ep_size": 1,
        "dtype": name,
        "torch_dtype": name,
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")
