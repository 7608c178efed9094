"""Checkpoints: ours in transformers, transformers' in ours, and every tensor the same afterwards."""

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from posttrain.policy import checkpoint, shards
from posttrain.policy.checkpoint import CheckpointError, load, named_tensors, save
from posttrain.policy.model import PolicyForCausalLM
from tests.policy.tiny import (
    YARN,
    assert_same,
    logits,
    stock,
    tiny_policy,
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_nextn_predict_layers": 2},
        {"num_nextn_predict_layers": 0, "q_lora_rank": None},
        {"rope_scaling": YARN, "rope_theta": 50000.0},
        {"n_group": 1},
    ],
    ids=["one-mtp", "two-mtp", "no-mtp-no-q-lora", "yarn", "one-group"],
)
def test_stock_transformers_computes_the_same(tmp_path: Path, changes: dict) -> None:
    policy = tiny_policy(**changes)
    save(policy, None, tmp_path / "a")
    reference = stock(tmp_path / "a")
    assert type(reference).__name__ == "DeepseekV3ForCausalLM"
    assert torch.equal(logits(reference), logits(policy))
    assert torch.equal(logits(load(tmp_path / "a")), logits(policy))


def test_load_undoes_save(tmp_path: Path) -> None:
    policy = tiny_policy(num_nextn_predict_layers=2)
    save(policy, None, tmp_path / "a")
    again = load(tmp_path / "a")
    assert_same(policy, again)
    assert again.config.num_nextn_predict_layers == 2
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_shards(tmp_path: Path) -> None:
    policy = tiny_policy()
    save(policy, None, tmp_path / "a", max_shard_bytes=50_000)
    files = sorted(tmp_path.glob("a/*.safetensors"))
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert [f.name for f in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    held = {name: load_file(file) for file in files for name in [file.name]}
    for tensors in held.values():
        assert sum(t.nbytes for t in tensors.values()) <= 50_000
    assert index["weight_map"] == {name: f for f, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in named_tensors(policy))
    assert_same(policy, load(tmp_path / "a"))
    assert torch.equal(logits(stock(tmp_path / "a")), logits(policy))


def test_bfloat16_keeps_its_bits_and_float32_biases(tmp_path: Path) -> None:
    policy = tiny_policy().to(torch.bfloat16)
    for router in policy.model.routers:
        router.e_score_correction_bias = router.e_score_correction_bias.float() + 1e-4
    save(policy, None, tmp_path / "a")
    again = load(tmp_path / "a")
    assert again.dtype == torch.bfloat16
    assert_same(policy, again)
    wide = load(tmp_path / "a", dtype="float32")
    assert wide.dtype == torch.float32
    for name, tensor in named_tensors(wide):
        assert torch.equal(tensor, dict(named_tensors(policy))[name].float()), name


def test_config_says_what_is_inside(tmp_path: Path) -> None:
    policy = tiny_policy(num_nextn_predict_layers=2, rope_scaling=YARN, rope_theta=50000.0)
    policy.config.architectures = ["PolicyForCausalLM"]
    policy.config.num_nextn_predict_layers = 1  # a lie that the file must not repeat
    policy.config.auto_map = {"AutoModel": "modeling_deepseek.DeepseekV3Model"}
    policy.config.name_or_path = "/somewhere/private"
    save(policy.to(torch.bfloat16), None, tmp_path / "a")
    raw = json.loads((tmp_path / "a/config.json").read_text())
    expected = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 2,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "rope_theta": 50000.0,
        "rope_scaling": YARN | {"rope_type": "yarn"},
        "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 50000.0},
    }
    assert {key: raw[key] for key in expected} == expected
    assert "auto_map" not in raw
    assert "private" not in (tmp_path / "a/config.json").read_text()
    read = AutoConfig.from_pretrained(tmp_path / "a")
    assert read.rope_parameters == expected["rope_parameters"]
    assert read.dtype == torch.bfloat16


def test_tokenizer_template_and_generation_config_stand_beside(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("data/arithmetic/tokenizer")
    policy = tiny_policy()
    policy.generation_config.eos_token_id = [3, 5]
    save(policy, tokenizer, tmp_path / "a")
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    assert again.chat_template == tokenizer.chat_template
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    assert load(tmp_path / "a").generation_config.eos_token_id == [3, 5]


def test_files_are_as_readable_as_any_new_file(tmp_path: Path) -> None:
    save(tiny_policy(), None, tmp_path / "a", max_shard_bytes=50_000)
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "a").iterdir()} == {expected}


def test_tied_embeddings(tmp_path: Path) -> None:
    policy = tiny_policy(tie_word_embeddings=True)
    save(policy, None, tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    again = load(tmp_path / "a")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(policy))
    del tensors["lm_head.weight"]  # as transformers writes it
    save_file(tensors, tmp_path / "a/model.safetensors")
    assert torch.equal(logits(load(tmp_path / "a")), logits(policy))


# Replacing


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path: Path) -> None:
    save(tiny_policy(seed=1), None, tmp_path / "a", max_shard_bytes=50_000)
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial/left-over.safetensors").write_text("of a process that was killed")
    policy = tiny_policy(seed=2)
    save(policy, None, tmp_path / "a")
    assert [f.name for f in tmp_path.glob("a/*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "a/model.safetensors.index.json").exists()
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    assert_same(policy, load(tmp_path / "a"))


def test_a_failed_save_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tiny_policy(seed=1)
    save(old, None, tmp_path / "a")
    streamed: list[str] = []

    def full_disk(tensors: dict, file: Path, metadata: dict) -> None:
        if file.name != "part-0.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, file, metadata=metadata)

    def counted(model: PolicyForCausalLM) -> object:
        for name, tensor in named_tensors(model):
            streamed.append(name)
            yield name, tensor

    monkeypatch.setattr(shards, "save_file", full_disk)
    monkeypatch.setattr(checkpoint, "named_tensors", counted)
    with pytest.raises(OSError, match="No space left"):
        save(tiny_policy(seed=2), None, tmp_path / "a", max_shard_bytes=50_000)
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    assert_same(old, load(tmp_path / "a"))
    # Other processes gather every tensor: the one that failed must take part to the end.
    assert streamed == [name for name, _ in named_tensors(old)]


def test_other_peoples_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"is no checkpoint .* not replaced"):
        save(tiny_policy(), None, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_process_that_does_not_write_leaves_nothing(tmp_path: Path) -> None:
    save(tiny_policy(), None, tmp_path / "a", write=False)
    assert list(tmp_path.iterdir()) == []
