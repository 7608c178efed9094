"""A policy small enough for every test; nothing in it is zero or one by default."""

from dataclasses import dataclass

import torch
from transformers import DeepseekV3Config

from posttrain.policy.model import PolicyForCausalLM


@dataclass
class Settings:
    max_model_len: int = 96
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.3
    kv_cache_memory_gib: float = 0.125
    dtype: str = "float32"
    num_speculative_tokens: int = 1
    tensor_parallel_size: int = 1
    seed: int = 0


class Tiny:
    """Makes policies; the vocabulary is so small that even random drafts are sometimes right."""

    Settings = Settings

    @staticmethod
    def policy(seed: int, **changes: object) -> PolicyForCausalLM:
        sizes = {
            "vocab_size": 24,
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_shared_experts": 1,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "max_position_embeddings": 256,
            "num_nextn_predict_layers": 1,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
        torch.manual_seed(seed)
        config = DeepseekV3Config(**(sizes | changes))
        config._attn_implementation = "eager"
        policy = PolicyForCausalLM(config).eval()
        with torch.no_grad():
            for name, tensor in policy.state_dict().items():
                if "norm" in name:
                    tensor.uniform_(0.5, 1.5)
                elif name.endswith("e_score_correction_bias"):
                    tensor.uniform_(-0.2, 0.2)
                else:
                    tensor.normal_(std=0.15)
        return policy

    @staticmethod
    def prompts(count: int, length: int = 12, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 24, (count, length), generator=generator).tolist()
