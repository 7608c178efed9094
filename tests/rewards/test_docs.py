"""The code that docs/rewards.md shows does what the page says."""

import re
from pathlib import Path

import pytest
import yaml

import rewards
from posttrain.recipe import RewardSection

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(first_line: str, page: str = PAGE) -> str:
    found = re.search(rf"^```{re.escape(first_line)}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert found is not None, first_line
    return found[1]


def test_first_example_gives_the_values_it_shows() -> None:
    code = block("python")
    scope: dict[str, object] = {}
    *statements, call = code.strip().splitlines()
    expression, _, shown = call.partition("  # ")
    exec("\n".join(statements), scope)
    assert eval(expression, scope) == eval(shown)


def test_own_reward_in_ten_lines(tmp_path: Path) -> None:
    code = block("python my_rewards.py")
    assert len(code.splitlines()) <= 10
    (tmp_path / "my_rewards.py").write_text(code)
    metrics: dict[str, float] = {}
    reward = rewards.load(f"{tmp_path}/my_rewards.py:brevity", limit=4)
    message = [{"role": "assistant", "content": "123456"}]
    values = reward(
        completions=["1234", message, "123456789"], answer=["1"] * 3, log_metric=metrics.__setitem__
    )
    assert values == [1.0, 0.5, 0.0]
    assert metrics.pop("reward/brevity/mean_length") == pytest.approx(19 / 3)
    assert metrics.pop("reward/brevity/seconds") > 0
    assert metrics == {"reward/brevity/timeouts": 0.0, "reward/brevity/errors": 0.0}


def test_own_reward_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("python\n# my_rewards.py", README)
    assert len(code.splitlines()) <= 10
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    entries = yaml.safe_load(block("yaml", README))["rewards"]
    assert [entry["name"] for entry in entries] == ["math", "my_rewards.py:brief"]
    reward = rewards.load(entries[1]["name"], **entries[1]["options"])
    message = [{"role": "assistant", "content": "It is 7."}]
    values = reward(completions=["7", message, "8", "7" * 61], answer=["7"] * 4)
    assert values == [1.0, 1.0, 0.0, 0.0]


def test_recipe_example_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(block("python my_rewards.py"))
    monkeypatch.chdir(tmp_path)
    entries = yaml.safe_load(block("yaml"))["rewards"]
    names = [RewardSection(**entry).load().__name__ for entry in entries]
    assert names == ["math", "format", "brevity"]


def test_every_built_in_has_its_section_and_its_options() -> None:
    for name in rewards.BUILT_IN:
        section = PAGE.partition(f"\n## `{name}`\n")[2].partition("\n## ")[0]
        with pytest.raises(rewards.RewardError, match="it has ") as refused:
            rewards.load(name, no_such_option=1)
        options = str(refused.value).rpartition("it has ")[2].split(", ")
        assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(options)
        assert "**Known problems.**" in section
