"""`--dry-run`: everything of a run that can be checked without its weights."""

import json
from pathlib import Path

from transformers import AutoTokenizer, DeepseekV3Config
from transformers.utils import cached_file

from posttrain import environment, footprint, preflight, report
from posttrain.policy import configuration
from posttrain.recipe import Recipe, RecipeError, accelerate_config, launched_processes
from posttrain.rollout import engine


def run(recipe: Recipe, stage: str) -> str:
    """Check the data, rewards, policy and memory of a stage (of both, when GRPO has an SFT stage before it).

    Returns what was found as text, what could not be checked here among it. Raises RecipeError with every fault.
    """
    stages = [
        name
        for name in ("sft", "grpo")
        if getattr(recipe, name) and (name == stage or stage == "grpo")
    ]
    findings = preflight.check(recipe, stages)
    checks = findings.found
    checks.insert(0, ("recipe", f"{', then '.join(stages)}: every field and rule holds"))
    for reward in recipe.rewards:
        needs = reward.load().required_columns
        checks.append(
            (
                f"reward {reward.name}",
                f"weight {reward.weight:g}, reads {', '.join(needs) or 'no column'}",
            )
        )
    config: DeepseekV3Config | None = None

    def policy() -> str:
        nonlocal config
        config, origin = _config(recipe)
        return origin

    findings.note("policy", policy)
    findings.raise_faults()
    if config is None:
        return report.table("checks", checks)
    return f"{report.table('checks', checks)}\n{_memory(recipe, config, stages)}"


def _config(recipe: Recipe) -> tuple[DeepseekV3Config, str]:
    """Return the policy's configuration and where it comes from."""
    section = recipe.policy
    if section.config is not None:
        fields = dict(section.config)
        if "vocab_size" not in fields:
            fields["vocab_size"] = len(AutoTokenizer.from_pretrained(section.tokenizer))
        config, origin = DeepseekV3Config(**fields), "the recipe's config"
    else:
        file = _config_file(recipe)
        if file is None:
            raise preflight.Unavailable(
                f"{section.path} is not in the cache of the hub, and `policy.dry_run_config` is not set; "
                "neither is its memory"
            )
        raw = json.loads(file.read_text(encoding="utf-8"))
        configuration.check(raw, file)
        dropped = ("auto_map", "quantization_config")
        config = DeepseekV3Config.from_dict({k: v for k, v in raw.items() if k not in dropped})
        origin = str(file)
    if section.num_nextn_predict_layers is not None:
        config.num_nextn_predict_layers = section.num_nextn_predict_layers
    engine.check(
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid", **config.to_dict()},
        recipe.rollout,
        environment.on_cpu(),
    )
    room, wanted = config.max_position_embeddings, recipe.rollout.max_model_len
    if wanted > room:
        raise RecipeError(
            f"rollout.max_model_len: must be at most max_position_embeddings {room}, got {wanted}"
        )
    return config, f"from {origin}"


def _config_file(recipe: Recipe) -> Path | None:
    section = recipe.policy
    path = Path(str(section.path))
    if path.is_dir():
        return path / configuration.FILE
    found = cached_file(
        str(section.path),
        configuration.FILE,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is not None:
        return Path(found)
    return None if section.dry_run_config is None else Path(section.dry_run_config)


def _memory(recipe: Recipe, config: DeepseekV3Config, stages: list[str]) -> str:
    """Return the table of memory, of the last stage."""
    shapes = footprint.shapes(config)
    spread = accelerate_config(recipe.accelerate) if recipe.accelerate else None
    layout = footprint.Layout.read(spread, launched_processes(recipe))
    stage = stages[-1]
    trained = footprint.training(shapes, layout, recipe.policy.dtype, getattr(recipe, stage))
    # SFT ends before the engine that evaluates it starts; GRPO trains beside its engine.
    held = footprint.rollout(shapes, config, recipe.rollout) if stage == "grpo" else []
    # The cache takes what room is left; it cannot do without one whole sequence.
    needed = sum(part.bytes for part in [*trained, *held[:2]] if not part.on_host)
    parts = [*trained, *held, footprint.Part("at least, without activations", needed)]
    parts.append(footprint.loading(shapes, layout, recipe.policy.dtype))
    names = [part.what + (", on the host" if part.on_host else "") for part in parts]
    width = max(map(len, names))
    where = layout.kind
    if layout.processes > 1:
        where += f", {layout.processes} processes on {layout.machines} machine(s)"
    lines = [
        report.table(
            "policy",
            [
                ("parameters", f"{shapes.trunk:,}, of which a token uses {shapes.active:,}"),
                (
                    "layers",
                    f"{config.num_hidden_layers}, each of {config.n_routed_experts} routed experts, "
                    f"{config.num_experts_per_tok} a token",
                ),
                (
                    "MTP modules",
                    f"{config.num_nextn_predict_layers} with {shapes.mtp:,} parameters",
                ),
                ("spread", where),
            ],
        ),
        f"{f'memory of {stage}, GiB':<{width + 2}}  {'a process':>10}  {'in all':>10}",
    ]
    for name, part in zip(names, parts, strict=True):
        lines.append(
            f"  {name:<{width}}  {_gib(part.bytes)}  {_gib(part.bytes * layout.processes)}"
        )
    return "\n".join(lines)


def _gib(size: float) -> str:
    gib = size / footprint.GIB
    return f"{gib:>10,.2f}" if gib >= 1 else f"{gib:>10.4f}"
