"""vLLM's known faults on a CPU, corrected in one place.

vLLM 0.31 computes a DeepSeek-V3 model silently wrong on a CPU in three places (seen with AVX2 and with
AVX512), and fails in two others. `register` is a `vllm.general_plugins` entry point, so every vLLM process of this
environment is right, a plain `vllm serve` included. Each correction is applied only where vLLM computes on
a CPU, and only while its probe still finds the fault: a vLLM that has repaired it is left alone.

A corrected function keeps vLLM's own as `__wrapped__`.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Correction:
    """One fault: `faulty` probes vLLM as it is now, `apply` replaces the function at fault."""

    name: str
    symptom: str
    faulty: Callable[[], bool]
    apply: Callable[[], None]


def rope_is_wrong() -> bool:
    """Whether the rotary kernel turns only the first head of a query [T, heads, head_size].

    It reads the number of heads off the last dimension: right for [T, heads * head_size] alone.
    """
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    size = 16
    positions = torch.arange(3)
    angles = torch.arange(3).float()[:, None] * torch.linspace(0.1, 1.0, size // 2)
    cache = torch.cat((angles.cos(), angles.sin()), dim=-1)
    query = torch.linspace(-1.0, 1.0, 3 * 2 * size).view(3, 2, size)
    key = torch.linspace(-1.0, 1.0, 3 * size).view(3, 1, size)
    right, _ = RotaryEmbedding.forward_static(positions, query, key, size, size, cache, False)
    ops.rotary_embedding(positions, query, key, size, cache, False)
    return not torch.allclose(query, right, atol=1e-5)


def correct_rope() -> None:
    """Hand the kernel [T, heads * head_size] and write its result back in place."""
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    original = RotaryEmbedding.forward_cpu

    @functools.wraps(original)
    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> tuple[Any, Any]:
        given = (query, key)
        heads = [x is not None and x.dim() == 3 and positions.dim() == 1 for x in given]
        flat = [x.flatten(1) if h else x for x, h in zip(given, heads, strict=True)]
        rotated = original(self, positions, *flat)
        for x, y, h in zip(given, rotated, heads, strict=True):
            if h and not x.is_contiguous():  # else y is a view of x
                x.copy_(y.view(x.shape))
        return given

    RotaryEmbedding.forward_cpu = forward_cpu


def reloaded_experts_are_unpacked() -> bool:
    """Whether a weight update leaves the experts out of the layout that the CPU kernel reads.

    The expert weights are packed for the kernel by `process_weights_after_loading` of the experts,
    which is called on the first load alone.
    """
    import torch
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as module

    packed: list[Any] = []
    experts = SimpleNamespace(process_weights_after_loading=packed.append)
    method = SimpleNamespace(
        moe_kernel=SimpleNamespace(fused_experts=experts),
        unquantized_backend=module.UnquantizedMoeBackend.CPU,
    )
    layer: Any = torch.nn.Module()
    layer.moe_config = None
    for name in ("w13_weight", "w2_weight"):
        layer.register_parameter(
            name, torch.nn.Parameter(torch.zeros(1, 1, 1), requires_grad=False)
        )
    setup = module.UnquantizedFusedMoEMethod._setup_kernel
    setup(method, layer, layer.w13_weight, layer.w2_weight)
    return not packed


def correct_reloaded_experts() -> None:
    """Pack the experts after every load, the first and each update."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    original = UnquantizedFusedMoEMethod._setup_kernel

    @functools.wraps(original)
    def _setup_kernel(self: Any, layer: Any, w13: Any, w2: Any) -> None:
        is_update = self.moe_kernel is not None
        original(self, layer, w13, w2)
        experts = self.moe_kernel.fused_experts
        if is_update and isinstance(experts, CPUUnquantizedExperts):
            experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = _setup_kernel


def expanded_values_are_lost() -> bool:
    """Whether per-request sampling values do not reach the drafted tokens.

    The CPU stand-in for the expansion kernel writes into a converted copy of its output and
    converts temperatures to integers: with drafting, logits are divided by uninitialised memory.
    """
    import torch
    from vllm.triton_utils import HAS_TRITON
    from vllm.utils import cpu_triton_utils

    if HAS_TRITON:  # the stand-in is not used
        return False
    output = torch.zeros(3)
    ends = torch.tensor([2, 3], dtype=torch.int32)
    cpu_triton_utils._expand_kernel_impl(output, torch.tensor([0.5, 0.0]), ends, 0, 1)
    return output.tolist() != [0.5, 0.5, 1.0]


