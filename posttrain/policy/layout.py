"""The released names of a policy's tensors, and the stream that carries them layer by layer.

The model keeps the experts of a layer fused, checkpoints and engines want one tensor for each;
the model shares embedding and head with its MTP modules, checkpoints repeat them.
Shapes: E experts, F expert width, D model width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
ROUTER_BIAS = "mlp.gate.e_score_correction_bias"


def layer_name(index: int) -> str:
    """Prefix of everything in one layer, trunk or MTP."""
    return f"model.layers.{index}."


def mtp_copies(index: int) -> dict[str, str]:
    """Names under which MTP layer `index` repeats the trunk's embedding and head, and those."""
    layer = layer_name(index)
    return {f"{layer}embed_tokens.weight": EMBEDDING, f"{layer}shared_head.head.weight": HEAD}


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the policy inside DDP, DeepSpeed's engine or torch.compile."""
    for attribute in ("module", "_orig_mod"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    return model


def split(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Cut a tensor of the model into the released ones; views, which together cover all of it.

    mlp.experts.gate_up_proj (E, 2F, D) -> mlp.experts.{e}.gate_proj.weight, up_proj: (F, D)
    mlp.experts.down_proj    (E, D, F)  -> mlp.experts.{e}.down_proj.weight: (D, F)
    anything else                       -> itself

    >>> import torch
    >>> fused = torch.arange(8.0).view(2, 4, 1)
    >>> for name, part in split("mlp.experts.gate_up_proj", fused):
    ...     print(name, part.flatten().tolist())
    mlp.experts.0.gate_proj.weight [0.0, 1.0]
    mlp.experts.0.up_proj.weight [2.0, 3.0]
    mlp.experts.1.gate_proj.weight [4.0, 5.0]
    mlp.experts.1.up_proj.weight [6.0, 7.0]
    """
    if name.endswith("mlp.experts.gate_up_proj"):
        prefix = name.removesuffix("gate_up_proj")
        for e, expert in enumerate(tensor):
            gate, up = expert.chunk(2)
            yield f"{prefix}{e}.gate_proj.weight", gate
            yield f"{prefix}{e}.up_proj.weight", up
    elif name.endswith("mlp.experts.down_proj"):
        prefix = name.removesuffix("down_proj")
        for e, expert in enumerate(tensor):
            yield f"{prefix}{e}.down_proj.weight", expert
    else:
        yield name, tensor


def _below(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers below a module, in the order in which it declares them."""
    for path, child in module.named_modules():
        # Activation checkpointing puts its wrapper's name into the path.
        path = f"{path}.".replace("_checkpoint_wrapped_module.", "").lstrip(".")
        for leaf, parameter in child.named_parameters(recurse=False):
            yield f"{prefix}{path}{leaf}", parameter
        for leaf, buffer in child.named_buffers(recurse=False):
            if leaf not in child._non_persistent_buffers_set:
                yield f"{prefix}{path}{leaf}", buffer


def _modules(policy: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Prefix and module: embedding, trunk layers, final norm, head, MTP modules."""
    trunk = policy.model
    last = trunk.config.num_hidden_layers
    yield "model.embed_tokens.", trunk.embed_tokens
    for index, layer in enumerate(trunk.layers[:last]):
        yield layer_name(index), layer
    yield "model.norm.", trunk.norm
    yield "lm_head.", policy.lm_head
    for index, module in enumerate(trunk.layers[last:], start=last):
        yield layer_name(index), module


def model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's own tensors under its own names, in the order of `named_tensors`.

    They are as the model holds them: fused, with their gradient, and sharded if they are.
    """
    for prefix, module in _modules(unwrapped(model)):
        yield from _below(prefix, module)


@contextmanager
def _whole(tensor: Tensor) -> Iterator[Tensor]:
    """Gather a tensor that is spread over processes; all of them must enter. Others pass through.

    The branch for DeepSpeed's ZeRO-3 has not been run yet.
    """
    if isinstance(tensor, DTensor):
        # Parameters that FSDP2 offloads to the CPU are gathered where their mesh communicates.
        there = tensor.detach().to(tensor.device_mesh.device_type)
        yield cast(DTensor, there).full_tensor()
    elif hasattr(tensor, "ds_id"):
        deepspeed = import_module("deepspeed")
        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.detach()
    else:
        yield tensor.detach()


def _released(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    with _whole(tensor) as whole:
        yield from split(name, whole)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (released name, tensor) of everything that an engine or a checkpoint needs.

    Embedding, trunk layers, final norm, head, then each MTP module with its copies of embedding
    and head; one tensor per expert; router biases in float32. The tensors are views of the model's
    memory, on its device, without gradient: copy what you keep.

    Sharded weights (FSDP2's DTensor, ZeRO-3's partitions) are gathered one at a time: every
    process must run through the whole stream. Let go of each tensor before asking for the next,
    and no more than one gathered tensor exists at a time.
    """
    policy = unwrapped(model)
    shared = {EMBEDDING: policy.model.embed_tokens.weight, HEAD: policy.lm_head.weight}
    last = policy.config.num_hidden_layers
    copies = {
        layer_name(index): mtp_copies(index) for index in range(last, len(policy.model.layers))
    }
    for prefix, module in _modules(policy):
        for name, tensor in _below(prefix, module):
            yield from _released(name, tensor)
        for name, original in copies.get(prefix, {}).items():
            yield from _released(name, shared[original])
