"""A policy small enough for every test, with nothing in it zero or one by default."""

import json
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedModel
from transformers.utils import logging

from posttrain.policy.checkpoint import named_tensors
from posttrain.policy.model import PolicyForCausalLM

SIZES = {
    "vocab_size": 67,  # odd, so that two processes get unequal shards
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "max_position_embeddings": 256,
}

YARN = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}


def tiny_config(**changes: object) -> DeepseekV3Config:
    # transformers writes into the dictionaries that it is given
    return DeepseekV3Config(**deepcopy(SIZES | {"num_nextn_predict_layers": 1} | changes))


def tiny_policy(seed: int = 0, **changes: object) -> PolicyForCausalLM:
    """A policy whose norms and router biases are random too, so that a lost one is noticed."""
    torch.manual_seed(seed)
    policy = PolicyForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, tensor in policy.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.2, 0.2)
            elif "weight" in name or "proj" in name:
                tensor.normal_(std=0.2)
    return policy


def tiny_ids() -> torch.Tensor:
    """Token ids (2, 40)."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, SIZES["vocab_size"], (2, 40), generator=generator)


def stock(folder: Path) -> PreTrainedModel:
    """Load with transformers alone, computing experts one by one as the policy does on a CPU."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports the MTP tensors, which it leaves out, at length
    try:
        return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    finally:
        logging.set_verbosity(before)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(tiny_ids()).logits


def assert_same(a: PolicyForCausalLM, b: PolicyForCausalLM) -> None:
    """Every tensor of both is equal, under its released and under its own name."""
    one, other = dict(named_tensors(a)), dict(named_tensors(b))
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    own, others = a.state_dict(), b.state_dict()
    assert own.keys() == others.keys()
    assert all(torch.equal(own[name], others[name]) for name in own)


def edit_config(folder: Path, drop: tuple[str, ...] = (), **changes: object) -> None:
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in raw.items() if k not in drop} | changes))
