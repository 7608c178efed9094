"""Checkpoints that must be refused, and the words of the refusal."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.policy import configuration
from posttrain.policy.checkpoint import CheckpointError, load, save
from posttrain.policy.mtp_start import start_missing
from tests.policy.tiny import tiny_config, tiny_policy

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
NORM = "model.layers.3.hnorm.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tiny_policy(), None, tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tiny_policy(), None, tmp_path / "a", max_shard_bytes=100_000)
    return tmp_path / "a"


def refused(folder: Path, *words: str, **options: object) -> str:
    """Load, expect a refusal that says all of `words`, and return what it said."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    return message


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def configure(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))


# Files


def test_a_truncated_file(folder: Path) -> None:
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 4)
    refused(folder, SINGLE, "truncated or damaged", "fetch it again")


def test_an_empty_file(folder: Path) -> None:
    os.truncate(folder / SINGLE, 0)
    refused(folder, SINGLE, "truncated or damaged")


def test_a_file_that_is_not_safetensors(folder: Path) -> None:
    (folder / SINGLE).write_text("<html>the server is busy</html>" * 9)
    refused(folder, SINGLE, "truncated or damaged")


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, shard.name, INDEX, "missing", "fetch")


def test_a_shard_that_lacks_what_the_index_promises(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name, _ = tensors.popitem()
    save_file(tensors, shard)
    refused(sharded, INDEX, "no file holds", name)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    one, two = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(two)
    name, tensor = next(iter(load_file(one).items()))
    save_file(tensors | {name: tensor}, two)
    refused(sharded, name, one.name, two.name, "again")


def test_a_damaged_index(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": {"model.norm')
    refused(sharded, INDEX, "not readable as JSON")


def test_an_index_that_names_files_elsewhere(sharded: Path) -> None:
    content = json.loads((sharded / INDEX).read_text())
    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (sharded / INDEX).write_text(json.dumps(content))
    (sharded.parent / "elsewhere.safetensors").touch()
    refused(sharded, INDEX, "../elsewhere.safetensors")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"model.norm.weight": 3}])
def test_an_index_without_a_map(sharded: Path, weight_map: object) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(sharded, INDEX, "weight_map")


def test_weights_in_another_format(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    refused(folder, SINGLE, INDEX, "safetensors", "convert")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "config.json", "not found")


def test_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    refused(folder, "adapter", "base model")


def test_a_damaged_config(folder: Path) -> None:
    os.truncate(folder / "config.json", 100)
    refused(folder, "config.json", "not readable as JSON")


def test_no_folder_and_no_hub() -> None:
    refused(Path("nobody/nothing"), "nobody/nothing", "no such folder", "hub")
    refused(Path("/no/such/folder"), "/no/such/folder", "no such folder")


# Configuration


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ["DeepseekV3Model"]}, "must contain DeepseekV3ForCausalLM"),
        ({"model_type": "deepseek_v2"}, "model_type is 'deepseek_v2', must be 'deepseek_v3'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', must be 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy', must be 'noaux_tc'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2, must be 1"),
        ({"rope_interleave": False}, "rope_interleave is False, must be True"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"hidden_act": "no_such_function"}, "no_such_function"),
    ],
)
def test_another_architecture(folder: Path, changes: dict, words: str) -> None:
    configure(folder, **changes)
    refused(folder, "config.json", words)


def test_a_config_without_model_type(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    del raw["model_type"]
    (folder / "config.json").write_text(json.dumps(raw))
    refused(folder, "config.json", "model_type is missing")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"quant_method": "fp8", "weight_block_size": [128]},
    ],
)
def test_other_quantisation(folder: Path, key: str, quantisation: dict) -> None:
    configure(folder, **{key: quantisation})
    refused(folder, "config.json", repr(quantisation["quant_method"]), "unquantised")


