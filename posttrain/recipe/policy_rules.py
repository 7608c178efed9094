"""The rules of `policy.config`: shapes that DeepSeek-V3's attention and router need."""

from typing import Any

from posttrain.recipe.fields import policy_schema
from posttrain.recipe.sections import PolicySection
from posttrain.recipe.source import Source


def mtp_modules(policy: PolicySection) -> int | None:
    """Return how many MTP modules the policy will have; None when only its checkpoint knows."""
    if policy.num_nextn_predict_layers is not None or policy.config is None:
        return policy.num_nextn_predict_layers
    config = policy.config
    modules = config.get("num_nextn_predict_layers", config.get("num_mtp_layers"))
    return int(policy_schema().fields["num_mtp_layers"].default if modules is None else modules)


def check_config(config: dict[str, Any], source: Source) -> None:
    """Note a fault for every shape that cannot be built, naming both numbers."""
    if not source.sound("policy.config"):
        return
    fields = policy_schema().fields

    def get(name: str) -> Any:
        value = config.get(name)
        return fields[name].default if value is None else value

    def fault(name: str, message: str) -> None:
        source.fault(("policy", "config", name), message)

    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "max_position_embeddings",
    ):
        if get(name) < 1:
            fault(name, f"must be at least 1, got {get(name)}")
    if not source.sound("policy.config"):
        return
    experts, groups, chosen = get("n_routed_experts"), get("n_group"), get("topk_group")
    each = get("num_experts_per_tok")
    if experts % groups:
        fault("n_routed_experts", f"must be a multiple of n_group {groups}, got {experts}")
        return
    if experts // groups < 2:
        fault(
            "n_group",
            f"a group is ranked by its two best experts, and n_routed_experts {experts} / n_group {groups} "
            f"leaves {experts // groups} each: use fewer groups",
        )
        return
    if chosen > groups:
        fault("topk_group", f"must be at most n_group {groups}, got {chosen}")
    elif each > chosen * (experts // groups):
        fault(
            "num_experts_per_tok",
            f"must be at most topk_group {chosen} x {experts // groups} experts a group, got {each}",
        )
    if get("qk_rope_head_dim") % 2:
        fault("qk_rope_head_dim", f"rotations need an even size, got {get('qk_rope_head_dim')}")
    dense, layers = get("first_k_dense_replace"), get("num_hidden_layers")
    if dense >= layers:
        fault(
            "first_k_dense_replace",
            f"must be below num_hidden_layers {layers}, or no layer has experts; got {dense}",
        )
