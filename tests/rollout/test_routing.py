"""Recorded choices are the engine's own, whatever happens to a request on its way."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain import environment
from posttrain.policy.checkpoint import named_tensors
from posttrain.policy.model import PolicyForCausalLM
from posttrain.policy.replay import MISSING, RoutingRequest
from posttrain.rollout import launch
from posttrain.rollout.engine import Completion, Engine, EngineError
from posttrain.rollout.routing import RoutingRecorder, returned
from tests.rollout.tiny import Settings

cpu = pytest.mark.skipif(not environment.on_cpu(), reason="vLLM records by itself on CUDA")


def trainers_choices(policy: PolicyForCausalLM, ids: list[int]) -> Tensor:
    """What the trainer chooses in one pass over the whole sequence: [S-1, L, K]."""
    policy.model.routing_request = RoutingRequest(keep=True)
    with torch.no_grad():
        policy(input_ids=torch.tensor([ids]))
    record = policy.model.take_extras().experts_BSLK
    assert record is not None
    return record[0, :-1]


def assert_recorded(
    policy: PolicyForCausalLM, prompts: list[list[int]], completions: list[Completion]
) -> None:
    """Every choice is the trainer's: float32 on both sides, no score near enough to flip one."""
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = trainers_choices(policy, prompt + completion.token_ids)
        assert completion.experts is not None
        assert completion.experts.dtype == torch.int8
        assert completion.experts.shape == expected.shape
        assert torch.equal(completion.experts.sort(-1).values, expected.sort(-1).values)


def sampling(seed: int, tokens: int = 20, **changes: Any) -> Any:
    from vllm import SamplingParams

    fields = {"max_tokens": tokens, "temperature": 1.0, "seed": seed, "ignore_eos": True}
    return SamplingParams(**fields | changes)


def runner_of(engine: Engine) -> Any:
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner


