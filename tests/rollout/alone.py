"""Checks that need a process of their own: `python alone.py latent|sharded|split FOLDER`."""

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from posttrain.policy.checkpoint import named_tensors, save
from posttrain.rollout import parity
from posttrain.rollout.engine import Engine
from posttrain.rollout.sync import SyncError
from tests.rollout.tiny import Settings, Tiny

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}


def latent(folder: Path) -> None:
    """The released latent size, on the MLA kernel, with YaRN and query compression."""
    sizes = {
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 32,
        "rope_parameters": YARN,
    }
    save(Tiny.policy(0, **sizes), None, folder)
    engine = Engine.start(folder, Settings(max_model_len=160))
    assert engine.llm.llm_engine.model_config.use_mla
    policy = Tiny.policy(1, **sizes)
    engine.sync(named_tensors(policy))
    assert any("W_UK" in n for n, _ in models(engine)[0].named_parameters())
    report = parity.check(engine, policy, tolerance=1e-4, tokens=70)  # past YaRN's original length
    assert report.experts_missed == 0
    print(report)
    # what decoding reads is a copy of its own
    with torch.no_grad():
        attention = models(engine)[0].model.layers[1].self_attn.mla_attn.mla_attn
        attention.W_UV[0, 0, 0] += 1.0
    with pytest.raises(SyncError, match=r"model\.layers\.1\.self_attn\.kv_b_proj\.weight"):
        engine.link.verify()
    engine.close()


def models(engine: Engine) -> tuple[torch.nn.Module, torch.nn.Module]:
    return engine.llm.llm_engine.model_executor.driver_worker.worker.policy_models()


def sharded(folder: Path) -> None:
    """Two processes hold half of every tensor each, and an engine each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=250))
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    if rank == 0:
        save(Tiny.policy(0), None, folder)
    dist.barrier()
    policy = Tiny.policy(1)
    whole = {name: tensor.clone() for name, tensor in named_tensors(policy)}
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in policy.parameters())

    engine = Engine.start(folder, Settings(seed=rank), load_weights=False)
    report = engine.sync(named_tensors(policy))
    assert report.tensors == len(whole)
    sent = engine.link.sent
    engine.sync(whole.items())
    assert engine.link.sent == sent  # gathered, they are the same tensors bit for bit
    print(rank, report, parity.check(engine, policy, tolerance=1e-4))

    # each process generates for prompts of its own, as many as it likes
    from vllm import SamplingParams

    request = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True)
    completions = engine.generate(Tiny.prompts(2 + 3 * rank, seed=rank), request)
    assert len(completions) == 2 + 3 * rank
    # a fault of one engine stops all processes, which gather the policy between them
    if rank == 1:
        with torch.no_grad():
            models(engine)[0].model.layers[1].input_layernorm.weight.mul_(1.1)
    place = "in another process" if rank == 0 else r"layers\.1 on"
    with pytest.raises(parity.ParityError, match=place):
        parity.check(engine, policy, tolerance=1e-4)
    engine.close()
    dist.barrier()  # the trainer's process group outlives the engine
    dist.destroy_process_group()


def split(folder: Path) -> None:
    """Two processes run one engine between them, tensor-parallel, each with prompts of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=250))
    rank = dist.get_rank()
    if rank == 0:
        save(Tiny.policy(0), None, folder)
    dist.barrier()
    engine = Engine.start(folder, Settings(tensor_parallel_size=2), load_weights=False)
    policy = Tiny.policy(1)
    engine.sync(named_tensors(policy))
    print(rank, parity.check(engine, policy, tolerance=1e-4, seed=rank))
    model, _ = models(engine)
    assert model.model.layers[0].self_attn.o_proj.tp_size == 2
    if rank == 1:  # a corruption in one worker is found by both
        with torch.no_grad():
            model.model.layers[1].mlp.experts.routed_experts.w2_weight[3, 0, 0] += 1.0
    with pytest.raises(SyncError, match=r"layers\.1\.mlp\.experts\.\d+\.down_proj"):
        engine.link.verify()
    engine.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    {"latent": latent, "sharded": sharded, "split": split}[sys.argv[1]](Path(sys.argv[2]))
    print("passed")
