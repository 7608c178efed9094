"""Where a recipe's files are: in the working directory, else beside the recipe, else in the folder above it."""

from pathlib import Path
from typing import Any

from posttrain.recipe.sections import Recipe
from posttrain.recipe.source import Key, Source


def resolve(recipe: Recipe, source: Source, file: Path) -> None:
    """Replace every path of the recipe by the one that exists; note a fault where none does."""
    policy = recipe.policy
    _existing(recipe, "accelerate", ("accelerate",), source, file)
    _existing(policy, "dry_run_config", ("policy", "dry_run_config"), source, file)
    for name in ("path", "tokenizer"):
        value = getattr(policy, name)
        found = _find(value, file) if value else None
        if found:
            setattr(policy, name, found)
        elif value and (value.count("/") > 1 or value.startswith((".", "/", "~"))):
            source.fault(
                ("policy", name), f"there is no folder {value}, and a hub name is owner/name"
            )
    for role in ("sft", "train", "eval"):
        data = getattr(recipe.data, role)
        if data is not None:
            _existing(data, "path", ("data", role, "path"), source, file)
            _existing(data, "script", ("data", role, "script"), source, file)
    for i, reward in enumerate(recipe.rewards):
        script, colon, function = reward.name.rpartition(":")
        if colon and script.endswith(".py"):
            found = _find(script, file)
            if found is None:
                source.fault(("rewards", i, "name"), f"there is no file {script}")
            else:
                reward.name = f"{found}:{function}"


def _existing(section: Any, name: str, key: Key, source: Source, file: Path) -> None:
    value = getattr(section, name)
    if value is None:
        return
    found = _find(value, file)
    if found is None:
        places = ", ".join(dict.fromkeys(str(folder) for folder in (Path.cwd(), *_beside(file))))
        source.fault(key, f"there is no file {value} (looked in {places})")
    else:
        setattr(section, name, found)


def _find(value: str, file: Path) -> str | None:
    """Return where a path of a recipe exists: as it is, or beside the recipe, or in the folder above."""
    if Path(value).expanduser().exists():
        return str(Path(value).expanduser())
    found = (folder / value for folder in _beside(file))
    return next((str(path) for path in found if path.exists()), None)


def _beside(file: Path) -> list[Path]:
    return list(file.resolve().parents[:2])
