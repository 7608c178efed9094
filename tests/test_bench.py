"""The benchmarks start: what they change in a recipe passes its rules."""

import importlib.util
from pathlib import Path

from posttrain import recipe

ROOT = Path(__file__).resolve().parent.parent


def test_the_rollout_benchmarks_recipe_holds() -> None:
    spec = importlib.util.spec_from_file_location("rollouts", ROOT / "bench/rollouts.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    loaded = recipe.load(ROOT / "recipes/arithmetic.yaml", bench.ROOM)
    assert loaded.rollout.max_model_len > bench.LONGEST
