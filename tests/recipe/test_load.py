"""Recipes that load, and the fault that each broken rule gives."""

from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain import recipe

Faults = Callable[..., list[str]]


def test_a_good_recipe(good: Path) -> None:
    loaded = recipe.load(good)
    assert loaded.name == "good"
    assert loaded.sft == {"learning_rate": 1e-4}
    assert loaded.grpo == {
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 64,
    }
    assert loaded.rollout.dtype == loaded.policy.dtype == "float32"
    assert loaded.data.sft is not None
    assert (loaded.data.sft.role, loaded.data.sft.where) == ("sft", "good.yaml:12")
    assert [(r.name, r.weight, r.options) for r in loaded.rewards] == [("format", 0.5, {})]
    assert loaded.run_dir("grpo") == Path("runs/good/grpo")


def test_dump_loads_again(good: Path, tmp_path: Path) -> None:
    loaded = recipe.load(good, ["sft.warmup_steps=3", "output_root=elsewhere", "seed=7"])
    loaded.dump(tmp_path / "runs" / "good" / "recipe.yaml")
    again = recipe.load(tmp_path / "runs" / "good" / "recipe.yaml")
    assert again == loaded
    assert again.run_dir("sft") == Path("elsewhere/good/sft")
    assert [p.name for p in (tmp_path / "runs" / "good").iterdir()] == ["recipe.yaml"]


def test_overrides_are_yaml_values(good: Path) -> None:
    loaded = recipe.load(
        good, ["grpo.learning_rate=1e-6", "grpo.save_strategy=no", "rewards.0.weight=2"]
    )
    assert loaded.grpo is not None
    assert loaded.grpo["learning_rate"] == 1e-6
    assert loaded.grpo["save_strategy"] == "no"
    assert loaded.rewards[0].weight == 2.0


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_our_schedule_is_known(good: Path, stage: str) -> None:
    loaded = recipe.load(good, [f"{stage}.lr_scheduler_type=deepseek_multi_step"])
    assert getattr(loaded, stage)["lr_scheduler_type"] == "deepseek_multi_step"


def test_our_trainer_fields_are_known(good: Path) -> None:
    loaded = recipe.load(good, ["sft.mtp_loss_weight=0.3", "grpo.bias_update_rate=0"])
    assert loaded.sft is not None
    assert loaded.sft["mtp_loss_weight"] == 0.3