def test_a_policy_that_others_would_misread_is_not_saved(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.config.rope_interleave = False
    with pytest.raises(CheckpointError, match="rope_interleave is False, must be True"):
        save(policy, None, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_what_we_write_passes_our_own_check(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    configuration.check(raw, "config.json")
    assert raw.items() >= configuration.RULES.items()


# Tensors


@pytest.mark.parametrize("name", [EXPERT, NORM, BIAS, "lm_head.weight"])
def test_a_missing_tensor(folder: Path, name: str) -> None:
    edit(folder, lambda tensors: tensors.pop(name))
    refused(folder, str(folder), f"1 missing: {name};")


def test_an_unexpected_tensor(folder: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.lora_A.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    refused(folder, f"1 unexpected: {name};")


def test_old_rotary_buffers_are_no_fault(folder: Path) -> None:
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    load(folder)


def test_a_wrong_shape(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({EXPERT: torch.ones(24, 31)}))
    refused(folder, f"1 wrong shape: {EXPERT} in {SINGLE} is (24, 31), must be (24, 32);")


def test_a_wrong_shape_of_a_copy(folder: Path) -> None:
    name = "model.layers.3.embed_tokens.weight"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(66, 32)}))
    refused(folder, f"{name} in {SINGLE} is (66, 32), must be (67, 32)")


def test_integer_weights(folder: Path) -> None:
    packed = torch.ones(24, 32, dtype=torch.int8)
    edit(folder, lambda tensors: tensors.update({EXPERT: packed}))
    refused(folder, f"1 wrong type: {EXPERT} in {SINGLE} is I8;", "unquantised")


def test_all_faults_are_told_at_once_and_long_lists_cut(folder: Path) -> None:
    configure(folder, n_routed_experts=16, vocab_size=68)
    message = refused(folder, "12")
    assert re.search(r"\d+ missing: (model\.\S+, ){7}model\.\S+ and \d+ more;", message)
    assert re.search(r"\d+ wrong shape: .*model\.embed_tokens\.weight", message)
    assert len(message) < 3000


def test_mtp_modules_that_the_config_denies(folder: Path) -> None:
    configure(folder, num_nextn_predict_layers=0)
    refused(folder, "unexpected: model.layers.3.", "num_nextn_predict_layers")


def test_half_an_mtp_module(folder: Path) -> None:
    def keep_projection(tensors: dict) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.3.") and "eh_proj" not in n]:
            del tensors[name]

    edit(folder, keep_projection)
    refused(folder, "missing: model.layers.3.")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EXPERT, BIAS])
def test_values_that_are_no_numbers(folder: Path, name: str, value: float) -> None:
    edit(folder, lambda tensors: tensors[name].flatten()[-1:].fill_(value))
    refused(folder, SINGLE, name, "NaN or infinity")


def test_values_too_large_for_the_type(folder: Path) -> None:
    edit(folder, lambda tensors: tensors[EXPERT].fill_(1e6))
    load(folder, dtype="bfloat16")
    refused(folder, EXPERT, "NaN or infinity as torch.float16", dtype="float16")


def test_an_unknown_type(folder: Path) -> None:
    refused(folder, "dtype 'float33'", dtype="float33")


def test_a_negative_depth(folder: Path) -> None:
    configure(folder, num_nextn_predict_layers=-1)
    refused(folder, "num_nextn_predict_layers is -1")
    refused(folder, "num_nextn_predict_layers is -2", num_nextn_predict_layers=-2)


def to_fp8(tensors: dict, scale: torch.Tensor | None) -> None:
    tensors[EXPERT] = tensors[EXPERT].to(torch.float8_e4m3fn)
    if scale is not None:
        tensors[f"{EXPERT}_scale_inv"] = scale


def test_fp8_without_its_scales(folder: Path) -> None:
    edit(folder, lambda tensors: to_fp8(tensors, None))
    refused(folder, f"1 missing: {EXPERT}_scale_inv;")


@pytest.mark.parametrize("scale", [torch.ones(1, 2), torch.ones(1, 1, dtype=torch.uint8)])
def test_fp8_with_foreign_scales(folder: Path, scale: torch.Tensor) -> None:
    edit(folder, lambda tensors: to_fp8(tensors, scale))
    refused(folder, f"1 wrong shape: {EXPERT}_scale_inv is", "must be float (1, 1)")


def test_scales_without_fp8(folder: Path) -> None:
    name = f"{EXPERT}_scale_inv"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(1, 1)}))
    refused(folder, f"1 unexpected: {name};")


# MTP modules to start


def test_modules_with_experts_do_not_start_from_a_dense_layer(tmp_path: Path) -> None:
    policy = tiny_policy(first_k_dense_replace=3, num_nextn_predict_layers=0)
    save(policy, None, tmp_path / "a")
    refused(tmp_path / "a", "first_k_dense_replace 3", "dense", num_nextn_predict_layers=1)


def test_dense_modules_start_from_a_dense_layer(tmp_path: Path) -> None:
    policy = tiny_policy(first_k_dense_replace=9, num_nextn_predict_layers=0)
    save(policy, None, tmp_path / "a")
    grown = load(tmp_path / "a", num_nextn_predict_layers=1)
    assert torch.equal(
        grown.model.layers[3].mlp.up_proj.weight, policy.model.layers[2].mlp.up_proj.weight
    )


def test_nothing_to_start(caplog: pytest.LogCaptureFixture) -> None:
    policy = tiny_policy()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    start_missing(policy, found=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert caplog.text == ""
    assert tiny_config().num_nextn_predict_layers == 1
