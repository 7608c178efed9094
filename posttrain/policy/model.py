"""The DeepSeek-V3 policy: transformers' trunk with our router, and MTP modules behind it.

All that is particular to the family stands here; router, balance and MTP know nothing of MLA.
Shapes: B sequences, S positions, D width, V vocabulary, T = B*S tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3Model,
    DeepseekV3MoE,
    DeepseekV3PreTrainedModel,
    DeepseekV3RMSNorm,
)

from posttrain.policy.balance import router_entropy, sequence_balance_loss
from posttrain.policy.mtp import (
    Head,
    MTPCollector,
    MTPMixin,
    MTPOutput,
    MTPRequest,
    documents,
    shift,
    targets,
)
from posttrain.policy.replay import KEYWORD, RoutingRequest, attach, record_dtype
from posttrain.policy.router import Router, RoutingLog, logged, routers


class DeepseekV3MTPLayer(MTPMixin, DeepseekV3DecoderLayer):
    """One MTP module: projection and norms around a whole DeepSeek-V3 decoder layer."""

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.add_mtp(config, DeepseekV3RMSNorm)


@dataclass
class TrainingExtras:
    """What a forward pass leaves beside its logits or log-probs.

    mtp: the MTP loss, when one was requested. balance_loss: the sequence-wise loss without its
    factor, when `PolicyModel.wants_balance_loss`; router_entropy, when it is wanted; all
    differentiable, nats or unitless. experts_BSLK: the trunk's choices, when they were to be kept.
    """

    mtp: MTPOutput | None = None
    balance_loss: Tensor | None = None
    router_entropy: Tensor | None = None
    experts_BSLK: Tensor | None = None


class PolicyModel(DeepseekV3Model):
    """The trunk, with counted routers and the MTP modules as `layers[num_hidden_layers:]`.

    TRL rebinds the causal model's `forward` but always calls this one, so the MTP loss, the load
    counts and the balance loss are made here: inside whatever DDP or FSDP wrap around the whole.
    Set `mtp_request` or `routing_request` before a call and call `take_extras` after it. Only
    training passes with gradients count load. Replay is the trunk's: MTP modules route themselves.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        for k in range(config.num_nextn_predict_layers):
            self.layers.append(DeepseekV3MTPLayer(config, config.num_hidden_layers + k))
        for layer in self.layers:
            if isinstance(layer.mlp, DeepseekV3MoE):
                layer.mlp.gate = Router(config)
        self.routers = routers(self)
        self.trunk_routers = routers(self.layers[: config.num_hidden_layers])
        for layer in self.layers[: config.num_hidden_layers]:
            own = getattr(layer.mlp, "gate", None)
            attach(layer, None if own is None else self.trunk_routers.index(own))
        self.mtp_request: MTPRequest | None = None
        self.routing_request: RoutingRequest | None = None
        self.wants_balance_loss = False
        self.wants_router_entropy = False
        self.extras = TrainingExtras()
        self._head: tuple[nn.Linear, ...] = ()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the class's own module, and would not find it here
        return True

    def take_extras(self) -> TrainingExtras:
        """Return what the last training pass left, and forget it, so that its graph is freed."""
        extras, self.extras = self.extras, TrainingExtras()
        return extras

    @property
    def trunk_router_layers(self) -> list[int]:
        """The layers of the trunk's routers, in the order in which records hold them."""
        return [
            i
            for i, x in enumerate(self.layers)
            if getattr(x.mlp, "gate", None) in self.trunk_routers
        ]

    @property
    def mtp_modules(self) -> list[nn.Module]:
        """The D MTP modules, nearest depth first."""
        return list(self.layers[self.config.num_hidden_layers :])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the trunk, and in training the MTP modules and the counts.

        padding_mask (B, S): 0 on the padding of packed rows. Those have no attention_mask:
        transformers tells documents apart by their positions only without one.
        """
        request, self.mtp_request = self.mtp_request, None
        routing, self.routing_request = self.routing_request or RoutingRequest(), None
        if input_ids is None or kwargs.get("past_key_values") is not None:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs,
            )
        if position_ids is None:
            position_ids = positions(input_ids, attention_mask)
        position_ids = position_ids.expand(input_ids.shape[0], -1)
        mask_BS = attention_mask if padding_mask is None else padding_mask
        if mask_BS is not None and mask_BS.ndim != 2:
            mask_BS = None
        document_BS = documents(position_ids, mask_BS)
        counted_T = None if mask_BS is None else mask_BS.flatten().bool()
        training = self.training and torch.is_grad_enabled()
        if training:
            kwargs["use_cache"] = False  # with a cache, packed documents would see each other
        if routing.record_BSLK is not None:
            kwargs[KEYWORD] = routing.record_BSLK.flatten(0, 1)
        watched = self.routers if training else self.trunk_routers if routing.keep else []
        with logged(watched, counted_T) as log:
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs,
            )
            if request is not None:
                self.extras.mtp = self._mtp(
                    request,
                    log,
                    input_ids,
                    output.last_hidden_state,
                    document_BS,
                    attention_mask,
                    position_ids,
                )
        if routing.keep:
            self.extras.experts_BSLK = self._kept(log, input_ids)
        if training:
            for choice in log.choices:
                choice.router.count(choice.experts_TK, choice.counted_T)
            if self.wants_balance_loss and log.choices:
                self.extras.balance_loss = sequence_balance_loss(log.choices, document_BS.flatten())
            if self.wants_router_entropy and log.choices:
                self.extras.router_entropy = router_entropy(log.choices, document_BS.flatten())
        return output

    def _kept(self, log: RoutingLog, input_ids: Tensor) -> Tensor:
        """Return what the trunk's routers chose as a record (B, S, L, K)."""
        chosen = [choice.experts_TK for choice in log.choices[: len(self.trunk_routers)]]
        dtype = record_dtype(self.config.n_routed_experts)
        return torch.stack(chosen, dim=1).to(dtype).unflatten(0, tuple(input_ids.shape))

    def _mtp(
        self,
        request: MTPRequest,
        log: RoutingLog,
        input_ids: Tensor,
        hidden_BSD: Tensor,
        document_BS: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
    ) -> MTPOutput:
        """Run the modules in their causal chain and sum their losses (eq. 21-25)."""
        head = scoring(self._head[0], detach=request.detach)
        if request.detach:
            hidden_BSD = hidden_BSD.detach()
            if self.is_gradient_checkpointing:
                # Reentrant recomputation gives no gradient where no input wants one.
                hidden_BSD.requires_grad_(torch.is_grad_enabled())
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_BSD,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(hidden_BSD, position_ids=position_ids)
        start_BS1 = (position_ids == 0).unsqueeze(-1)
        trunk_BSD = hidden_BSD.detach()
        out = MTPCollector(request)
        for depth, module in enumerate(self.mtp_modules):
            ids_BS = shift(input_ids, depth + 1, 0)
            reachable_BS = (shift(document_BS, depth + 1, -1) == document_BS) & (document_BS >= 0)
            log.counted_T = reachable_BS.flatten()
            embeds_BSD = self.embed_tokens(ids_BS)
            if request.detach:
                embeds_BSD = embeds_BSD.detach()
            hidden_BSD = module(
                embeds_BSD.masked_fill(start_BS1, 0),
                hidden_BSD,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=rotary,
            )
            labels_BS = targets(request.labels_BS, document_BS, depth)
            out.add(depth, hidden_BSD, trunk_BSD, head, labels_BS)
        return out.result()


