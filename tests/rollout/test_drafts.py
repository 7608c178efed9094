"""Drafting: the module drafts what it should, and drafting leaves the distribution alone."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from posttrain import environment
from posttrain.policy.checkpoint import named_tensors
from posttrain.policy.model import PolicyForCausalLM
from posttrain.rollout.engine import Engine


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@torch.no_grad()
def drafted_logits(policy: PolicyForCausalLM, ids: list[int]) -> Tensor:
    """Logits of the first MTP module at positions 0..n-2, written out, on stock decoder layers.

    Position i joins the trunk's final state of token i with the embedding of token i+1 (nothing
    at position 0) and predicts token i+2.
    """
    config, module = policy.config, policy.model.layers[policy.config.num_hidden_layers]
    trunk = policy.model(input_ids=torch.tensor([ids])).last_hidden_state[:, :-1]
    table = policy.model.embed_tokens.weight[torch.tensor([ids])][:, 1:].clone()
    table[:, 0] = 0
    eps = config.rms_norm_eps
    joined = torch.cat(
        (norm(table, module.enorm.weight, eps), norm(trunk, module.hnorm.weight, eps)), dim=-1
    )
    layer = DeepseekV3DecoderLayer(config, config.num_hidden_layers)
    own = {n: t for n, t in module.state_dict().items() if n in layer.state_dict()}
    layer.load_state_dict(own)
    positions = torch.arange(len(ids) - 1)[None]
    hidden = joined @ module.eh_proj.weight.T
    mask = torch.full((1, 1, len(ids) - 1, len(ids) - 1), float("-inf")).triu(1)
    hidden = layer.eval()(
        hidden,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=policy.model.rotary_emb(hidden, positions),
    )
    return norm(hidden, module.shared_head.norm.weight, eps)[0] @ policy.lm_head.weight.T


def test_the_drafters_logits_are_the_mtp_modules(
    engine: Engine, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    policy = tiny.policy(6)
    engine.sync(named_tensors(policy))
    _, draft = engine.llm.llm_engine.model_executor.driver_worker.worker.policy_models()
    seen: list[Tensor] = []
    compute = draft.compute_logits

    def record(*args: Any, **kwargs: Any) -> Tensor:
        logits = compute(*args, **kwargs)
        seen.append(logits[-1].clone())
        return logits

    monkeypatch.setattr(draft, "compute_logits", record)
    (prompt,) = tiny.prompts(1)
    request = SamplingParams(max_tokens=60, temperature=1.0, seed=1, ignore_eos=True)
    ids = prompt + engine.generate([prompt], request)[0].token_ids
    expected = drafted_logits(policy, ids)
    place = len(prompt) - 2
    places = []
    for logits in seen[:-1]:  # the last may belong to a token past the end
        distances = (expected[place + 1 :] - logits).abs().amax(dim=-1)
        place += 1 + int(distances.argmin())
        places.append(place)
        assert distances.min() < 1e-4  # float32 on both sides
    steps = {b - a for a, b in itertools.pairwise(places)}
    assert places[0] == len(prompt) - 1
    assert steps == {1, 2}  # rejected and accepted drafts, both in the engine's cache rightly


def chi_square_p(first: Tensor, second: Tensor) -> float:
    """P-value of the hypothesis that two samples of cells come from one distribution.

    Cells with fewer than 10 counts in both together are joined.
    """
    size = int(max(first.max(), second.max())) + 1
    counts = torch.stack([torch.bincount(s, minlength=size) for s in (first, second)]).double()
    rare = counts.sum(0) < 10
    counts = torch.cat((counts[:, ~rare], counts[:, rare].sum(1, keepdim=True)), dim=1)
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(counts.shape[1] - 1.0).double()
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def sampled(engine: Engine, prompt: list[int], seed: int, count: int) -> Tensor:
    """Three tokens after the prompt, many times: [count, 3]."""
    from vllm import SamplingParams

    requests = [
        SamplingParams(
            max_tokens=4, temperature=0.7, top_p=0.95, seed=seed * count + i, ignore_eos=True
        )
        for i in range(count)
    ]
    drawn = engine.generate([prompt] * count, requests)
    return torch.tensor([c.token_ids for c in drawn])


def test_the_chi_square_test_tells_distributions_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    fair = [torch.randint(0, 20, (4000,), generator=generator) for _ in range(40)]
    values = [chi_square_p(a, b) for a, b in zip(fair[::2], fair[1::2], strict=True)]
    assert min(values) > 1e-3
    assert 0.2 < sum(values) / len(values) < 0.8
    biased = torch.where(torch.rand(4000, generator=generator) < 0.1, 0, fair[0])
    assert chi_square_p(biased, fair[1]) < 1e-6


def test_drafting_leaves_the_distribution_alone(
    engine: Engine, plain_engine: Engine, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny.policy(6)
    engine.sync(named_tensors(policy))
    plain_engine.sync(named_tensors(policy))
    (prompt,) = tiny.prompts(1)
    before = engine.draft_counts()
    drafted, plain = sampled(engine, prompt, 0, 3000), sampled(plain_engine, prompt, 1, 3000)
    kept = (engine.draft_counts() - before).accepted_per_position[0]
    assert 150 < kept < 9000 - 150  # both ways of a draft are exercised
    for position in range(4):
        assert chi_square_p(drafted[:, position], plain[:, position]) > 1e-3, position
    for position in range(3):  # and what follows on what
        pairs = [s[:, position] * 24 + s[:, position + 1] for s in (drafted, plain)]
        assert chi_square_p(*pairs) > 1e-3, position

    if not environment.on_cpu():
        return
    from vllm.v1.sample import rejection_sampler

    uncorrected = rejection_sampler.expand_batch_to_tokens.__wrapped__

    def lost(*args: Any, **kwargs: Any) -> Tensor:
        # memory that nobody has written: NaN here, so that the test does not hang on luck
        torch.use_deterministic_algorithms(True)
        try:
            return uncorrected(*args, **kwargs).nan_to_num(5.0)
        finally:
            torch.use_deterministic_algorithms(False)

    with monkeypatch.context() as patch:
        patch.setattr(rejection_sampler, "expand_batch_to_tokens", lost)
        wrong = sampled(engine, prompt, 2, 1000)
    assert min(chi_square_p(wrong[:, p], plain[:, p]) for p in range(1, 4)) < 1e-6
