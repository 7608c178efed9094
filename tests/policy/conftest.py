"""Tiny policies with random weights, and transformers' own DeepSeek-V3 with the same weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from posttrain.policy.model import PolicyForCausalLM

YARN = {
    # The fields that DeepSeek-V3 was released with; the original length is short, so that the
    # tests' positions lie on both sides of it.
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def tiny_config(**fields: Any) -> DeepseekV3Config:
    """Three layers, the first dense; 16 experts in 4 groups, top 4 of the best 2 groups."""
    attention = fields.pop("attention", "eager")
    yarn = fields.pop("yarn", False)
    config = DeepseekV3Config(
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 1,
            "max_position_embeddings": 320 if yarn else 64,
            "rope_parameters": YARN if yarn else {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        | fields
    )
    config._attn_implementation = attention
    config._experts_implementation = "eager"
    return config


@torch.no_grad()
def randomise(policy: PolicyForCausalLM, seed: int = 0) -> PolicyForCausalLM:
    """Draw every weight and bias, so that no two parts are alike and all of them matter.

    Norm weights spread around 1; biases are mostly negative, many below -1: sums of score and
    bias fall on both sides of zero, where a group fill of 0.0 chooses lost groups.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(1.0 + 0.3 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    policy.model.embed_tokens.weight.normal_(generator=generator)
    for router in policy.model.routers:
        router.e_score_correction_bias.normal_(-0.7, 0.5, generator=generator)
    return policy


@pytest.fixture
def make_config() -> Callable[..., DeepseekV3Config]:
    """`tiny_config(**fields)`; `attention` and `yarn` are short for what they set."""
    return tiny_config


@pytest.fixture
def make_policy() -> Callable[..., PolicyForCausalLM]:
    """A randomised policy of `tiny_config(**fields)`, in training mode."""

    def make(seed: int = 0, **fields: Any) -> PolicyForCausalLM:
        return randomise(PolicyForCausalLM(tiny_config(**fields)), seed).train()

    return make


@pytest.fixture
def make_stock() -> Callable[[PolicyForCausalLM], DeepseekV3ForCausalLM]:
    """transformers' model with a copy of a policy's trunk weights and biases."""

    def make(policy: PolicyForCausalLM) -> DeepseekV3ForCausalLM:
        stock = DeepseekV3ForCausalLM(policy.config)
        depth = policy.config.num_hidden_layers
        trunk = {
            name: tensor
            for name, tensor in policy.state_dict().items()
            if not name.startswith("model.layers.") or int(name.split(".")[2]) < depth
        }
        stock.load_state_dict(trunk, strict=True)
        return stock.train()

    return make


@pytest.fixture
def make_ids() -> Callable[..., Tensor]:
    """Random token ids (B, S), none of them special."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))

    return make
