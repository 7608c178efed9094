"""Every recipe that ships loads."""

from pathlib import Path

import pytest
import yaml

from posttrain import recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    loaded = recipe.load(path)
    assert loaded.name == path.stem
    head = path.read_text().split("\n\n", 1)[0]
    assert f"recipes/{path.name}" in head or "make grpo" in head, "the head says how to run it"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes/accelerate").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_reads_its_files(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]


def test_fsdp_wraps_the_classes_that_the_policy_has() -> None:
    from posttrain.policy import model

    for path in (ROOT / "recipes/accelerate").glob("fsdp*.yaml"):
        fsdp = yaml.safe_load(path.read_text())["fsdp_config"]
        for name in fsdp["fsdp_transformer_layer_cls_to_wrap"].split(","):
            assert hasattr(model, name)
