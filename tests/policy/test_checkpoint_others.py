"""Checkpoints that others wrote: stock transformers', published ones, FP8, and MTP modules missing."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.policy import checkpoint
from posttrain.policy.checkpoint import load, named_tensors, save
from tests.policy.tiny import (
    YARN,
    assert_same,
    edit_config,
    logits,
    stock,
    tiny_config,
    tiny_policy,
)

# Checkpoints of others


def test_a_checkpoint_of_stock_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(3)
    reference = AutoModelForCausalLM.from_config(tiny_config())
    for layer in reference.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.uniform_(-0.2, 0.2)
    reference.save_pretrained(tmp_path / "a")
    policy = load(tmp_path / "a")
    assert torch.equal(logits(policy), logits(stock(tmp_path / "a")))
    # transformers writes num_nextn_predict_layers 1 and no module: ours starts from layer 2.
    assert "holds 0 of 1 MTP modules" in caplog.text


DEEPSEEK_V3 = {
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
}
MOONLIGHT = DEEPSEEK_V3 | {"rope_scaling": None, "rope_theta": 50000.0, "q_lora_rank": None}
NEW_KEYS = (
    "rope_parameters",
    "rope_interleave",
    "dtype",
    "head_dim",
    "qk_head_dim",
    "pad_token_id",
)


@pytest.mark.parametrize(
    ("published", "depth"), [(DEEPSEEK_V3, 1), (MOONLIGHT, 0)], ids=["deepseek-v3", "moonlight"]
)
def test_published_config_keys(tmp_path: Path, published: dict, depth: int) -> None:
    rope = {key: published[key] for key in ("rope_theta", "rope_scaling")}
    q_lora_rank = published.get("q_lora_rank", 24)
    policy = tiny_policy(num_nextn_predict_layers=depth, q_lora_rank=q_lora_rank, **rope)
    save(policy, None, tmp_path / "a")
    edit_config(tmp_path / "a", drop=NEW_KEYS, **published)
    again = load(tmp_path / "a", dtype=torch.float32)
    assert_same(policy, again)
    assert torch.equal(logits(again), logits(policy))
    assert again.config.rope_parameters["rope_theta"] == published["rope_theta"]
    assert load(tmp_path / "a").dtype == torch.bfloat16
    save(again, None, tmp_path / "b")
    assert torch.equal(logits(stock(tmp_path / "b")), logits(policy))


def test_fp8_blocks(tmp_path: Path) -> None:
    policy = tiny_policy()
    save(policy, None, tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    quantised = [
        name
        for name in tensors
        if name.endswith(("_proj.weight", "with_mqa.weight")) and "eh_proj" not in name
    ]
    assert any(".experts.7." in name for name in quantised)
    rows, columns = 16, 20
    for name in quantised:
        weight = tensors[name]
        scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
                scales[i, j] = weight[at].abs().max() / 448
                rounded = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
                expected[name][at] = rounded.float() * scales[i, j]
                weight[at] = rounded.float()
        tensors[name] = weight.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, tmp_path / "a/model.safetensors")
    quantisation = {"quant_method": "fp8", "weight_block_size": [rows, columns], "fmt": "e4m3"}
    edit_config(tmp_path / "a", quantization_config=quantisation)

    again = load(tmp_path / "a")

    for name, tensor in named_tensors(again):
        assert torch.equal(tensor, expected[name]), name
    assert not hasattr(again.config, "quantization_config")
    save(again, None, tmp_path / "b")
    assert_same(again, load(tmp_path / "b"))


def test_a_hub_name_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    save(policy, None, tmp_path / "a")
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "a")

    monkeypatch.setattr(checkpoint, "snapshot_download", fetch)
    again = load("maker/tiny")
    assert asked == [("maker/tiny", ["*.json", "*.safetensors"])]
    assert_same(policy, again)
    assert again.config.name_or_path == "maker/tiny"


# MTP modules that the files lack, or that are not wanted


def test_missing_modules_start_from_the_last_layer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tiny_policy(num_nextn_predict_layers=0), None, tmp_path / "a")
    policy = load(tmp_path / "a", num_nextn_predict_layers=2)
    assert "holds 0 of 2 MTP modules; the others start as copies of trunk layer 2" in caplog.text
    trunk = policy.model.layers[2].state_dict()
    assert trunk["mlp.gate.e_score_correction_bias"].abs().min() > 0
    for module in policy.model.layers[3:]:
        own = module.state_dict()
        for name, tensor in trunk.items():
            assert torch.equal(own.pop(name), tensor), name
        assert torch.equal(own.pop("shared_head.norm.weight"), policy.model.norm.weight)
        assert torch.equal(own.pop("enorm.weight"), torch.ones(32))
        assert torch.equal(own.pop("hnorm.weight"), torch.ones(32))
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        # (embedding + hidden) / sqrt(2): one rounding of each operation in float32.
        expected = (x[:, :32] + x[:, 32:]) / 2**0.5
        torch.testing.assert_close(x @ own.pop("eh_proj.weight").T, expected, atol=1e-6, rtol=1e-6)
        assert not own
    assert policy.config.num_nextn_predict_layers == 2


def test_further_modules_start_from_the_last_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tiny_policy(num_nextn_predict_layers=2), None, tmp_path / "a")
    policy = load(tmp_path / "a", num_nextn_predict_layers=4)
    assert "holds 2 of 4 MTP modules; the others start as copies of MTP module 1" in caplog.text
    first, *others = [module.state_dict() for module in policy.model.layers[3:]]
    assert len(others) == 3
    for name, tensor in others[0].items():
        assert torch.equal(others[1][name], tensor)
        assert torch.equal(others[2][name], tensor)
    assert not torch.equal(first["eh_proj.weight"], others[0]["eh_proj.weight"])


def test_fewer_modules_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tiny_policy(num_nextn_predict_layers=2), None, tmp_path / "a")
    whole = load(tmp_path / "a")
    for depth in (0, 1):
        policy = load(tmp_path / "a", num_nextn_predict_layers=depth)
        assert len(policy.model.layers) == 3 + depth
        kept = dict(named_tensors(policy))
        assert all(torch.equal(t, kept[n]) for n, t in named_tensors(whole) if n in kept)
    assert caplog.text == ""


def test_depth_of_a_config_that_does_not_say(tmp_path: Path) -> None:
    policy = tiny_policy(num_nextn_predict_layers=2)
    save(policy, None, tmp_path / "a")
    edit_config(tmp_path / "a", drop=("num_nextn_predict_layers",))
    assert_same(policy, load(tmp_path / "a"))


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("model.layers.3.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.3.shared_head.head.weight", "lm_head.weight"),
    ],
)
def test_differing_copies_are_reported_and_the_trunks_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, original: str
) -> None:
    policy = tiny_policy()
    save(policy, None, tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    tensors[name][5, 6] += 0.25
    save_file(tensors, tmp_path / "a/model.safetensors")
    with caplog.at_level(logging.WARNING):
        again = load(tmp_path / "a")
    assert f"{name} differs from {original} by up to 0.25" in caplog.text
    assert_same(policy, again)
    caplog.clear()
    del tensors[name]
    save_file(tensors, tmp_path / "a/model.safetensors")
    assert_same(policy, load(tmp_path / "a"))
    assert caplog.text == ""