def test_paths_beside_the_recipe(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    loaded = recipe.load(Path("..") / good)
    assert loaded.data.sft is not None
    assert loaded.data.sft.path == str(tmp_path.resolve() / "rows.jsonl")


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("grpo.learing_rate=1", "unknown field; did you mean 'learning_rate'?"),
        ("polcy.path=x", "unknown field; did you mean 'policy'?"),
        ("rollout.zzz=1", "unknown field; the fields here are dtype,"),
        ("grpo.zzzzzzz=1", "unknown field; and none has a similar name"),
        ("policy.config.hiden_size=1", "unknown field; did you mean 'hidden_size'?"),
        ("sft.num_generations=8", "unknown field"),
        ("rewards.0.wieght=1", "unknown field; did you mean 'weight'?"),
        ("grpo.num_generations=many", "expected a whole number or null, got 'many'"),
        ("sft.learning_rate=true", "expected a number, got True"),
        ("sft.lr_scheduler_type=linaer", "expected 'linear', got 'linaer'"),
        ("sft.optim=adamw_torh", "expected 'adamw_torch', got 'adamw_torh'"),
        ("policy.dtype=fp32", "expected one of float32, bfloat16, got 'fp32'"),
        ("rollout.dtype=fp32", "expected one of auto, bfloat16, float16, float32, got 'fp32'"),
        ("policy.config.q_lora_rank=x", "expected a whole number or null, got 'x'"),
        ("policy.config.topk_method=greedy", "expected one of noaux_tc, got 'greedy'"),
        ("parity=3", "expected a mapping of fields, got 3"),
        ("data.sft=3", "expected a mapping of fields, got 3"),
        ("rewards=math", "expected a list such as"),
        ("rewards=[{weight: 1}]", "the field `name` is missing"),
        ("grpo.use_vllm=true", "posttrain sets this itself: rollouts run in posttrain's own"),
        ("sft.output_dir=x", "posttrain sets this itself: results go to"),
        ("grpo.vllm_max_model_length=9", "set `rollout.max_model_len`"),
        ("sft.eval_strategy=steps", "accuracy is measured by generation before and after"),
        ("grpo.fp16=true", "gradients in float16 are not scaled here"),
        ("sft.packing_strategy=wrapped", "must be bfd or bfd_split"),
        ("grpo.loss_type=dapoo", "expected 'dapo', got 'dapoo'"),
        (
            "grpo={max_completion_length: 64, loss_type: vespo, vllm_importance_sampling_mode: sequence_mask}",
            "goes with vllm_importance_sampling_mode token_truncate",
        ),
        ("sft.loss_type=nlll", "expected 'nll', got 'nlll'"),
        ("grpo.importance_sampling_level=sequnce", "expected 'sequence', got 'sequnce'"),
        ("grpo.vllm_importance_sampling_mode=foo", "expected one of sequence_mask,"),
        ("grpo.scale_rewards=grop", "expected 'group', got 'grop'"),
        ("policy.attn_implementation=foo", "expected one of sdpa, eager,"),
        ("grpo.mtp_loss_weight=-1", "must not be below 0, got -1.0"),
        ("grpo.beta=-3", "must not be below 0, got -3.0"),
        ("grpo.generation_kwargs={top_pp: 1}", "top_pp: unknown field; did you mean 'top_p'?"),
        ("grpo.generation_kwargs={stopp: 1}", "stopp: unknown field; did you mean 'stop'?"),
        ("grpo.generation_kwargs={n: 2}", "posttrain sets this itself: set `grpo.num_generations`"),
        ("grpo.generation_kwargs={top_p: 1}", "posttrain sets this itself: set `grpo.top_p`"),
        ("grpo.reward_weights=[1]", "set `weight` on each item of `rewards`"),
        ("eval.count=0", "must be at least 1, got 0"),
        ("rollout.gpu_memory_utilization=1.5", "must be at most 1, got 1.5"),
        ("parity.tolerance=0", "must be above 0, got 0.0"),
        ("data.eval.size=1", "eval.count 2 is more than the rows of data.eval, 1"),
        ("data.eval=null", None),
        ("name=a/b", "must not hold a slash, got 'a/b'"),
        ("grpo.num_generations=1", "a group needs at least 2 answers to compare, got 1"),
        ("grpo.num_generations=3", "whole groups of num_generations 3: make it 6 or 9"),
        ("grpo.num_generations=16", "must hold whole groups of num_generations 16: make it 16"),
        ("grpo.per_device_train_batch_size=0", "must be at least 1, got 0"),
        ("grpo.generation_batch_size=12", "a multiple of per_device_train_batch_size 8 x 1"),
        ("rollout.max_model_len=64", "64 is not above grpo.max_completion_length 64"),
        ("policy.path=owner/model", "exactly one of `path` (a checkpoint) and `config`"),
        ("policy.config=null", "exactly one of `path` (a checkpoint) and `config`"),
        ("policy.tokenizer=null", "a policy from scratch needs one"),
        ("policy.tokenizer=no/such/folder", "there is no folder no/such/folder"),
        ("policy.config.n_routed_experts=9", "must be a multiple of n_group 2, got 9"),
        ("policy.config.n_group=8", "leaves 1 each: use fewer groups"),
        ("policy.config.topk_group=3", "must be at most n_group 2, got 3"),
        ("policy.config.num_experts_per_tok=5", "at most topk_group 1 x 4 experts a group, got 5"),
        ("policy.config.qk_rope_head_dim=7", "rotations need an even size, got 7"),
        ("policy.config.first_k_dense_replace=2", "below num_hidden_layers 2"),
        ("policy.config.hidden_size=0", "must be at least 1, got 0"),
        ("policy.config.max_position_embeddings=100", "max_position_embeddings 100, got 128"),
        ("eval.max_tokens=128", "must be below rollout.max_model_len 128, got 128"),
        ("rewards=[]", "GRPO and `data.eval` need at least one"),
        ("rewards.0.weight=0", "every weight is 0"),
        ("rewards.0.name=fromat", "did you mean 'format'?"),
        ("rewards.0.name=nofile.py:fn", "there is no file nofile.py"),
        ("rewards.0.options={colour: red}", "has no option 'colour'"),
        ("rewards.0.seconds=0", "must be above 0, got 0"),
        ("rewards.0.workers=0", "must be at least 1, got 0"),
        ("rewards.0.failed=low", "expected a number"),
        ("rewards=[{name: math, seconds: 1}]", "reward 'math' limits itself; leave `seconds`"),
        ("data.train.path=nofile.jsonl", "there is no file nofile.jsonl (looked in"),
        ("data.train.hub=owner/data", "exactly one of `hub`, `path` and `script`"),
        ("data.train.path=null", "exactly one of `hub`, `path` and `script`, got none"),
        ("data.train.name=main", "a configuration's name goes with `hub`"),
        ("data.train.split=train", "a local file is one split"),
        ("data.train=null", "the stage `grpo` needs the source `data.train`"),
        ("data.train={script: good.yaml}", "a script needs `split` and `size`"),
        ("rollout.tensor_parallel_size=2", "must divide the number of processes 1, got 2"),
        ("accelerate=nofile.yaml", "there is no file nofile.yaml"),
        ("accelerate=rows.jsonl", None),
        ("accelerate=.", "is no accelerate configuration"),
    ],
)
def test_each_rule(faults: Faults, good: Path, override: str, fault: str | None) -> None:
    if fault is None:
        recipe.load(good, [override])
        return
    found = faults(overrides=[override])
    assert len(found) == 1, found
    assert fault in found[0]


