"""Where an MTP module starts from when a checkpoint has no weights for it."""

import logging

import torch
from transformers import PreTrainedModel

from posttrain.policy.shards import CheckpointError

log = logging.getLogger(__name__)


@torch.no_grad()
def start_missing(policy: PreTrainedModel, found: int) -> None:
    """Fill the MTP modules from the `found`-th on; the ones before hold weights already.

    With a module at hand, the last one is copied: deeper modules do the same one token later.
    With none, the decoder layer is a copy of the last trunk layer, router bias included, and
        eh_proj = [I, I] / sqrt(2),  enorm = hnorm = 1,  shared_head.norm = the trunk's final norm:
    the layer sees next token and hidden state in equal parts, at unit scale as both norms leave
    it, and the head sees what it is used to. Such modules draft badly until trained. Logged.

    Raises CheckpointError when the last trunk layer is dense and the modules have experts.
    """
    last, depth = policy.config.num_hidden_layers, policy.config.num_nextn_predict_layers
    if found >= depth:
        return
    layers = policy.model.layers
    source = layers[last + found - 1] if found else layers[last - 1]
    for module in layers[last + found :]:
        own = module.load_state_dict(source.state_dict(), strict=False).missing_keys
        if found:
            continue
        if foreign := [key for key in own if key.startswith("mlp.")]:
            raise CheckpointError(
                f"MTP modules cannot start from trunk layer {last - 1}: it is dense, they have "
                f"experts (first_k_dense_replace {policy.config.first_k_dense_replace}, "
                f"num_hidden_layers {last}; they lack {foreign[0]}); lower first_k_dense_replace, "
                "or set num_nextn_predict_layers to 0"
            )
        width = policy.config.hidden_size
        module.enorm.weight.fill_(1.0)
        module.hnorm.weight.fill_(1.0)
        module.eh_proj.weight.copy_(torch.eye(width).repeat(1, 2) / 2**0.5)
        module.shared_head.norm.weight.copy_(policy.model.norm.weight)
    origin = f"MTP module {found - 1}" if found else f"trunk layer {last - 1}"
    log.warning(
        "the checkpoint holds %d of %d MTP modules; the others start as copies of %s and need "
        "training before they draft well",
        found,
        depth,
        origin,
    )
