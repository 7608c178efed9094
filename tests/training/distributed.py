"""Two optimizer steps of SFT or GRPO, on as many processes as it is launched with.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 distributed.py sft OUT 4

trains on 8 documents (or completions) a step, 4 in each process, and leaves in OUT/<rank>.pt the
weights, and the load that this process counted in each step.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, DeepseekV3Config

from posttrain.policy.model import PolicyForCausalLM
from posttrain.training.config import PolicySFTConfig
from posttrain.training.sft import PolicySFTTrainer
from tests.training import conftest

# SGD: a step is linear in the gradient, so rounding stays rounding.
COMMON = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "bias_update_rate": 0.01}


def make_policy(tokenizer: Any) -> PolicyForCausalLM:
    """The policy of the tests, with two modules."""
    fields = conftest.POLICY | {"num_nextn_predict_layers": 2, "vocab_size": len(tokenizer)}
    config = DeepseekV3Config(**fields, pad_token_id=tokenizer.pad_token_id)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    policy = PolicyForCausalLM(config)
    for router in policy.model.routers:
        router.e_score_correction_bias.normal_(0, 0.1)
    return policy


def sft_trainer(policy: PolicyForCausalLM, tokenizer: Any, out: Path, batch: int) -> Any:
    rows = conftest.problems(16)
    return PolicySFTTrainer(
        model=policy,
        args=PolicySFTConfig(
            **conftest.QUIET | COMMON,
            output_dir=str(out / "steps"),
            per_device_train_batch_size=batch,
            sequence_balance_weight=0.1,
            max_grad_norm=1.0,
        ),
        train_dataset=Dataset.from_list(rows).select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )


def grpo_trainer(policy: PolicyForCausalLM, tokenizer: Any, out: Path, batch: int) -> Any:
    fields = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "replay": "r3",
        "router_entropy_weight": 0.1,
    }
    engine = conftest.StubEngine(policy, tokenizer.eos_token_id, routing="other")
    return conftest.build_grpo(policy, tokenizer, out, engine=engine, **COMMON, **fields)[0]


def main(stage: str, out: Path, batch: int) -> None:
    """Train and save what the test compares."""
    tokenizer = AutoTokenizer.from_pretrained(conftest.TOKENIZER)
    policy = make_policy(tokenizer)
    make = sft_trainer if stage == "sft" else grpo_trainer
    trainer = make(policy, tokenizer, out, batch)
    loads: list[list[torch.Tensor]] = []
    update = trainer.update_balance

    def watched() -> None:
        loads.append([router.load_E.clone() for router in policy.model.routers])
        update()

    trainer.update_balance = watched
    trainer.train()
    lines = [x for x in trainer.state.log_history if "loss" in x]
    content = {"state": policy.state_dict(), "loads": loads, "lines": lines}
    torch.save(content, out / f"{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
