"""Checkpoints in the layout in which DeepSeek-V3 was released: save, load, iterate.

Shapes: N trunk layers, D MTP modules, V vocabulary.
"""

import copy
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import DeepseekV3Config, GenerationConfig, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from posttrain.policy import configuration, fp8, manifest
from posttrain.policy.layout import (
    ROUTER_BIAS,
    model_tensors,
    named_tensors,
    split,
    unwrapped,
)
from posttrain.policy.model import PolicyForCausalLM
from posttrain.policy.mtp_start import start_missing
from posttrain.policy.shards import FP8, CheckpointError, Shards, ShardWriter

__all__ = ["CheckpointError", "load", "local_folder", "named_tensors", "save"]

log = logging.getLogger(__name__)


def save(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    max_shard_bytes: int = 5_000_000_000,
    write: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a policy as a folder that transformers, vLLM and `load` read: whole, or not at all.

    Everything goes to a hidden sibling folder first, which then takes the place of `folder`. What
    stood there is removed, all of it, once the new one is complete; a folder that is neither empty
    nor a checkpoint is refused with CheckpointError. Weights are written as `dtype`, or keep
    their type; router biases are float32. `tokenizer` (with its chat template) may be None.

    With several processes, all call it, one with `write`; the others only take part in gathering
    what is sharded, and must wait for the writer before they read the folder.
    """
    if not write:
        for _ in named_tensors(model):
            pass
        return
    tensors = named_tensors(model)
    try:
        place = Path(folder).absolute()
        _save(unwrapped(model), tokenizer, place, tensors, max_shard_bytes, dtype)
    finally:
        # After a failure (a full disk) the other processes still gather: do not leave them waiting.
        for _ in tensors:
            pass


def _save(
    policy: PolicyForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    max_shard_bytes: int,
    dtype: torch.dtype | None,
) -> None:
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not (folder / configuration.FILE).is_file():
        raise CheckpointError(
            f"{folder}: exists and is no checkpoint (no {configuration.FILE}), so it is not "
            "replaced; give another folder, or remove it"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        depth = len(policy.model.layers) - policy.config.num_hidden_layers
        stated = dtype or policy.get_input_embeddings().weight.dtype
        configuration.write(policy.config, partial, depth, stated)
        if policy.generation_config is not None:
            policy.generation_config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        writer = ShardWriter(partial, max_shard_bytes)
        for name, tensor in tensors:
            keep = dtype is None or name.endswith(ROUTER_BIAS)
            writer.add(name, tensor if keep else tensor.to(dtype))
            del tensor
        writer.close()
        _replace(folder, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _replace(folder: Path, new: Path) -> None:
    """Put `new` in the place of `folder`, and remove what stood there."""
    old = folder.with_name(f".{folder.name}.replaced")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    if old.exists():
        shutil.rmtree(old)


@torch.no_grad()
def load(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    num_nextn_predict_layers: int | None = None,
) -> PolicyForCausalLM:
    """Build the policy that a checkpoint folder, or a repository on the hub, holds; on the CPU.

    Every parameter and router bias is filled exactly once, straight from the files into its place:
    beside the model, one tensor exists at a time. FP8 blocks are dequantised. `dtype` defaults to
    config.json's, and without one to float32; router biases are float32 always.

    D, the number of MTP modules, is `num_nextn_predict_layers`, or else what config.json says.
    Modules that the files lack are started as `start_missing` says, which is logged; a smaller D
    leaves the last ones out. The files' copies of embedding and head must equal the trunk's, or a
    warning is logged and the trunk's are kept.

    Raises CheckpointError for whatever is missing, unexpected, of the wrong shape or type, damaged
    or foreign, before any weight is read; and for NaN or infinity, while reading.
    """
    folder = local_folder(source)
    config, raw, block = configuration.read(folder)
    shards = Shards(folder)
    found = manifest.depth_in(shards, config.num_hidden_layers)
    chosen = num_nextn_predict_layers is not None
    depth = num_nextn_predict_layers if chosen else raw.get("num_nextn_predict_layers")
    config.num_nextn_predict_layers = found if depth is None else _natural(depth)
    config.dtype = _float(dtype or config.dtype or torch.float32)
    config.name_or_path = str(source)
    plan = manifest.match(folder, config, _shapes(folder, config), shards, block, leave_out=chosen)

    policy = _empty(config, attn_implementation)
    slots = _slots(policy)
    for name in sorted(plan.fills, key=lambda name: shards.headers[name].file):
        slots[name].copy_(_read(shards, name, block, slots[name].dtype))
        if not all(extreme.isfinite() for extreme in slots[name].aminmax()):
            raise CheckpointError(
                f"{shards.headers[name].file}: {name} holds NaN or infinity as "
                f"{slots[name].dtype}; fetch the file again, or load a wider type"
            )
    for name, original in plan.copies.items():
        repeated = _read(shards, name, block, slots[original].dtype)
        if not torch.equal(repeated, slots[original]):
            largest = (repeated.float() - slots[original].float()).abs().max().item()
            log.warning(
                "%s: %s differs from %s by up to %.3g; the policy shares one, and keeps %s",
                shards.headers[name].file,
                name,
                original,
                largest,
                original,
            )
    start_missing(policy, found)
    if (folder / "generation_config.json").is_file():
        policy.generation_config = GenerationConfig.from_pretrained(folder)
    return policy.eval()


def local_folder(source: str | Path) -> Path:
    """Return a local folder as it is; fetch a hub repository's weights and configuration."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: no such folder, and not to be had from the hub ({error}); correct the "
            "path, or the name and the connection"
        ) from error


def _slots(policy: PolicyForCausalLM) -> dict[str, Tensor]:
    """Return the place of each released tensor in the model: views that together cover it."""
    return {
        released: place
        for name, tensor in model_tensors(policy)
        for released, place in split(name, tensor.detach())
    }


def _shapes(folder: Path, config: DeepseekV3Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of each released tensor, from a model without memory."""
    try:
        with torch.device("meta"):
            slots = _slots(PolicyForCausalLM(copy.deepcopy(config)))
    except Exception as error:
        raise CheckpointError(
            f"{folder / configuration.FILE}: no model can be built from it "
            f"({type(error).__name__}: {error}); correct the values"
        ) from error
    return {name: tuple(slot.shape) for name, slot in slots.items()}


def _natural(depth: object) -> int:
    if not isinstance(depth, int) or depth < 0:
        raise CheckpointError(
            f"num_nextn_predict_layers is {depth!r}, must be a number of modules, 0 or more"
        )
    return depth


def _float(dtype: torch.dtype | str) -> torch.dtype:
    """Return a type by its name, or as it is."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(
            f"dtype {dtype!r} is not one that the policy computes in; give float32, bfloat16, "
            "float16 or float64"
        )
    return found


def _empty(config: DeepseekV3Config, attn_implementation: str | None) -> PolicyForCausalLM:
    """Build the model in `config.dtype`, with memory that nobody has written to yet."""
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(config.dtype)
        with no_init_weights():
            policy = PolicyForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    policy.tie_weights()
    return policy


def _read(shards: Shards, name: str, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Read one tensor as `dtype`, dequantised if its file has it in FP8."""
    tensor = shards.read(name)
    if shards.headers[name].dtype == FP8:
        return fp8.dequantise(tensor, shards.read(name + fp8.SCALE), block, dtype)
    return tensor.to(dtype)
