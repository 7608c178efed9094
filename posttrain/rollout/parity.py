"""The gate between engine and trainer: the same tokens, scored on both sides, must agree.

Random prompts are added until they reach every expert of every layer in the trainer. The engine continues
them (decode) and scores the whole sequences again (prefill); the trainer scores them in one forward
pass. When log-probs differ by more than the tolerance, hidden states of both sides are compared layer
by layer, to name where it starts.
"""

import random
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.rollout.engine import Engine
from posttrain.rollout.sides import (
    TEMPERATURES,
    evaluating,
    first_difference,
    forward,
    largest,
    request,
)
from posttrain.rollout.sync import SyncError


class ParityError(RuntimeError):
    """Engine and trainer compute different log-probs for the same tokens."""


@dataclass(frozen=True)
class ParityReport:
    """Differences of log-probs in nats. experts_missed: (layer, expert) pairs without a token.

    tokens_tied: left out, as a router's choice before them hung on rounding (see `sides.TIE`).
    """

    max_abs_logprob_diff: float
    mean_abs_logprob_diff: float
    prefill_max: float
    decode_max: float
    tokens: int
    experts_missed: int
    tokens_tied: int
    seconds: float


class Gate:
    """Compares an engine with a policy; keeps its prompts from one check to the next.

    tolerance: largest allowed |difference| of a log-prob, nats. prompts: how many to start with,
    each of `tokens` tokens and continued by as many. At most `limit` prompts are tried to reach
    every expert; what they miss is reported.
    """

    def __init__(
        self,
        tolerance: float,
        *,
        prompts: int = 4,
        tokens: int = 24,
        seed: int = 0,
        limit: int = 64,
    ) -> None:
        self.tolerance = tolerance
        self.count = prompts
        self.tokens = tokens
        self.seed = seed
        self.limit = limit
        self.prompts: list[list[int]] = []
        self._unreached = 0

    def check(self, engine: Engine, policy: Any) -> ParityReport:
        """Compare both sides; every process that holds a part of the policy must take part.

        policy: a causal model with transformers' DeepSeek-V3 forward. It runs in eval mode and is
        left as it was. Raises ParityError naming the first layer that differs.
        """
        start = time.perf_counter()
        with evaluating(policy):
            if not self.prompts:
                self._find_prompts(policy)
            decoded = _continued(engine, self.prompts, self.tokens, self.seed)
            sequences = [p + c for p, (c, _) in zip(self.prompts, decoded, strict=True)]
            prefilled = engine.score(sequences)
            logits, missed, tied_BS = forward(policy, sequences)
            missed = int(largest(missed))
            if missed > self._unreached:  # the router has moved: look again at the next check
                self.prompts = []
        prefill, decode = _differences(logits, sequences, prefilled, [d[1] for d in decoded])
        tied_BS = tied_BS[:, :-1]
        prefill = prefill.masked_fill(tied_BS, 0.0)
        decode = decode.masked_fill(tied_BS[:, -decode.shape[1] :], 0.0)
        worst = largest(_worst(prefill, decode))
        if worst > self.tolerance:
            in_decode = decode.max().item() > max(self.tolerance, 2 * prefill.max().item())
            side = decode if in_decode else prefill
            row = int(side.max(dim=1).values.argmax())
            raise ParityError(self._message(engine, policy, sequences[row], prefill, decode, row))
        return ParityReport(
            max_abs_logprob_diff=worst,
            mean_abs_logprob_diff=torch.cat((prefill, decode), dim=1).mean().item(),
            prefill_max=prefill.max().item(),
            decode_max=decode.max().item(),
            tokens=prefill.numel() + decode.numel(),
            experts_missed=missed,
            tokens_tied=int(tied_BS.sum()),
            seconds=time.perf_counter() - start,
        )

    def _find_prompts(self, policy: Any) -> None:
        """Add random prompts until every expert of every layer has a token, or the limit."""
        source = random.Random(self.seed)
        vocabulary = range(policy.config.vocab_size)
        while True:
            for _ in range(self.count):
                self.prompts.append(source.choices(vocabulary, k=self.tokens))
            _, self._unreached, _ = forward(policy, self.prompts)
            if not self._unreached or len(self.prompts) + self.count > self.limit:
                return

    def _message(
        self,
        engine: Engine,
        policy: Any,
        sequence: list[int],
        prefill: Tensor,
        decode: Tensor,
        row: int,
    ) -> str:
        where = first_difference(
            engine, policy, sequence, self.tokens, self.tolerance, seed=self.seed, row=row
        )
        here = _worst(prefill, decode)
        if here <= self.tolerance:
            return "engine and trainer differ in another process, whose message says where"
        if where is None:
            place = "hidden states agree up to the last layer: the final norm or lm_head differs"
        elif where.layer is None:
            place = "hidden states cannot be compared: the engine runs compiled"
        else:
            place = (
                f"hidden states differ from {where.layer} on, there by {where.size:.3g} "
                f"(rms of the state {where.rms:.3g})"
            )
        remedy = "sync the weights before the check; if it happens again run `posttrain doctor`"
        if str(engine.llm.llm_engine.model_config.dtype) != "torch.float32":
            remedy = "in half precision expert choices flip: raise parity.tolerance, or use float32"
        try:
            if engine.link.sent:
                engine.link.verify()
        except SyncError as error:
            remedy = str(error)
        return (
            f"engine and trainer differ by {here:.3g} nats "
            f"(prefill {prefill.max().item():.3g}, decode {decode.max().item():.3g}, mean "
            f"{torch.cat((prefill, decode), dim=1).mean().item():.3g}), tolerance "
            f"{self.tolerance:.3g}; {place}; remedy: {remedy}"
        )


def check(
    engine: Engine,
    policy: Any,
    *,
    tolerance: float,
    prompts: int = 4,
    tokens: int = 24,
    seed: int = 0,
) -> ParityReport:
    """Compare engine and policy once; see `Gate`."""
    return Gate(tolerance, prompts=prompts, tokens=tokens, seed=seed).check(engine, policy)


def _worst(prefill: Tensor, decode: Tensor) -> float:
    return torch.stack((prefill.max(), decode.max())).max().item()  # unlike max(), keeps a NaN


def _continued(
    engine: Engine, prompts: list[list[int]], tokens: int, seed: int
) -> list[tuple[list[int], list[float]]]:
    requests = [request(seed, row, tokens) for row in range(len(prompts))]
    completions = engine.generate(prompts, requests, count_drafts=False)
    return [(c.token_ids, c.logprobs) for c in completions]


def _differences(
    logits: Tensor,
    sequences: list[list[int]],
    prefilled: list[list[float]],
    decoded: list[list[float]],
) -> tuple[Tensor, Tensor]:
    """Return |engine - trainer| of the log-probs: prefill [B, S-1] and decode [B, tokens]."""
    targets_BS1 = torch.tensor(sequences, device=logits.device)[:, 1:, None]
    logits = logits[:, :-1]
    plain = logits.log_softmax(-1).gather(-1, targets_BS1).squeeze(-1).cpu()
    prefill = (torch.tensor(prefilled) - plain).abs()
    heat = torch.tensor(TEMPERATURES, device=logits.device)
    heat_B = heat[torch.arange(len(sequences)) % len(TEMPERATURES)]
    heated = (logits / heat_B[:, None, None]).log_softmax(-1).gather(-1, targets_BS1)
    tokens = len(decoded[0])
    decode = (torch.tensor(decoded) - heated.squeeze(-1).cpu()[:, -tokens:]).abs()
    return prefill, decode
