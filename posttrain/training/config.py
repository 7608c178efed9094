"""TRL's configurations with the fields that an MoE policy with MTP modules adds."""

from dataclasses import dataclass, field
from typing import Literal

from trl import GRPOConfig, SFTConfig

MULTI_STEP = "deepseek_multi_step"


@dataclass
class PolicySFTConfig(SFTConfig):
    """`trl.SFTConfig`, plus MTP loss, balance and DeepSeek's multi-step schedule.

    `lr_scheduler_type` also takes `deepseek_multi_step` (arXiv 2401.02954, section 2.3).
    """

    mtp_loss_weight: float = field(
        default=0.3, metadata={"help": "lambda of the MTP loss (eq. 25); 0 leaves the modules be."}
    )
    bias_update_rate: float = field(
        default=0.001, metadata={"help": "gamma of the router-bias update; 0 freezes the biases."}
    )
    sequence_balance_weight: float = field(
        default=0.0001, metadata={"help": "alpha of the sequence-wise balance loss; 0 is off."}
    )

    def __post_init__(self) -> None:
        self.multi_step_schedule = take_multi_step(self)
        keep_modules_used(self)
        super().__post_init__()


@dataclass
class PolicyGRPOConfig(GRPOConfig):
    """`trl.GRPOConfig`, plus online MTP training, balance, and routing replay.

    The MTP loss sees a detached trunk, embedding and head, and is clipped on its own, so the
    trunk's updates do not depend on `mtp_loss_weight`. Of TRL's corrections for the mismatch
    between engine and trainer the default is each token's ratio, cut off above 2.
    """

    mtp_loss_weight: float = field(
        default=0.1, metadata={"help": "Weight of the detached MTP loss on rollouts; 0 is off."}
    )
    mtp_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradient norm at which the MTP modules are clipped."}
    )
    router_bias: Literal["frozen", "update"] = field(
        default="update", metadata={"help": "Whether updates move the router biases."}
    )
    bias_update_rate: float = field(
        default=0.001, metadata={"help": "gamma of the router-bias update."}
    )
    sequence_balance_weight: float = field(
        default=0.0, metadata={"help": "alpha of the sequence-wise balance loss; 0 is off."}
    )
    router_entropy_weight: float = field(
        default=0.0,
        metadata={"help": "Weight at which the loss rewards entropy of router scores; 0 is off."},
    )
    replay: Literal["off", "r2", "r3"] = field(
        default="off",
        metadata={"help": "Experts in training: own, the old policy's (r2), the engine's (r3)."},
    )
    mismatch_split: bool = field(
        default=True,
        metadata={"help": "Split the mismatch at each rollout: one more pass without gradients."},
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate", metadata={"help": "As TRL's, whose default is sequence_mask."}
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=2.0, metadata={"help": "As TRL's, whose default is 3."}
    )

    def __post_init__(self) -> None:
        self.multi_step_schedule = take_multi_step(self)
        keep_modules_used(self)
        super().__post_init__()


def keep_modules_used(args: SFTConfig | GRPOConfig) -> None:
    """Keep DDP from calling the MTP modules unused.

    Their loss leaves the forward pass beside its outputs, where DDP's search does not look.
    """
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False


def take_multi_step(args: SFTConfig | GRPOConfig) -> bool:
    """Accept our schedule's name, which transformers' enumeration would refuse."""
    if args.lr_scheduler_type != MULTI_STEP:
        return False
    args.lr_scheduler_type = "constant_with_warmup"
    return True
