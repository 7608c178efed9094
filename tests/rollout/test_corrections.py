"""Each correction, beside what vLLM computes without it.

A test that finds vLLM's own function right says so: the correction can be dropped then.
"""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import environment
from posttrain.policy.checkpoint import named_tensors
from posttrain.rollout import corrections
from posttrain.rollout.engine import Engine
from posttrain.rollout.sync import SyncError

pytestmark = pytest.mark.skipif(not environment.on_cpu(), reason="vLLM's CPU faults")


@pytest.mark.usefixtures("engine")
def test_all_faults_are_there_and_corrected() -> None:
    assert corrections.register() == {
        "rotary embedding": "corrected",
        "reloaded experts": "corrected",
        "drafting at a temperature": "corrected",
        "seeds of long prompts": "corrected",
    }


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("sliced", [False, True])
def test_every_head_of_a_query_is_rotated(heads: int, sliced: bool) -> None:
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    size, tokens = 16, 5
    angles = torch.arange(tokens).float()[:, None] * torch.linspace(0.1, 1.0, size // 2)

    class Rope:
        head_size = rotary_dim = size
        is_neox_style = False
        cos_sin_cache = torch.cat((angles.cos(), angles.sin()), dim=-1)

        def _match_cos_sin_cache_dtype(self, query: torch.Tensor) -> torch.Tensor:
            return self.cos_sin_cache

    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(tokens, heads, 2 * size, generator=generator)
    positions = torch.arange(tokens)

    def rotate(forward: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        memory = wide.clone()
        query = memory[..., size:] if sliced else memory[..., size:].contiguous()
        key = memory[:, :1, :size]
        returned, key = forward(Rope(), positions, query, key)
        torch.testing.assert_close(returned, query)  # both ways of use: in place, and the result
        return query, key, memory

    query, key, memory = rotate(RotaryEmbedding.forward_cpu)
    # pairs (x_2i, x_2i+1) turn by the position's angle: the definition, with complex numbers
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    for ours, given in ((query, wide[..., size:]), (key, wide[:, :1, :size])):
        pairs = torch.view_as_complex(given.reshape(tokens, -1, size // 2, 2).contiguous())
        right = torch.view_as_real(pairs * turn).flatten(-2)
        torch.testing.assert_close(ours, right, atol=1e-6, rtol=1e-5)
    if heads > 1 and sliced:  # and nothing else was touched
        torch.testing.assert_close(memory[:, 1:, :size], wide[:, 1:, :size])

    wrong, _, _ = rotate(RotaryEmbedding.forward_cpu.__wrapped__)
    assert torch.allclose(wrong, query) == (heads == 1)


def test_without_its_correction_a_sync_leaves_wrong_experts(
    engine: Engine, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    policy = tiny.policy(2)
    uncorrected = UnquantizedFusedMoEMethod._setup_kernel.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(UnquantizedFusedMoEMethod, "_setup_kernel", uncorrected)
        with pytest.raises(SyncError, match=r"layers\.1\.mlp\.experts\.0\.gate_proj"):
            engine.sync(named_tensors(policy))
    engine.sync(named_tensors(policy))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_sampling_values_reach_every_drafted_token(dtype: torch.dtype) -> None:
    from vllm.v1.sample import rejection_sampler

    values = (
        torch.tensor([3, 0, 5]).to(dtype) if dtype == torch.int32 else torch.tensor([0.7, 0, 2])
    )
    ends = torch.tensor([2, 3, 3], dtype=torch.int32)  # the third request has no draft
    expand = rejection_sampler.expand_batch_to_tokens
    expected = torch.stack((values[0], values[0], torch.ones((), dtype=dtype)))
    torch.testing.assert_close(expand(values, ends, 3, 0, 1), expected)
    torch.testing.assert_close(expand(values, ends, 3), values[[0, 0, 1]])

    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        lost = expand.__wrapped__(values, ends, 3, 0, 1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.equal(lost, expected)


@pytest.mark.parametrize("drafting", [True, False])
def test_a_seeded_request_does_not_depend_on_how_its_prompt_is_cut(
    engine: Engine, plain_engine: Engine, tiny: Any, drafting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    one = engine if drafting else plain_engine
    one.sync(named_tensors(tiny.policy(2)))
    prompts = tiny.prompts(6, length=70)
    requests = [
        SamplingParams(max_tokens=8, temperature=1.0, seed=i, ignore_eos=True) for i in range(6)
    ]
    whole = [c.token_ids for c in one.generate(prompts, requests)]
    scheduler = one.llm.llm_engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", 32)
    one.llm.reset_prefix_cache()
    assert [c.token_ids for c in one.generate(prompts, requests)] == whole

    for name in ("_sample", "_bookkeeping_sync"):
        uncorrected = getattr(CPUModelRunner, name).__wrapped__
        with monkeypatch.context() as patch:
            patch.setattr(CPUModelRunner, name, uncorrected)
            one.llm.reset_prefix_cache()
            if name == "_sample":  # discarded draws count
                assert [c.token_ids for c in one.generate(prompts, requests)] != whole
            else:
                with pytest.raises(RuntimeError, match="offset"):
                    one.generate(prompts, requests)


def test_importing_them_costs_nothing() -> None:
    code = (
        "import sys; import posttrain.rollout.corrections; "
        "assert not {'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_vllm_finds_them_by_itself() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (name,) = project["entry-points"]["vllm.general_plugins"].items()
    entry = importlib.metadata.EntryPoint(*name, "vllm.general_plugins")
    assert entry.load() is corrections.register
