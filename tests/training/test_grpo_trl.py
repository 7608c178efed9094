"""GRPO against TRL's own trainer: the same completions, advantages, loss, gradients, steps."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerBase
from trl import GRPOTrainer

from posttrain.policy import checkpoint
from posttrain.policy.model import PolicyForCausalLM
from posttrain.training.config import PolicyGRPOConfig
from tests.training.conftest import GRPO, StubEngine, problems, reward_digits, reward_length

MakePolicy = Callable[..., PolicyForCausalLM]
MakeGRPO = Callable[..., Any]


def is_module(name: str) -> bool:
    """Whether a tensor belongs to an MTP module: behind the two trunk layers."""
    return name.startswith(("model.layers.2.", "model.layers.3."))


def trunk_of(policy: PolicyForCausalLM) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in policy.state_dict().items() if not is_module(n)}


class TRLTrainer(GRPOTrainer):
    """TRL's trainer whose completions and their log-probs come from the same stub engine."""

    engine: StubEngine
    seeds: list[int]

    def _generate_single_turn(self, prompt_ids: Any, *args: Any) -> tuple[Any, Any]:
        done = self.engine.generate(prompt_ids, [self.sampling(i) for i in range(len(prompt_ids))])
        return [c.token_ids for c in done], [c.logprobs for c in done]


def stock_of(policy: PolicyForCausalLM) -> DeepseekV3ForCausalLM:
    stock = DeepseekV3ForCausalLM(copy.deepcopy(policy.config))
    stock.load_state_dict(trunk_of(policy), strict=True)
    return stock


def trl_trainer(ours: Any, policy: PolicyForCausalLM, folder: Path, **fields: Any) -> TRLTrainer:
    """TRL's trainer on transformers' model with the policy's weights, fed as `ours` is."""
    trainer = TRLTrainer(
        model=stock_of(policy),
        reward_funcs=[reward_digits, reward_length],
        args=PolicyGRPOConfig(**GRPO | {"output_dir": str(folder / "trl")} | fields),
        train_dataset=Dataset.from_list(problems(8)).remove_columns("completion"),
        processing_class=ours.processing_class,
    )
    trainer.engine = StubEngine(copy.deepcopy(policy), ours.engine.eos_token_id, ours.engine.shift)
    trainer.sampling = ours.sampling
    trainer.use_vllm = True
    return trainer


# loss types of TRL, then its other switches, each for one step
VARIANTS: list[dict[str, Any]] = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "dapo", "epsilon_high": 0.28},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "sapo"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"loss_type": "vespo"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"scale_rewards": "batch", "temperature": 0.7},
    {"mask_truncated_completions": True},
    {"top_entropy_quantile": 0.5},
    {"vllm_importance_sampling_mode": "token_truncate"},
    {"vllm_importance_sampling_correction": False},
    {"multi_objective_aggregation": "normalize_then_sum"},
]


def names(fields: dict[str, Any]) -> str:
    return "-".join(str(v) for v in fields.values())


@pytest.mark.parametrize("fields", VARIANTS, ids=names)
def test_advantages_loss_and_gradients_equal_trl(
    make_grpo: MakeGRPO,
    make_policy: MakePolicy,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    fields: dict[str, Any],
) -> None:
    """The same completions on both sides; the engine is a little off, so ratios are not all 1."""
    policy = make_policy()
    fields = {"mtp_loss_weight": 0.0, "bias_update_rate": 0.0} | fields
    engine = StubEngine(copy.deepcopy(policy), tokenizer.eos_token_id, shift=0.05)
    ours, _ = make_grpo(policy, engine=engine, **fields)
    theirs = trl_trainer(ours, policy, tmp_path, **fields)
    compare_one_step(ours, theirs)


def compare_one_step(ours: Any, theirs: Any) -> None:
    """Rewards to gradients, of one generation batch."""
    rows = [row for row in problems(2) for _ in range(4)]
    inputs = [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]
    batches, losses = [], []
    for trainer in (theirs, ours):
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 2
        torch.manual_seed(0)
        batches.append(trainer._generate_and_score_completions(copy.deepcopy(inputs)))
        losses.append(trainer._compute_loss(trainer.model, batches[-1]))
        losses[-1].backward()
    expected, batch = batches
    assert batch.keys() == expected.keys()
    assert batch["advantages"].abs().max() > 0.1
    for key, value in expected.items():
        # Log-probs differ in rounding: positions of left-padded rows start elsewhere.
        torch.testing.assert_close(batch[key], value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)
    for name, parameter in theirs.model.named_parameters():
        other = ours.model.get_parameter(name).grad
        assert parameter.grad.abs().sum() > 0, name
        # Rounding of log-probs by 1e-6, times advantages and ratios of order 1.
        torch.testing.assert_close(other, parameter.grad, rtol=1e-3, atol=1e-5)


def test_kl_to_a_reference_equals_trl(
    make_grpo: MakeGRPO,
    make_policy: MakePolicy,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """The reference is the checkpoint that the policy was loaded from."""
    checkpoint.save(make_policy(), tokenizer, tmp_path / "start")
    policy = checkpoint.load(tmp_path / "start", attn_implementation="sdpa")
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.1)
    fields = {"beta": 0.5, "mtp_loss_weight": 0.0, "bias_update_rate": 0.0}
    ours, _ = make_grpo(policy, **fields)
    theirs = trl_trainer(ours, policy, tmp_path, **fields)
    theirs.ref_model.load_state_dict(ours.ref_model.state_dict())
    compare_one_step(ours, theirs)
    reference = ours.ref_model.lm_head.weight
    torch.testing.assert_close(reference * 1.1, policy.lm_head.weight)
    assert ours._metrics["train"]["kl"][0] > 1e-4


def test_two_steps_of_training_equal_trl(
    make_grpo: MakeGRPO, make_policy: MakePolicy, tmp_path: Path
) -> None:
    """Prompts, shuffling, accumulation, clipping, optimizer: the trunk moves as TRL's would."""
    policy = make_policy()
    fields = {"bias_update_rate": 0.0, "mtp_loss_weight": 0.1, "optim": "sgd", "learning_rate": 0.1}
    ours, _ = make_grpo(policy, **fields)
    theirs = trl_trainer(ours, policy, tmp_path, **fields)
    theirs.engine.policy = theirs.model  # rolls out the model that it trains
    before = trunk_of(policy)
    torch.manual_seed(1)
    ours.train()
    # TRL's requests take their seeds from our trainer, step by step.
    theirs.sampling = lambda index: ours.sampling(index)
    ours._step = 0
    step = type(theirs).training_step

    def training_step(*args: Any) -> Tensor:
        ours._step = theirs._step
        return step(theirs, *args)

    theirs.training_step = training_step
    torch.manual_seed(1)
    theirs.train()
    for name, tensor in theirs.model.state_dict().items():
        moved = (tensor - before[name]).abs().max()
        if "bias" not in name:
            assert moved > 1e-5, name
        # Two steps of SGD: rounding of gradients, of order 1e-6, times 0.1, twice.
        torch.testing.assert_close(policy.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
