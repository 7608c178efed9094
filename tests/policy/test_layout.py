"""Released names and the stream of tensors."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from posttrain.policy.checkpoint import load, named_tensors, save
from tests.policy.tiny import tiny_policy

ATTENTION = [
    "self_attn.q_a_proj.weight",
    "self_attn.q_a_layernorm.weight",
    "self_attn.q_b_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight",
    "self_attn.kv_a_layernorm.weight",
    "self_attn.kv_b_proj.weight",
    "self_attn.o_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]
PROJECTIONS = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
EXPERTS = [
    "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias",
    *[f"mlp.shared_experts.{p}" for p in PROJECTIONS],
    *[f"mlp.experts.{e}.{p}" for e in range(8) for p in PROJECTIONS],
]
MTP = [
    "embed_tokens.weight",
    "enorm.weight",
    "hnorm.weight",
    "eh_proj.weight",
    "shared_head.norm.weight",
    "shared_head.head.weight",
]


def test_names_are_those_of_the_release() -> None:
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    expected |= {f"model.layers.0.{n}" for n in ATTENTION}
    expected |= {f"model.layers.0.mlp.{p}" for p in PROJECTIONS}
    for layer in (1, 2, 3, 4):
        expected |= {f"model.layers.{layer}.{n}" for n in ATTENTION + EXPERTS}
    for layer in (3, 4):
        expected |= {f"model.layers.{layer}.{n}" for n in MTP}

    names = [name for name, _ in named_tensors(tiny_policy(num_nextn_predict_layers=2))]

    assert len(names) == len(set(names))
    assert set(names) == expected


def test_the_stream_goes_layer_by_layer() -> None:
    names = [name for name, _ in named_tensors(tiny_policy())]
    groups = [".".join(name.split(".")[:3]) for name in names]
    order = list(dict.fromkeys(groups))
    assert order == [
        "model.embed_tokens.weight",
        "model.layers.0",
        "model.layers.1",
        "model.layers.2",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.3",
    ]
    assert groups == sorted(groups, key=order.index)


def test_experts_are_cut_where_the_model_multiplies() -> None:
    policy = tiny_policy()
    stream = dict(named_tensors(policy))
    experts = policy.model.layers[1].mlp.experts
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for e in range(8):
        part = {p: stream[f"model.layers.1.mlp.experts.{e}.{p}"] for p in PROJECTIONS}
        gate, up, down = part.values()
        alone = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        with torch.no_grad():
            inside = experts(x, torch.full((5, 1), e), torch.ones(5, 1))
        # The fused product sums in another order: rounding of float32 at values of about 1.
        torch.testing.assert_close(alone, inside, atol=1e-5, rtol=1e-5)


def test_tensors_are_views_and_cover_the_model_once() -> None:
    policy = tiny_policy()
    for name, tensor in named_tensors(policy):
        if "shared_head.head" not in name and "layers.3.embed_tokens" not in name:
            tensor.add_(1)
    before = tiny_policy().state_dict()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, before[name] + 1), name


def test_mtp_copies_are_the_trunks() -> None:
    stream = dict(named_tensors(tiny_policy()))
    embedding, head = stream["model.embed_tokens.weight"], stream["lm_head.weight"]
    assert torch.equal(stream["model.layers.3.embed_tokens.weight"], embedding)
    assert torch.equal(stream["model.layers.3.shared_head.head.weight"], head)
    assert not torch.equal(embedding, head)


def test_biases_are_float32_in_a_bfloat16_policy() -> None:
    stream = dict(named_tensors(tiny_policy().to(torch.bfloat16)))
    biases = {name for name in stream if name.endswith("e_score_correction_bias")}
    assert len(biases) == 3
    assert {stream[name].dtype for name in biases} == {torch.float32}
    assert {stream[name].dtype for name in stream.keys() - biases} == {torch.bfloat16}


def test_buffers_that_are_not_kept_are_not_sent() -> None:
    policy = tiny_policy()
    policy.model.layers[1].register_buffer("scratch", torch.ones(1), persistent=False)
    policy.model.layers[1].register_buffer("kept", torch.ones(1))
    names = [name for name, _ in named_tensors(policy)]
    assert "model.layers.1.kept" in names
    assert "model.layers.1.scratch" not in names


def test_wrappers_do_not_show() -> None:
    plain = dict(named_tensors(tiny_policy()))
    wrapped = torch.nn.Module()
    wrapped.module = tiny_policy()
    through = dict(named_tensors(wrapped))
    assert list(through) == list(plain)
    assert all(torch.equal(through[name], plain[name]) for name in plain)


def test_partitions_are_gathered_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 leaves empty parameters with a `ds_id`, and fills them inside a context."""
    plain = {name: tensor.clone() for name, tensor in named_tensors(tiny_policy())}
    policy = tiny_policy()
    hidden: dict[int, torch.Tensor] = {}
    for index, parameter in enumerate(policy.parameters()):
        hidden[index], parameter.ds_id = parameter.data, index
        parameter.data = torch.empty(0)
    inside: list[int] = []

    @contextmanager
    def gathered(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        (parameter,) = parameters
        inside.append(parameter.ds_id)
        assert len(inside) == 1
        parameter.data = hidden[parameter.ds_id]
        yield
        parameter.data = torch.empty(0)
        inside.remove(parameter.ds_id)

    deepspeed = ModuleType("deepspeed")
    deepspeed.zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)

    names = []
    for name, tensor in named_tensors(policy):
        assert torch.equal(tensor, plain[name]), name
        names.append(name)
    assert names == list(plain)
    assert not inside


def shard_and_compare(rank: int, folder: str) -> None:
    """One of two processes: the stream of sharded weights is that of whole ones; so is a save."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    plain = {name: tensor.clone() for name, tensor in named_tensors(tiny_policy())}
    policy = tiny_policy()
    mesh = init_device_mesh("cpu", (2,))
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    assert policy.lm_head.weight.to_local().shape[0] < 67
    names = []
    for name, tensor in named_tensors(policy):
        assert torch.equal(tensor, plain[name]), name
        names.append(name)
    assert names == list(plain)

    save(policy, None, Path(folder) / "saved", write=rank == 0)
    torch.distributed.barrier()
    for name, tensor in named_tensors(load(Path(folder) / "saved")):
        assert torch.equal(tensor, plain[name]), name
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_weights_stream_and_save_like_whole_ones(tmp_path: Path) -> None:
    mp.spawn(shard_and_compare, args=(str(tmp_path),), nprocs=2)
