"""What the trainers and the policy's config accept, read from their sources without importing torch.

TRL's and transformers' configuration classes are dataclasses: their fields, annotations and defaults stand in the
source, and `ast` reads them in milliseconds where an import takes seconds.
"""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.recipe.source import RecipeError

Stage = str

_STAGES = {"sft": ("PolicySFTConfig", "SFTConfig"), "grpo": ("PolicyGRPOConfig", "GRPOConfig")}
_TRAINING_FILES = (
    ("trl", "trainer/base_config.py"),
    ("trl", "trainer/sft_config.py"),
    ("trl", "trainer/grpo_config.py"),
    ("transformers", "training_args.py"),
    ("transformers", "trainer_utils.py"),
)
_POLICY_FILES = (
    ("transformers", "configuration_utils.py"),
    ("transformers", "models/deepseek_v3/configuration_deepseek_v3.py"),
)
OUR_SCHEDULES = ("deepseek_multi_step",)

# TRL takes these values beside what its annotations say.
_ALSO = {"scale_rewards": "bool", "pad_to_multiple_of": "None"}

# Keys of a released config.json that transformers' class does not declare, and vLLM reads.
_RELEASED_ONLY = {
    "rope_theta": "float",
    "rope_scaling": "dict | None",
    "topk_method": "Literal['noaux_tc']",
    "scoring_func": "Literal['sigmoid']",
    "moe_layer_freq": "Literal[1]",
}


@dataclass(frozen=True)
class Field:
    """One field: its annotation and, when the source states a plain value, its default."""

    annotation: ast.expr
    default: Any = None


@dataclass(frozen=True)
class Schema:
    """The fields of a section and the values of the enumerations that they name."""

    fields: dict[str, Field]
    enums: dict[str, list[str]]


@cache
def trainer_schema(stage: Stage) -> Schema:
    """Return the fields of the `sft` or `grpo` section: TRL's, and those of `posttrain.training.config`."""
    modules = [_parse(_package(name) / file) for name, file in _TRAINING_FILES]
    modules.append(_parse(Path(__file__).parents[1] / "training" / "config.py"))
    classes = _classes(modules)
    start = next(name for name in _STAGES[stage] if name in classes)
    fields = _inherited(start, classes)
    for name, also in _ALSO.items():
        if name in fields:
            wider = ast.BinOp(fields[name].annotation, ast.BitOr(), _annotation(also))
            fields[name] = Field(wider, fields[name].default)
    enums = _enums(classes)
    enums["SchedulerType"] = [*enums["SchedulerType"], *OUR_SCHEDULES]
    return Schema(fields, enums)


@cache
def policy_schema() -> Schema:
    """Return the fields of `policy.config`: DeepseekV3Config's, also under their released names."""
    classes = _classes([_parse(_package(name) / file) for name, file in _POLICY_FILES])
    fields = _inherited("DeepseekV3Config", classes)
    for released, ours in _attribute_map(classes["DeepseekV3Config"]).items():
        for old, new in ((released, ours), (ours, released)):
            if old in fields:
                fields.setdefault(new, fields[old])
    fields |= {name: Field(_annotation(kind)) for name, kind in _RELEASED_ONLY.items()}
    return Schema(fields, {})


@cache
def sampling_schema() -> Schema:
    """Return the fields of vLLM's SamplingParams, which `grpo.generation_kwargs` takes."""
    classes = _classes([_parse(_package("vllm") / "sampling_params.py")])
    known = dict(_own(classes["SamplingParams"]))
    return Schema({name: field for name, field in known.items() if name[0] != "_"}, {})


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise RecipeError(
            f"{name} is not installed, and its fields cannot be checked; install the project with its dependencies"
        )
    return Path(found.origin).parent


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _classes(modules: list[ast.Module]) -> dict[str, ast.ClassDef]:
    return {
        node.name: node
        for module in modules
        for node in module.body
        if isinstance(node, ast.ClassDef)
    }


def _inherited(name: str, classes: dict[str, ast.ClassDef]) -> dict[str, Field]:
    """Collect a class's fields, those of its first base winning over the others', its own over all."""
    fields: dict[str, Field] = {}
    for base in reversed(classes[name].bases):
        base_name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
        if base_name in classes:
            fields |= _inherited(base_name, classes)
    return fields | dict(_own(classes[name]))


def _own(node: ast.ClassDef) -> Iterator[tuple[str, Field]]:
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        if item.target.id.startswith("_") or "ClassVar" in ast.unparse(item.annotation):
            continue
        yield item.target.id, Field(item.annotation, _default(item.value))


def _default(node: ast.expr | None) -> Any:
    if isinstance(node, ast.Call):
        node = next((word.value for word in node.keywords if word.arg == "default"), None)
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _enums(classes: dict[str, ast.ClassDef]) -> dict[str, list[str]]:
    return {
        name: [
            item.value.value
            for item in node.body
            if isinstance(item, ast.Assign)
            and isinstance(item.value, ast.Constant)
            and isinstance(item.value.value, str)
        ]
        for name, node in classes.items()
        if any(getattr(base, "id", "") == "ExplicitEnum" for base in node.bases)
    }


def _attribute_map(node: ast.ClassDef) -> dict[str, str]:
    for item in node.body:
        if isinstance(item, ast.Assign) and getattr(item.targets[0], "id", "") == "attribute_map":
            return dict(ast.literal_eval(item.value))
    return {}


def _annotation(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body
