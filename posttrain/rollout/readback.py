"""What the engine's memory holds, under the names that checkpoints use.

vLLM fuses projections, packs weights for its CPU kernels and keeps derived copies. `held` undoes all of
it, so that a tensor read back can be compared bit for bit with the one that was sent:

    gate_up_proj            -> gate_proj, up_proj           (rows, one after the other)
    fused_qkv_a_proj        -> q_a_proj, kv_a_proj_with_mqa
    experts w13, w2         -> experts.{e}.gate_proj, up_proj, down_proj, out of the kernel's layout
    a packed linear layer   -> what it multiplies the identity matrix to
    W_UK, W_UV of MLA       -> kv_b_proj, as it was absorbed

A name comes up once for every copy that a forward pass may read: lm_head as stored and as packed, a
router's bias in the gate and in the experts. Tensors split over tensor-parallel workers are gathered,
so every worker must read back at the same time.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Projections that vLLM stores as one, and the checkpoint's names of their parts in order."""

BLOCK = 1 << 20
"""Elements summed at a time."""


class ReadbackError(RuntimeError):
    """The engine keeps weights in a form that cannot be read back."""


@torch.no_grad()
def held(model: nn.Module, draft: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint name, tensor) for all that the model and its drafter hold.

    Tensors have the checkpoint's shapes and the engine's types; they may be views of its memory.
    """
    yield from _held(model)
    if draft is not None:
        modules = [name for name, _ in draft.model.layers.named_children()]
        for name, tensor in _held(draft):
            if name.endswith(("embed_tokens.weight", "shared_head.head.weight")):
                part = ".".join(name.split(".")[-3:]).removeprefix("model.")
                for index in modules:  # one embedding and one head serve every MTP module
                    yield f"model.layers.{index}.{part}", tensor
            else:
                yield name.replace(".mtp_block.", "."), tensor


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    for path, module in model.named_modules():
        if hasattr(module, "w13_weight"):
            yield from _experts(path.removesuffix(".routed_experts"), module)
        elif hasattr(module, "W_UK_T"):
            parts = (module.W_UK_T.permute(2, 0, 1), module.W_UV.transpose(0, 1))
            absorbed = torch.cat(parts, dim=-1).flatten(1).t()  # [heads * (nope + v), latent]
            yield f"{_attention(path)}.kv_b_proj.weight", _whole(absorbed, 0, _workers(module))
        elif isinstance(module, VocabParallelEmbedding):
            copies = [module.weight]
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                copies.append(_multiplied(module, path))
            for copy in copies:
                yield f"{path}.weight", _whole(copy, 0, module.tp_size)[: module.org_vocab_size]
        elif isinstance(module, LinearBase):
            yield from _linear(path, module)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{path}.{name}", parameter


def _whole(shard: Tensor, dim: int, workers: int) -> Tensor:
    """Return the tensor that is split along `dim` over this many workers."""
    if workers == 1:
        return shard
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(shard.contiguous(), dim)


def _workers(attention: Any) -> int:
    return attention.kv_b_proj.tp_size


def _attention(path: str) -> str:
    """Return the path of the attention block that an MLA kernel module belongs to."""
    return path.split(".self_attn")[0] + ".self_attn"


def _linear(path: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

    is_split = isinstance(module, ColumnParallelLinear | RowParallelLinear)
    workers = module.tp_size if is_split else 1
    weight = module.weight if module.weight.numel() else _multiplied(module, path)
    parent, _, last = path.rpartition(".")
    if last in FUSED:
        parts = weight.split(module.output_partition_sizes)
        for name, part in zip(FUSED[last], parts, strict=True):
            yield f"{parent}.{name}.weight", _whole(part, 0, workers)
    else:
        dim = int(isinstance(module, RowParallelLinear))
        yield f"{path}.weight", _whole(weight, dim, workers)
    for name, parameter in module.named_parameters(recurse=False):
        if name != "weight":
            yield f"{path}.{name}", parameter


def _multiplied(module: Any, path: str) -> Tensor:
    """Return the [out, in] matrix that a packed layer multiplies by: its product with the identity.

    Each output is one weight times 1 plus zeros: exact. The sign of a zero is lost.
    """
    if module.cpu_linear is torch.nn.functional.linear and not module.weight.numel():
        raise ReadbackError(f"{path}: the weight was given away to a kernel that hides it")
    widths = ("input_size_per_partition", "input_size", "embedding_dim")  # the first that it has
    width = next(getattr(module, name) for name in widths if hasattr(module, name))
    dtype = module.params_dtype if hasattr(module, "params_dtype") else module.weight.dtype
    return module.cpu_linear(torch.eye(width, dtype=dtype), module.weight, None).t()


def _experts(path: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    w13_EFD, w2_EDF = _unpacked(module)
    size = module.moe_config.intermediate_size_per_partition
    padded = w13_EFD.shape[1] // 2  # the CPU kernel pads the inner width to a multiple of 32
    workers = module.moe_config.moe_parallel_config.tp_size
    gate_EFD = _whole(w13_EFD[:, :size], 1, workers)
    up_EFD = _whole(w13_EFD[:, padded : padded + size], 1, workers)
    down_EDF = _whole(w2_EDF[:, :, :size], 2, workers)
    for e in range(gate_EFD.shape[0]):
        yield f"{path}.{e}.gate_proj.weight", gate_EFD[e]
        yield f"{path}.{e}.up_proj.weight", up_EFD[e]
        yield f"{path}.{e}.down_proj.weight", down_EDF[e]
    bias = module.e_score_correction_bias
    if bias is not None:
        yield f"{path.removesuffix('.experts')}.gate.e_score_correction_bias", bias


def _unpacked(module: Any) -> tuple[Tensor, Tensor]:
    """Return the experts' weights [E, 2F, D] and [E, D, F] out of the kernel's layout."""
    method = module.quant_method
    if method.moe_kernel is None:
        raise ReadbackError("the experts have no kernel yet: load the weights first")
    weights = (module.w13_weight, module.w2_weight)
    backend = method.unquantized_backend.name
    if backend == "CPU":
        experts = method.moe_kernel.fused_experts
        if experts._use_zentorch:
            return weights
        return tuple(_inverted(w, experts.isa) for w in weights)  # type: ignore[return-value]
    if backend in ("TRITON", "BATCHED_TRITON"):
        return weights
    raise ReadbackError(
        f"the experts' layout of vLLM's {backend} kernel cannot be read back; "
        "remedy: start the engine with moe_backend='triton'"
    )


def _inverted(packed: Tensor, isa: str) -> Tensor:
    order = _packing(packed.shape[1], packed.shape[2], packed.dtype, isa)
    return packed.flatten(1)[:, order].view_as(packed)


@functools.lru_cache(maxsize=8)
def _packing(rows: int, columns: int, dtype: torch.dtype, isa: str) -> Tensor:
    """Return where in one packed expert each element of the plain [rows, columns] lies.

    Found by packing the elements' numbers, one base-256 digit at a time: every type that weights
    have holds 0..255 exactly, so no knowledge of the layout is needed.
    """
    from vllm._custom_ops import cpu_prepack_moe_weight

    count = rows * columns
    number = torch.arange(count)
    source = torch.zeros(count, dtype=torch.int64)
    for digit in range(max(1, math.ceil(math.log2(count) / 8))):
        plain = ((number >> (8 * digit)) & 255).to(dtype).view(1, rows, columns)
        packed = cpu_prepack_moe_weight(plain, isa)
        source |= packed.flatten().to(torch.int64) << (8 * digit)
    order = torch.empty_like(source)
    order[source] = number
    return order


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Return sum_i (2i + 1) * bits_i mod 2^64 over the elements in order, an int64 scalar.

    bits_i is the element's bit pattern, with -0 taken as 0. Any single change alters the sum, and
    so does swapping two elements that differ.
    """
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = (tensor.detach() + 0.0).contiguous().view(integer).flatten()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), BLOCK):
        block = bits[start : start + BLOCK]
        odd = _odd(bits.device)[: block.numel()]
        total += (block * odd).sum() + 2 * start * block.sum(dtype=torch.int64)
    return total


@functools.cache
def _odd(device: torch.device) -> Tensor:
    return torch.arange(1, 2 * BLOCK, 2, device=device)