@pytest.fixture(scope="module")
def recording(saved: Path) -> Iterator[Engine]:
    """Does not draft; one block holds a whole sequence."""
    engine = Engine.start(saved, Settings(num_speculative_tokens=0), record_routing=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def crowded(saved: Path) -> Iterator[Engine]:
    """Drafts; prompts in parts of at most 64 tokens; blocks of 32 in a cache that holds three requests."""
    arguments = launch.arguments

    def small(*args: Any) -> dict[str, Any]:
        return arguments(*args) | {"block_size": 32, "max_num_batched_tokens": 64}

    settings = Settings(max_model_len=160, kv_cache_memory_gib=0.002, max_num_seqs=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "arguments", small)
        engine = Engine.start(saved, settings, record_routing=True)
    yield engine
    engine.close()


@cpu
def test_ragged_batches(recording: Engine, tiny: Any) -> None:
    policy = tiny.policy(3)
    recording.sync(named_tensors(policy))
    prompts = [tiny.prompts(1, length, length)[0] for length in (1, 3, 40, 17, 2, 60)]
    requests = [sampling(i, tokens) for i, tokens in enumerate((30, 1, 7, 20, 11, 5))]
    for _ in range(2):  # the second time with nothing left of the first
        assert_recorded(policy, prompts, recording.generate(prompts, requests))
    recording.score(prompts[2:4])
    assert_recorded(policy, prompts[:1], recording.generate(prompts[:1], requests[:1]))


@cpu
def test_cached_chunked_preempted_and_drafted_batches(
    crowded: Engine, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it in one batch, and each of it seen to happen."""
    policy = tiny.policy(0)
    crowded.sync(named_tensors(policy))
    seen = dict.fromkeys(("preempted", "cached", "cut", "drafted"), 0)
    runner = runner_of(crowded)
    execute = runner.execute_model

    def watched(step: Any, *args: Any) -> Any:
        seen["preempted"] += len(step.preempted_req_ids or ())
        seen["drafted"] += sum(map(len, step.scheduled_spec_decode_tokens.values()))
        for new in step.scheduled_new_reqs:
            left = len(new.prompt_token_ids) - new.num_computed_tokens
            seen["cached"] += new.num_computed_tokens
            seen["cut"] += step.num_scheduled_tokens[new.req_id] < left
        return execute(step, *args)

    monkeypatch.setattr(runner, "execute_model", watched)
    (shared,) = tiny.prompts(1, 70)
    lengths = (70, 40, 5, 66, 33, 70, 12, 70, 64, 65, 20, 68)
    prompts = [
        shared[:n] if i % 2 else tiny.prompts(1, n, seed=i)[0] for i, n in enumerate(lengths)
    ]
    before = crowded.draft_counts()
    completions = crowded.generate(prompts, [sampling(i, 50) for i in range(len(prompts))])
    drafts = crowded.draft_counts() - before
    assert min(seen.values()) > 0, seen
    assert 0 < drafts.accepted_per_position[0] < drafts.drafts  # kept and rejected ones
    assert_recorded(policy, prompts, completions)


@cpu
@pytest.mark.parametrize("which", ["recording", "crowded"])
def test_an_independent_hook_sees_the_same(
    which: str, request: pytest.FixtureRequest, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 arithmetic too, where the trainer could not vouch for each choice.

    The hook knows rows by what went into the model, token and position, and what came out of the
    selection. A recorded row must be one of those with its token and position, and in the crowded
    engine, where one may come up more than once, all of a sequence must be found.
    """
    engine = request.getfixturevalue(which)
    engine.sync(named_tensors(tiny.policy(5)))
    runner = runner_of(engine)
    inputs: list[tuple[int, int]] = []
    rows: dict[int, list[list[int]]] = {}
    forward = runner._model_forward

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        ids, positions = kwargs["input_ids"].tolist(), kwargs["positions"].tolist()
        inputs.extend(zip(ids, positions, strict=True))
        return forward(*args, **kwargs)

    monkeypatch.setattr(runner, "_model_forward", model_forward)
    model = runner.get_model().model
    for index in (1, 2):
        router = model.layers[index].mlp.experts.router
        compute = router._compute_routing

        def routing(*args: Any, index: int = index, compute: Any = compute, **kwargs: Any) -> Any:
            logits = args[1].bfloat16().float()  # what a coarser engine would choose by
            weights, experts = compute(args[0], logits, *args[2:], **kwargs)
            rows.setdefault(index, []).extend(experts.sort(-1).values.tolist())
            return weights, experts

        monkeypatch.setattr(router, "_compute_routing", routing)
    lengths = (9, 25, 3, 60, 44, 31, 58, 2)
    prompts = [tiny.prompts(1, n, seed=n)[0] for n in lengths]
    completions = engine.generate(prompts, [sampling(i, 30) for i in range(len(prompts))])
    assert len(rows[1]) == len(rows[2]) == len(inputs)
    known: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for place, one, two in zip(inputs, rows[1], rows[2], strict=True):
        known.setdefault(place, set()).add((*one, *two))
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = prompt + completion.token_ids
        record = completion.experts.sort(-1).values.flatten(1).tolist()
        for position, (token, chosen) in enumerate(zip(ids[:-1], record, strict=True)):
            assert tuple(chosen) in known[token, position], position
    if which == "recording":
        assert sum(map(len, known.values())) > 200


def test_an_engine_that_was_not_asked_records_nothing(plain_engine: Engine, tiny: Any) -> None:
    plain_engine.sync(named_tensors(tiny.policy(0)))
    assert plain_engine.generate(tiny.prompts(1), sampling(0))[0].experts is None


class FakeRunner:
    """As much of vLLM's runner as the recorder reads: two layers, blocks of four slots."""

    def __init__(self) -> None:
        table = SimpleNamespace(
            block_size=4,
            blocks_per_kv_block=1,
            block_table=SimpleNamespace(np=np.zeros((4, 8), dtype=np.int32)),
            slot_mapping=SimpleNamespace(gpu=torch.zeros(32, dtype=torch.int64)),
        )
        self.kv_cache_config = SimpleNamespace(num_blocks=8)
        self.input_batch = SimpleNamespace(
            block_table=[table],
            num_prompt_tokens=np.zeros(4, dtype=np.int64),
            num_tokens_no_spec=np.zeros(4, dtype=np.int64),
            num_computed_tokens_cpu=np.zeros(4, dtype=np.int64),
        )
        self.execute_model = lambda step: None
        self.recorder = RoutingRecorder.__new__(RoutingRecorder)
        recorder = self.recorder
        recorder.runner, recorder.execute = self, self.execute_model
        recorder.layers, recorder.dtype = [None, None], torch.int8
        recorder.chosen = [None, None]
        recorder.in_slots = recorder._slots(1)
        recorder.clear()

    def step(self, *requests: tuple[str, list[int], int, int, range, list[int]]) -> None:
        """Compute requests: name, its blocks, tokens of prompt and in all, positions, experts.

        The second layer's experts are 10 more than the first's.
        """
        batch, table = self.input_batch, self.input_batch.block_table[0]
        batch.num_reqs = len(requests)
        batch.req_ids = [f"{name}-abcdef01" for name, *_ in requests]
        rows, positions, chosen, slots = [], [], [], []
        for row, (_, blocks, prompt, tokens, places, experts) in enumerate(requests):
            batch.num_prompt_tokens[row], batch.num_tokens_no_spec[row] = prompt, tokens
            batch.num_computed_tokens_cpu[row] = places.start
            table.block_table.np[row, : len(blocks)] = blocks
            rows += [row] * len(places)
            positions += places
            chosen += experts
            slots += [blocks[p // 4] * 4 + p % 4 for p in places]
        self.req_indices = SimpleNamespace(np=np.array(rows))
        self.positions = torch.tensor(positions)
        table.slot_mapping.gpu[: len(slots)] = torch.tensor(slots)
        experts_T1 = torch.tensor(chosen, dtype=torch.int32).unsqueeze(1)
        self.recorder.chosen[:] = [experts_T1, experts_T1 + 10]
        self.recorder._execute(SimpleNamespace(total_num_scheduled_tokens=len(rows)))

    def take(self, **lengths: int) -> dict[str, list[int]]:
        records = self.recorder.take(lengths)
        for record in records.values():
            known = record[:, 0, 0] >= 0
            assert torch.equal(record[known][:, 1], record[known][:, 0] + 10)
        return {name: record[:, 0, 0].tolist() for name, record in records.items()}


def test_a_prompt_in_parts_adds_up() -> None:
    runner = FakeRunner()
    runner.step(("a", [0, 1], 6, 6, range(4), [0, 1, 2, 3]), ("b", [2], 2, 2, range(2), [5, 6]))
    runner.step(("a", [0, 1], 6, 6, range(4, 6), [4, 5]), ("b", [2], 2, 3, range(2, 3), [7]))
    assert runner.take(a=7, b=4) == {"a": [0, 1, 2, 3, 4, 5], "b": [5, 6, 7]}


def test_rejected_drafts_give_way_to_the_token_drawn() -> None:
    """Position 3 is drafted and rejected, 4 drafted and kept, 6 drafted beyond the end."""
    runner = FakeRunner()
    runner.step(("a", [0, 1], 2, 2, range(2), [0, 1]))
    runner.step(("a", [0, 1], 2, 3, range(2, 4), [2, 9]))
    runner.step(("a", [0, 1], 2, 4, range(3, 5), [3, 4]))
    runner.step(("a", [0, 1], 2, 6, range(5, 7), [5, 9]))
    assert runner.take(a=7) == {"a": [0, 1, 2, 3, 4, 5]}


def test_what_tokens_were_drawn_with_outlives_preemption() -> None:
    """Three tokens are there when all is computed anew, with other choices; the fourth is new."""
    runner = FakeRunner()
    runner.step(("a", [0], 2, 2, range(2), [0, 1]))
    runner.step(("a", [0], 2, 3, range(2, 3), [2]))
    runner.step(("a", [5], 2, 4, range(4), [7, 7, 7, 3]))
    assert runner.take(a=5) == {"a": [0, 1, 2, 3]}
    # And a request that finds the block in the cache finds what is in it.
    runner.step(("b", [5, 6], 5, 5, range(4, 5), [4]))
    assert runner.take(b=6) == {"b": [7, 7, 7, 3, 4]}


def test_the_prefix_cache_serves_the_step_that_fills_it() -> None:
    """Two samples of one prompt in one step: the second computes its last token alone."""
    runner = FakeRunner()
    runner.step(
        ("a", [3, 1], 5, 5, range(5), [0, 1, 2, 3, 4]), ("b", [3, 2], 5, 5, range(4, 5), [8])
    )
    assert runner.take(a=6, b=6) == {"a": [0, 1, 2, 3, 4], "b": [0, 1, 2, 3, 8]}


def test_a_preempted_prompt_is_computed_anew() -> None:
    runner = FakeRunner()
    runner.step(("a", [0, 1], 6, 6, range(5), [0, 1, 2, 3, 4]))
    runner.step(("a", [0, 4], 6, 6, range(4, 6), [6, 7]))
    assert runner.take(a=7) == {"a": [0, 1, 2, 3, 6, 7]}


def test_unknown_positions_are_marked() -> None:
    runner = FakeRunner()
    runner.step(("a", [0], 2, 2, range(2), [0, 1]))
    assert runner.take(a=5) == {"a": [0, 1, MISSING, MISSING]}


def test_vllms_own_record_loses_its_dense_layers() -> None:
    theirs = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3) + 230
    ours = returned(theirs, [1, 3], 256)
    assert ours.dtype == torch.int16
    assert ours.tolist() == [[[233, 234, 235], [239, 240, 241]], [[245, 246, 247], [251, 252, 253]]]


def test_settings_of_the_cuda_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's constraints: its second model runner and prefix caching."""
    model = {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 1,
    }
    assert launch.moe_layers(model) == [1, 2]
    launch.check(model, Settings(), False, True)
    monkeypatch.setattr(environment, "on_cpu", lambda: False)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    launch.prepare(model, True)
    found = launch.arguments(Path("x"), model, Settings(), True, True)
    assert found["enable_return_routed_experts"]
    assert found["enable_prefix_caching"]
    assert "enable_return_routed_experts" not in launch.arguments(
        Path("x"), model, Settings(), True
    )
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(EngineError, match="VLLM_USE_V2_MODEL_RUNNER is 0"):
        launch.check(model, Settings(), False, True)
    with pytest.raises(EngineError, match="no layer with experts"):
        launch.check(model | {"n_routed_experts": None}, Settings(), True, True)
