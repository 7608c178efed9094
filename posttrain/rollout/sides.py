"""Both sides of one comparison: the trainer's forward pass, the engine's, and where they part."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.rollout.engine import Engine, request_seed

TIE = 1e-5
"""Router scores, of order 1, differ by less between two float32 computations of the same policy."""

TEMPERATURES = (1.0, 2.0)
"""Prompts are continued at these in turn: both are right only if temperatures reach every token."""


@dataclass(frozen=True)
class Difference:
    """Where hidden states part: max |engine - trainer| at a layer, beside the state's rms.

    No layer: the engine runs compiled and shows none.
    """

    layer: str | None
    size: float = float("nan")
    rms: float = float("nan")


def first_difference(
    engine: Engine,
    policy: Any,
    sequence: list[int],
    prompt_tokens: int,
    tolerance: float,
    *,
    seed: int = 0,
    row: int = 0,
) -> Difference | None:
    """Return the first layer whose hidden state differs by more than tolerance * max(1, rms).

    Compares the engine's prefill of `sequence`, then its decode of the prompt alone.
    """
    prompt = sequence[:prompt_tokens]
    found = None
    for decoding in (False, True):
        engine.llm.reset_prefix_cache()
        engine.llm.collective_rpc("policy_capture_begin")
        try:
            if decoding:
                asked = request(seed, row, len(sequence) - prompt_tokens)
                sequence = (
                    prompt + engine.generate([prompt], asked, count_drafts=False)[0].token_ids
                )
            else:
                engine.score([sequence])
        finally:
            held = engine.llm.collective_rpc("policy_capture_end")[0]
        if not held:
            return Difference(None)
        with evaluating(policy), captured(policy) as states:
            forward(policy, [sequence])
        for layer, state_SD in states.items():
            positions = sorted(p for p in held[layer] if p < len(sequence) - 1)
            engine_SD = torch.stack([held[layer][p] for p in positions])
            size = (engine_SD - state_SD[positions]).abs().max().item()
            rms = state_SD[positions].square().mean().sqrt().item()
            if not size <= tolerance * max(1.0, rms):
                found = Difference(layer, size, rms)
                break
        if largest(float(found is not None)):
            break
    return found


def largest(value: float) -> float:
    """Return the largest value over all processes, which so decide alike; NaN counts as infinity.

    A policy that is spread over processes computes in all of them or in none.
    """
    value = math.inf if math.isnan(value) else value
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return float(max(values))


@contextlib.contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module gets its own mode back."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def captured(policy: Any) -> Iterator[dict[str, Tensor]]:
    """Record the first sequence's hidden states [positions, width] by the engine's layer names."""
    states: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states[name] = hidden[0].detach().float().cpu()

        return record

    hooks = [policy.model.embed_tokens.register_forward_hook(keep("embed_tokens"))]
    for index, layer in enumerate(_trunk(policy)):
        hooks.append(layer.register_forward_hook(keep(f"layers.{index}")))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _trunk(policy: Any) -> Any:
    return policy.model.layers[: policy.config.num_hidden_layers]


def forward(policy: Any, sequences: list[list[int]]) -> tuple[Tensor, int, Tensor]:
    """Return logits [B, S, V] in float32 of sequences of one length, experts missed, and ties [B, S].

    A position is tied where a router of this or an earlier position chose by less than TIE: rounding
    may decide otherwise in the engine, and both are right.
    """
    reached: list[Tensor] = []
    tied_T = torch.zeros(len(sequences) * len(sequences[0]), dtype=torch.bool)

    def count(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        experts = policy.config.n_routed_experts
        reached.append(torch.bincount(output[2].flatten(), minlength=experts) > 0)
        bias_E = module.get_buffer("e_score_correction_bias")
        scores_TE = output[0].float().sigmoid() + bias_E
        tied_T.logical_or_((choice_margin(scores_TE, policy.config) < TIE).cpu())

    routers = [layer.mlp.gate for layer in _trunk(policy) if hasattr(layer.mlp, "gate")]
    hooks = [router.register_forward_hook(count) for router in routers]
    try:
        ids = torch.tensor(sequences, device=policy.device)
        logits = policy(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
    tied_BS = tied_T.view(ids.shape).cummax(dim=1).values
    return logits, sum(int((~hit).sum()) for hit in reached), tied_BS


def choice_margin(scores_TE: Tensor, config: Any) -> Tensor:
    """Return by how much each token's choice was made (T,): of groups, and of experts in them."""
    groups, kept, chosen = config.n_group, config.topk_group, config.num_experts_per_tok
    scores_TGe = scores_TE.unflatten(1, (groups, -1))
    group_TG = scores_TGe.topk(2, dim=-1).values.sum(dim=-1)
    ranked_TG = group_TG.sort(dim=-1, descending=True).values
    lost_TG = group_TG < ranked_TG[:, kept - 1 : kept]
    left_TE = scores_TGe.masked_fill(lost_TG.unsqueeze(-1), float("-inf")).flatten(1)
    best_TE = left_TE.sort(dim=-1, descending=True).values
    nobody_T = torch.full_like(scores_TE[:, 0], float("inf"))
    group_gap_T = ranked_TG[:, kept - 1] - ranked_TG[:, kept] if kept < groups else nobody_T
    full = chosen == scores_TE.shape[1]
    expert_gap_T = nobody_T if full else best_TE[:, chosen - 1] - best_TE[:, chosen]
    return torch.minimum(group_gap_T, expert_gap_T)


def request(seed: int, row: int, tokens: int) -> Any:
    """Return vLLM's sampling parameters for the continuation of one of the gate's prompts."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=tokens,
        temperature=TEMPERATURES[row % len(TEMPERATURES)],
        seed=request_seed(seed, 0, row, 0),
        ignore_eos=True,
    )
