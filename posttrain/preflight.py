"""What of a run can be checked before anything is trained: its data, and that rewards can read it. No torch."""

from collections.abc import Callable

from posttrain import gold, tasks
from posttrain.recipe import Recipe, RecipeError

STAGE_DATA = {"sft": ("sft", "eval"), "grpo": ("train", "eval")}


class Unavailable(Exception):
    """What cannot be checked on this machine; no fault of the recipe."""


class Findings:
    """What checks found, line by line, and every fault that they met."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self.faults: list[str] = []

    def note(self, what: str, check: Callable[[], str]) -> None:
        """Run a check, and keep what it returns or the fault that it raises."""
        try:
            self.found.append((what, check()))
        except Unavailable as missing:
            self.found.append((what, f"not checked: {missing}"))
        except ValueError as error:
            self.faults.append(str(error))

    def raise_faults(self) -> None:
        """Raise RecipeError with every fault, if there is one."""
        if self.faults:
            raise RecipeError("\n".join(self.faults))


def check(recipe: Recipe, stages: list[str]) -> Findings:
    """Load every data source of the stages, and try the rewards on what they are to read."""
    findings = Findings()
    for role in dict.fromkeys(role for name in stages for role in STAGE_DATA[name]):
        if getattr(recipe.data, role) is not None:
            findings.note(f"data.{role}", lambda role=role: _data(recipe, role))  # type: ignore[misc]
    return findings


def _data(recipe: Recipe, role: str) -> str:
    source = getattr(recipe.data, role)
    try:
        data = tasks.load(source)
    except tasks.TaskUnavailableError:
        raise Unavailable(
            f"{source.hub} is not in the cache of the hub (HF_HUB_OFFLINE=0 fetches it; `path` takes a local file "
            "with the same columns)"
        ) from None
    columns = set(data.column_names)
    if role != "sft":
        for reward in recipe.rewards:
            missing = set(reward.load().required_columns) - columns
            if missing:
                raise tasks.TaskError(
                    f"{source.where}: data.{role}: the reward {reward.name} reads the column "
                    f"{', '.join(sorted(missing))}; the data has {', '.join(sorted(columns))}"
                )
        gold.trial([reward.load() for reward in recipe.rewards], data)
    if role == "eval" and len(data) < recipe.eval.count:
        raise tasks.TaskError(
            f"{source.where}: data.eval: eval.count {recipe.eval.count} is more than its {len(data)} rows"
        )
    return f"{len(data):,} rows of {', '.join(data.column_names)}"
