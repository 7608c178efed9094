"""A tiny random policy through vLLM and through the trainer's own code: do their log-probs agree?"""

import tempfile
import time
from pathlib import Path
from typing import Any

from posttrain import environment
from posttrain.doctor.findings import Finding
from posttrain.recipe import RolloutSection

TOLERANCE = 1e-4
"""nats. In float32 another order of sums moves a log-prob by about 1e-6, a fault by 1e-2 and more."""

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 128,
}


def trial_run(tolerance: float = TOLERANCE) -> tuple[list[tuple[str, str]], list[Finding]]:
    """Rows that say what was compared, and what failed.

    Whatever is raised on the way becomes a finding: the rest of the report is wanted most then.
    """
    rows: list[tuple[str, str]] = []
    try:
        _compare(rows, tolerance)
    except Exception as error:
        return rows, [
            Finding("wrong", f"the engine against the trainer: {type(error).__name__}: {error}")
        ]
    return rows, []


def _compare(rows: list[tuple[str, str]], tolerance: float) -> None:
    """Start an engine on the policy, compare; change every weight, sync, compare again."""
    import torch
    from vllm import SamplingParams

    from posttrain.policy import checkpoint
    from posttrain.rollout import corrections, parity
    from posttrain.rollout.engine import Engine

    if not environment.on_cpu() and not torch.cuda.is_available():
        raise RuntimeError(
            f"torch {torch.__version__} finds no usable GPU; it is built for CUDA "
            f"{torch.version.cuda}, which may want a newer NVIDIA driver"
        )
    policy = _random_policy()
    section = RolloutSection(
        max_model_len=96,
        max_num_seqs=16,
        kv_cache_memory_gib=0.1,
        dtype="float32",
        num_speculative_tokens=1,
        seed=0,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="posttrain-doctor-") as folder:
        checkpoint.save(policy, None, Path(folder) / "policy")
        engine = Engine.start(Path(folder) / "policy", section)
    try:
        rows.append(("engine", f"starts in {time.monotonic() - started:.1f} s"))
        rows.extend(sorted(corrections.register().items()))
        if not environment.on_cpu():
            policy.to("cuda")
        for moment in ("as loaded", "after a sync"):
            if moment == "after a sync":
                with torch.no_grad():
                    for weight in policy.parameters():
                        weight.mul_(1.1)
                engine.sync(checkpoint.named_tensors(policy))
            report = parity.check(engine, policy, tolerance=tolerance)
            rows.append(
                (
                    moment,
                    f"log-probs differ by {report.max_abs_logprob_diff:.0e} nats at most, over "
                    f"{report.tokens} tokens (allowed: {tolerance:.0e})",
                )
            )
        sampling = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, seed=0)
        engine.generate([[token] * 4 for token in range(16)], sampling)
        counts = engine.draft_counts()
        rows.append(
            (
                "drafting",
                f"{counts.drafts} tokens drafted by the random MTP module, "
                f"{sum(counts.accepted_per_position)} kept",
            )
        )
    finally:
        engine.close()


def _random_policy() -> Any:
    """A policy with experts in groups, random norms and biases: a lost tensor changes its output."""
    import torch
    from transformers import DeepseekV3Config

    from posttrain.policy.model import PolicyForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = PolicyForCausalLM(DeepseekV3Config(**SIZES)).eval()
        for name, tensor in policy.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.2, 0.2)
            else:
                tensor.normal_(std=0.2)
    return policy
