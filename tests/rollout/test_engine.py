import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain import environment
from posttrain.policy.checkpoint import named_tensors
from posttrain.policy.model import PolicyForCausalLM
from posttrain.rollout.engine import DraftCounts, Engine, EngineError, request_seed

TOLERANCE = 1e-4
"""Nats; float32 on both sides differs by some 1e-6 in a model of this size."""


def trainer_logprobs(policy: PolicyForCausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([ids])).logits[0].float()
    return logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None]).squeeze(-1)


def sampling(**changes: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**({"max_tokens": 10, "temperature": 1.0, "ignore_eos": True} | changes))


@pytest.mark.parametrize("drafting", [True, False])
@pytest.mark.parametrize("seed", [0, 3])
def test_log_probs_are_the_trainers_after_every_sync(
    engine: Engine, plain_engine: Engine, tiny: Any, drafting: bool, seed: int
) -> None:
    # the two policies differ in every tensor, router biases included
    one, policy = (engine if drafting else plain_engine), tiny.policy(seed)
    one.sync(named_tensors(policy))
    prompts = tiny.prompts(8)
    completions = one.generate(prompts, [sampling(seed=i) for i in range(8)])
    sequences = [p + c.token_ids for p, c in zip(prompts, completions, strict=True)]
    for ids, completion, scores in zip(sequences, completions, one.score(sequences), strict=True):
        expected = trainer_logprobs(policy, ids)
        torch.testing.assert_close(torch.tensor(scores), expected, atol=TOLERANCE, rtol=0)
        generated = torch.tensor(completion.logprobs)
        torch.testing.assert_close(generated, expected[-10:], atol=TOLERANCE, rtol=0)
        assert completion.finish_reason == "length"


def test_seeds_repeat_a_request_whatever_runs_beside_it(engine: Engine, tiny: Any) -> None:
    engine.sync(named_tensors(tiny.policy(0)))
    prompt, *others = tiny.prompts(4)
    alone = engine.generate([prompt], sampling(seed=5))[0].token_ids
    among = engine.generate([*others, prompt], [sampling(seed=i) for i in (1, 2, 3, 5)])
    assert among[3].token_ids == alone
    assert engine.generate([prompt], sampling(seed=6))[0].token_ids != alone


def test_request_seeds_are_fixed_for_ever() -> None:
    seeds = {
        request_seed(run, step, prompt, sample)
        for run in range(3)
        for step in range(3)
        for prompt in range(3)
        for sample in range(3)
    }
    assert len(seeds) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_end_of_sequence_token_stops_a_completion(engine: Engine, tiny: Any) -> None:
    engine.sync(named_tensors(tiny.policy(0)))
    completions = engine.generate(
        tiny.prompts(32), [sampling(seed=i, max_tokens=60, ignore_eos=False) for i in range(32)]
    )
    ended = [c for c in completions if c.finish_reason == "stop"]
    assert ended  # 1 of 24 tokens, 60 times
    for completion in completions:
        assert (completion.token_ids[-1] == 1) == (completion.finish_reason == "stop")
        assert 1 not in completion.token_ids[:-1]
        assert len(completion.logprobs) == len(completion.token_ids)


def test_several_completions_of_one_request_are_refused(engine: Engine, tiny: Any) -> None:
    engine.sync(named_tensors(tiny.policy(0)))
    with pytest.raises(ValueError, match="n must be 1"):
        engine.generate([[1, 2]], sampling(n=2))


def test_the_trainers_process_stays_as_it_was(engine: Engine, tiny: Any) -> None:
    engine.sync(named_tensors(tiny.policy(0)))
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    threads, variables = torch.get_num_threads(), dict(os.environ)
    engine.generate(tiny.prompts(4), sampling(temperature=1.0))  # no seed: vLLM draws from torch
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert (torch.get_num_threads(), dict(os.environ)) == (threads, variables)
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1  # vLLM replaces this function by one that does nothing
    torch.set_num_threads(threads)
    assert not any(name in os.environ for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE"))


def test_a_request_that_fails_leaves_nothing_behind(
    engine: Engine, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny.policy(0)
    engine.sync(named_tensors(policy))
    before = engine.generate(tiny.prompts(4), sampling(temperature=0.0))
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    for part in ("_model_forward", "_sample"):
        with monkeypatch.context() as patch:

            def interrupted(*args: Any, **kwargs: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(runner, part, interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.generate(tiny.prompts(4), sampling(temperature=0.0))
        engine.sync(named_tensors(policy))
        after = engine.generate(tiny.prompts(4), sampling(temperature=0.0))
        assert [c.token_ids for c in after] == [c.token_ids for c in before]


def test_draft_counts_add_up(engine: Engine, plain_engine: Engine, tiny: Any) -> None:
    engine.sync(named_tensors(tiny.policy(0)))
    before = engine.draft_counts()
    completions = engine.generate(tiny.prompts(16), [sampling(seed=i) for i in range(16)])
    counts = engine.draft_counts() - before
    # every token is the prompt's first, a verified draft, or what a draft's step gave besides
    tokens = sum(len(c.token_ids) for c in completions)
    accepted = counts.accepted_per_position[0]
    assert 0 < accepted < counts.drafts
    assert tokens - 16 <= counts.drafts + accepted <= tokens
    assert counts.acceptance == accepted / counts.drafts
    assert plain_engine.draft_counts() == DraftCounts(0, ())


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"num_speculative_tokens": 1}, {"num_nextn_predict_layers": 0}, "no MTP module"),
        ({"num_speculative_tokens": 2}, {"num_nextn_predict_layers": 2}, "first module"),
        ({"tensor_parallel_size": 2}, {}, "must divide the number of processes 1"),
        ({}, {"topk_method": "greedy"}, "topk_method"),
        ({}, {"scoring_func": None}, "scoring_func"),
        ({}, {"qk_nope_head_dim": 40, "qk_rope_head_dim": 8}, "is 48, and vLLM's attention"),
    ],
)
@pytest.mark.skipif(not environment.on_cpu(), reason="one of the rules is the CPU's")
def test_what_vllm_would_compute_wrongly_is_refused(
    tmp_path: Path, tiny: Any, changes: dict, model: dict, message: str
) -> None:
    import json

    sound = {
        "num_hidden_layers": 3,
        "n_routed_experts": 16,
        "num_nextn_predict_layers": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    }
    (tmp_path / "config.json").write_text(json.dumps(sound | model))
    with pytest.raises(EngineError, match=message):
        Engine.start(tmp_path, tiny.Settings(**changes))