def test_rules_of_a_policy_without_mtp(faults: Faults) -> None:
    overrides = ["policy.config.num_nextn_predict_layers=0", "rollout.num_speculative_tokens=1"]
    assert "drafting needs an MTP module" in faults(overrides=overrides)[0]


def test_grpo_needs_a_start(faults: Faults) -> None:
    found = faults("sft:\n  learning_rate: 1e-4\n", "")
    assert found == [
        "good.yaml:1: policy.path: without a section `sft`, GRPO needs a checkpoint to start from"
    ]


def test_nothing_to_train(good: Path) -> None:
    text = good.read_text()
    start, end = text.index("sft:\n  learning"), text.index("rollout:")
    good.write_text(text[:start] + text[end:])
    with pytest.raises(recipe.RecipeError, match="there is nothing to train"):
        recipe.load(good)


def test_processes_count_in_the_batch(
    faults: Faults, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("launch.yaml").write_text("num_processes: 3\n")
    override = ["accelerate=launch.yaml", "grpo.num_generations=6"]
    assert recipe.launched_processes(recipe.load(good, override)) == 3  # 8 x 3 = 24
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "8 x gradient_accumulation_steps 1 x 2 processes = 16" in faults(overrides=override)[0]


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ("steps_per_generation=2", True),  # 8 x 2 = 16
        ("generation_batch_size=32", True),
        ("generation_batch_size=24", False),
        ("gradient_accumulation_steps=2", True),
        ("gradient_accumulation_steps=3", False),
    ],
)
def test_the_batch_is_trls(good: Path, fields: str, fits: bool) -> None:
    overrides = ["grpo.num_generations=16", f"grpo.{fields}"]
    if fits:
        recipe.load(good, overrides)
    else:
        with pytest.raises(recipe.RecipeError, match="whole groups of num_generations 16"):
            recipe.load(good, overrides)


def test_all_faults_at_once_each_with_its_line(faults: Faults) -> None:
    found = faults(
        "grpo:\n  num_generations: 4\n", "grpo:\n  num_generations: 3\n  betta: 0.1\n",
        ["policy.config.topk_group=3", "eval.count=-1"],
    )  # fmt: skip
    assert [fault.split(": ")[0] for fault in found] == [
        "good.yaml:18",
        "good.yaml:19",
        "override 'eval.count=-1'",
        "override 'policy.config.topk_group=3'",
    ]
