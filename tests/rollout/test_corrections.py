"""Each correction, beside what vLLM computes without it.

A test that finds vLLM's own function right says so: the correction can be dropped then.
"""

import contextlib
import importlib.metadata
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from posttrain import environment
from posttrain.policy.checkpoint import named_tensors, save
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
        "latents of other sizes": "corrected",
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


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("rank", "rope", "latent"), [(512, 64, True), (32, 16, False)])
def test_only_the_kernels_latents_are_kept_as_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any, rank: int, rope: int, latent: bool
) -> None:
    """As a plain `vllm serve` decides it, with no variable set; without the correction both are."""
    from vllm import envs
    from vllm.config import ModelConfig
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    sizes = {"kv_lora_rank": rank, "qk_rope_head_dim": rope, "qk_nope_head_dim": 48}
    save(tiny.policy(0, **sizes), None, tmp_path)
    envs.disable_envs_cache()  # the engine has settled on its own
    corrected = ModelArchConfigConvertorBase.get_head_size
    for get_head_size, expected in ((corrected, latent), (corrected.__wrapped__, True)):
        monkeypatch.setattr(ModelArchConfigConvertorBase, "get_head_size", get_head_size)
        monkeypatch.delenv("VLLM_MLA_DISABLE", raising=False)
        config = ModelConfig(str(tmp_path), skip_tokenizer_init=True)
        assert config.use_mla == expected
        assert config.get_head_size() == (rank + rope if expected else 48 + rope)


@pytest.mark.slow
def test_a_plain_server_answers(tmp_path: Path, tiny: Any) -> None:
    """The command that a run prints at its end, on a policy whose latents the kernel does not take."""
    tokenizer = AutoTokenizer.from_pretrained("data/arithmetic/tokenizer")
    policy = tiny.policy(0, vocab_size=len(tokenizer))
    save(policy, tokenizer, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*shlex.split(environment.serve_command(str(tmp_path))), "--port", str(port)]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    log = tmp_path / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, *command[1:]], env=variables, stdout=output, stderr=output
        )
    asked = {"model": str(tmp_path), "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(asked | {"return_token_ids": True, "ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        for _ in range(200):
            assert server.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(urllib.error.URLError):
                answer = json.load(urllib.request.urlopen(request, timeout=120))
                break
            time.sleep(1)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    ids = [5, 6, 7]
    for _ in range(4):
        ids.append(int(policy(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer["choices"][0]["token_ids"] == ids[3:]


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