def correct_expansion() -> None:
    """Expand [requests] to [tokens] with torch: [a, b], ends [2, 3] -> [a, a, b]."""
    import torch
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.expand_batch_to_tokens

    @functools.wraps(original)
    def expand_batch_to_tokens(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        x = x.masked_fill(x == replace_from, replace_to)
        return x.repeat_interleave(counts, output_size=num_tokens)

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def chunked_seeds_fail() -> bool:
    """Whether a seeded request fails when its prompt is computed in several steps.

    What is drawn after a part of a prompt is discarded, and vLLM turns the request's generator
    back by its offset. Generators on a CPU have none.
    """
    import numpy as np
    import torch
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    class Passed(Exception):
        pass

    class Names:
        def copy(self) -> None:
            raise Passed

    runner = SimpleNamespace(
        use_async_scheduling=False,
        discard_request_mask=SimpleNamespace(np=np.array([True])),
        input_batch=SimpleNamespace(
            num_reqs=1, generators={0: torch.Generator()}, req_ids=Names(), req_id_to_index={}
        ),
    )
    try:
        CPUModelRunner._bookkeeping_sync(runner, None, None, None, None, 0)
    except Passed:
        return False
    except RuntimeError:
        return True
    return False


def correct_chunked_seeds() -> None:
    """Keep the generators' states of unfinished prompts from before the draw.

    So a request draws the same tokens however its prompt was cut, and whatever runs beside it.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample, bookkeeping = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    def unfinished(runner: Any) -> dict[int, Any]:
        mask = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
        generators = runner.input_batch.generators
        return {i: generators[i] for i in mask.nonzero()[0].tolist() if i in generators}

    @functools.wraps(sample)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in unfinished(self).values()]
        output = sample(self, *args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    @functools.wraps(bookkeeping)
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = unfinished(self)
        for i in hidden:
            del self.input_batch.generators[i]
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(hidden)

    CPUModelRunner._sample = _sample
    CPUModelRunner._bookkeeping_sync = _bookkeeping_sync


def other_latents_fail() -> bool:
    """Whether the kernel for latent attention takes one size of latents only."""
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    return len(CPUMLABackend.get_supported_head_sizes()) == 1


def correct_other_latents() -> None:
    """Keep full keys and values for latents of other sizes, as VLLM_MLA_DISABLE does for all."""
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    original = ModelArchConfigConvertorBase.get_head_size
    kernel = CPUMLABackend.get_supported_head_sizes()

    @functools.wraps(original)
    def get_head_size(self: Any) -> int:
        # vLLM asks this before anything else of a model; its workers inherit the variable.
        if self.is_deepseek_mla() and original(self) not in kernel:
            os.environ["VLLM_MLA_DISABLE"] = "1"
        return int(original(self))

    ModelArchConfigConvertorBase.get_head_size = get_head_size


CORRECTIONS = (
    Correction(
        "rotary embedding",
        "log-probs off by up to 1.2 nats: only the query's first head is rotated",
        rope_is_wrong,
        correct_rope,
    ),
    Correction(
        "reloaded experts",
        "wrong experts after every weight update: they stay out of the kernel's layout",
        reloaded_experts_are_unpacked,
        correct_reloaded_experts,
    ),
    Correction(
        "drafting at a temperature",
        "sampling with drafts at temperature > 0 follows no distribution at all",
        expanded_values_are_lost,
        correct_expansion,
    ),
    Correction(
        "latents of other sizes",
        "an engine starts, and its first request fails: the latent kernel takes 512 + 64 alone",
        other_latents_fail,
        correct_other_latents,
    ),
    Correction(
        "seeds of long prompts",
        "a request with a seed fails when its prompt is computed in several steps",
        chunked_seeds_fail,
        correct_chunked_seeds,
    ),
)


@functools.cache
def register() -> dict[str, str]:
    """Correct what is faulty, once a process; return what was found: name -> state.

    A state is "corrected", "sound" (vLLM has no such fault here) or "not a CPU".
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return dict.fromkeys((c.name for c in CORRECTIONS), "not a CPU")
    current_platform.import_kernels()
    found = {}
    for correction in CORRECTIONS:
        found[correction.name] = "sound"
        if correction.faulty():
            correction.apply()
            found[correction.name] = "corrected"
    return found
