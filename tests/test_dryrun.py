"""The dry run: real recipes without their weights, counted parameters, memory, and faults."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config

from posttrain import cli, dryrun, footprint, recipe
from posttrain.footprint import Layout, Shapes

ROOT = Path(__file__).resolve().parents[1]


def config(name: str) -> DeepseekV3Config:
    raw = json.loads((ROOT / "recipes/policies" / name).read_text())
    raw.pop("quantization_config", None)
    return DeepseekV3Config.from_dict(raw)


def test_released_shapes() -> None:
    """The reports: DeepSeek-V3 has 671B and 37B active, its MTP module 11.5B beside what it shares (arXiv 2412.19437,
    and the model card's 14B with embedding and head); Moonlight 16B and 3B (arXiv 2502.16982)."""
    v3 = footprint.shapes(config("deepseek-v3.json"))
    assert (round(v3.trunk / 1e9), round(v3.active / 1e9, 1)) == (671, 37.6)
    assert round(v3.mtp / 1e9, 1) == 11.6
    moonlight = footprint.shapes(config("moonlight-16b-a3b-instruct.json"))
    assert (round(moonlight.trunk / 1e9), round(moonlight.active / 1e9)) == (16, 3)
    assert moonlight.mtp == 0


def test_cache_of_the_latent() -> None:
    # 512 latent and 64 rotary numbers a token and layer, instead of 128 heads x (192 + 128).
    assert footprint.cache_numbers(config("deepseek-v3.json")) == 576


@pytest.mark.parametrize(
    ("launch", "fields", "expected"),
    [
        # One process in float32: 4 + 4 + 8 bytes.
        (None, {}, [4, 4, 8]),
        (None, {"optim": "sgd"}, [4, 4, 0]),
        (None, {"optim": "adamw_bnb_8bit"}, [4, 4, 2]),
        (None, {"beta": 0.1}, [4, 4, 8, 4]),
        ({"distributed_type": "MULTI_GPU"}, {}, [4, 4, 8]),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, {}, [1, 1, 2]),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_reshard_after_forward": False}},
            {},
            [4, 1, 2],
        ),
        # ZeRO: 2 bytes of parameter and gradient; a float32 copy and two float32 states.
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}},
         {"bf16": True}, [0.5, 0.5, 3]),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
         {"bf16": True}, [2, 0.5, 3]),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}},
         {"bf16": True}, [2, 2, 3]),
    ],
)  # fmt: skip
def test_bytes_of_a_parameter(
    launch: dict[str, Any] | None, fields: dict[str, Any], expected: list[float]
) -> None:
    layout = Layout.read(launch, processes=4)
    parts = footprint.training(Shapes(trunk=90, active=10, mtp=10), layout, "float32", fields)
    assert [part.bytes / 100 for part in parts] == expected


def test_fsdp_trains_float32_shards_of_a_bfloat16_policy() -> None:
    layout = Layout.read({"distributed_type": "FSDP"}, processes=1)
    shapes = Shapes(trunk=100, active=10, mtp=0)
    sizes = [part.bytes for part in footprint.training(shapes, layout, "bfloat16", {})]
    assert sizes == [400, 400, 800]


@pytest.mark.parametrize(("kind", "size"), [("NO", 4), ("FSDP", 4), ("DEEPSPEED", 2)])
def test_what_a_process_holds_while_it_loads(kind: str, size: int) -> None:
    """A bfloat16 policy is loaded, or upcast before it is spread, in float32; not by DeepSpeed."""
    layout = Layout.read({"distributed_type": kind}, processes=4)
    assert footprint.loading(Shapes(100, 10, 5), layout, "bfloat16").bytes == 105 * size


def test_offloaded_states_are_on_the_host() -> None:
    zero = {"zero_stage": 3, "offload_optimizer_device": "cpu"}
    layout = Layout.read({"distributed_type": "DEEPSPEED", "deepspeed_config": zero}, processes=4)
    parts = footprint.training(Shapes(100, 10, 0), layout, "bfloat16", {})
    assert [part.on_host for part in parts] == [False, False, True]


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("gsm8k_moonlight", "grpo"),
        ("math_moonlight", "grpo"),
        ("mbpp_moonlight", "grpo"),
        ("deepseek_v3", "sft"),
    ],
)
def test_real_recipes_without_weights_and_network(
    name: str, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main([stage, f"recipes/{name}.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "every field and rule holds" in out
    assert "FSDP2" in out
    assert "at least, without activations" in out


ROWS = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
SMALL = """\
policy:
  path: owner/none
  dry_run_config: {config}
data:
  train: {{path: rows.jsonl, prompt: "{{question}}"}}
  eval: {{path: rows.jsonl, prompt: "{{question}}"}}
grpo: {{num_generations: 4, max_completion_length: 64}}
rewards: [{{name: "reward.py:score"}}]
eval: {{count: 2}}
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("reward.py").write_text(
        "def score(completions, answer, **columns):\n    return [1.0] * len(completions)\n"
    )
    path = Path("small.yaml")
    moonlight = ROOT / "recipes/policies/moonlight-16b-a3b-instruct.json"
    path.write_text(SMALL.format(config=moonlight))
    return path


def run(path: Path, *overrides: str) -> str:
    return dryrun.run(recipe.load(path, overrides), "grpo")


def test_what_it_reports(small: Path) -> None:
    text = run(small)
    assert "data.train              2 rows of question, answer, prompt" in text
    assert "reward reward.py:score  weight 1, reads answer" in text
    assert "parameters   15,960,108,544, of which a token uses 2,914,774,528" in text
    assert "of grpo, GiB" in text


def test_a_column_that_a_reward_reads(small: Path) -> None:
    Path("rows.jsonl").write_text('{"question": "1 + 1?"}\n' * 2)
    with pytest.raises(recipe.RecipeError) as caught:
        run(small)
    train, held_out = str(caught.value).splitlines()
    assert train == (
        "small.yaml:5: data.train: the reward reward.py:score reads the column answer; "
        "the data has prompt, question"
    )
    assert held_out.startswith("small.yaml:6: data.eval: the reward")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "reward 'score' returned 1 values for [24] completions"),
        ("return [float('nan')] * len(completions)", "returned nan for completion 0"),
        ("return [c['content'] for c in completions]", "scores none of 4 .* 0 take .* 4 fail"),
    ],
)
def test_a_reward_that_cannot_work(small: Path, body: str, message: str) -> None:
    """Found on the first rows of the data, before any model."""
    Path("reward.py").write_text(f"def score(completions, answer):\n    {body}\n")
    with pytest.raises(recipe.RecipeError, match=message):
        run(small)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.eval.prompt='{quest}'", "no column `quest`"),
        ("eval.count=3", "eval.count 3 is more than its 2 rows"),
        ("rollout.max_model_len=9000", "at most max_position_embeddings 8192, got 9000"),
        ("rollout.num_speculative_tokens=1", "no MTP module to draft with"),
    ],
)
def test_faults(small: Path, override: str, message: str) -> None:
    with pytest.raises(recipe.RecipeError, match=message):
        run(small, override)


def test_a_foreign_architecture(small: Path) -> None:
    Path("config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["Llama"]}))
    with pytest.raises(recipe.RecipeError, match="DeepseekV3ForCausalLM"):
        run(small, "policy.dry_run_config=config.json")


def test_without_a_config_the_policy_is_not_checked(small: Path) -> None:
    text = run(small, "policy.dry_run_config=null")
    assert "policy                  not checked: owner/none is not in the cache of the hub" in text
    assert "GiB" not in text