class PolicyForCausalLM(DeepseekV3ForCausalLM):
    """A DeepSeek-V3 causal model whose `model` is a `PolicyModel`; logits and generation unchanged.

    `config.num_nextn_predict_layers` says how many MTP modules are inside (0 is allowed).
    """

    _no_split_modules: ClassVar = ["DeepseekV3DecoderLayer", "DeepseekV3MTPLayer"]

    _can_set_experts_implementation = PolicyModel._can_set_experts_implementation

    def __init__(self, config: DeepseekV3Config) -> None:
        if config._experts_implementation is None:
            # One by one is fastest on a CPU; transformers' grouped products on a GPU.
            config._experts_implementation = "grouped_mm" if torch.cuda.is_available() else "eager"
        DeepseekV3PreTrainedModel.__init__(self, config)
        self.model = PolicyModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.model._head = (self.lm_head,)  # a tuple, so that the head stays registered once
        self.post_init()


def positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Positions (B, S) from 0 at each row's first real token, as the rollout engine counts them."""
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def scoring(head: nn.Linear, *, detach: bool) -> Head:
    """Return the head as a function; `detach`: no gradient to its weight.

    What FSDP2 left sharded is gathered. ZeRO-3 gathers a weight when it is read, but for the backward
    pass only when its module is called (not yet run with DeepSpeed).
    """
    if hasattr(head.weight, "ds_id") and not detach:
        return head
    weight_VD = head.weight.full_tensor() if isinstance(head.weight, DTensor) else head.weight
    return partial(F.linear, weight=weight_VD.detach() if detach else weight_VD)
