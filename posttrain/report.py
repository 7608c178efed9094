"""The short tables that a command ends with."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain import environment

BARS = "▁▂▃▄▅▆▇█"


def training(summary: Mapping[str, Any], folder: Path, sft: Mapping[str, Any] | None = None) -> str:
    """Return the table of a finished stage, with the SFT stage's accuracy when there was one."""
    rewards = curve(folder / "metrics.jsonl", "reward")
    before, after = value(summary, "eval.before.accuracy"), value(summary, "eval.after.accuracy")
    accuracy = " -> ".join(f"{share:.1%}" for share in (before, after) if share is not None)
    count = value(summary, "eval.count")
    checkpoint = folder / "checkpoint"
    rows = [
        ("after SFT", _form(value(sft or {}, "eval.after.accuracy"), "{:.1%}")),
        (
            "accuracy",
            f"{accuracy}  ({count:,} held-out problems)" if accuracy and count else accuracy,
        ),
        (
            "reward",
            f"{sparkline(rewards)}  {rewards[0]:.3f} -> {rewards[-1]:.3f}" if rewards else "",
        ),
        ("perplexity", _form(value(summary, "perplexity"), "{:.3f}")),
        ("tokens/s", _speeds(summary)),
        ("MTP acceptance", _form(value(summary, "mtp.acceptance"), "{:.3f}")),
        ("load violation", _form(value(summary, "moe.max_violation"), "{:.2f}")),
        ("parity", _form(value(summary, "parity.max_abs_logprob_diff"), "{:.1e} nats at most")),
        ("peak memory", _form(value(summary, "peak_rss_gib"), "{:.1f} GiB")),
        ("checkpoint", str(checkpoint)),
        ("serve it", environment.serve_command(str(checkpoint))),
        ("load it", f'AutoModelForCausalLM.from_pretrained("{checkpoint}")'),
    ]
    steps, seconds = value(summary, "steps"), value(summary, "wall_seconds")
    head = f"{summary.get('recipe', folder.parent.name)}: {summary.get('stage', folder.name)} {summary.get('status')}"
    return table(
        head
        + (f", {steps} steps" if steps else "")
        + (f", {duration(seconds)}" if seconds else ""),
        rows,
    )


def evaluation(summary: Mapping[str, Any], checkpoint: Path) -> str:
    """Return the table of an evaluation: every figure of its summary."""
    rows = []
    for name, figure in flatten(summary):
        if isinstance(figure, float):
            figure = f"{figure:.1%}" if name.endswith("accuracy") else f"{figure:.4g}"
        rows.append((name, str(figure)))
    return table(str(checkpoint), rows)


def mismatch(summary: Mapping[str, Any]) -> str:
    """Return the parts of a checkpoint's mismatch, then one line a layer."""
    rows = [("", f"{'mean |d|':>10}{'max |d|':>10}{'k3':>10}   nats")]
    for name, text in (
        ("without_replay", "engine - trainer, own choices"),
        ("precision", "precision: engine - trainer, replayed"),
        ("routing", "routing: replayed - own choices"),
        ("shuffled", "control: engine - trainer, shuffled record"),
    ):
        gap = summary["gaps"][name]
        rows.append((text, f"{gap['mean']:>10.2e}{gap['max']:>10.2e}{gap['k3']:>10.2e}"))
    changed = [summary["gaps"][f"changed_{n}"]["mean"] for n in ("without_replay", "precision")]
    text = f"{summary['choices_differing']:.2%} of choices, {summary['tokens_differing']:.1%} of tokens"
    if summary["tokens_differing"]:
        text += f"; on those {changed[0]:.2e} own, {changed[1]:.2e} replayed: {changed[0] / changed[1]:.2f} x"
    rows.append(("choices that differ", text))
    for layer in summary["layers"]:
        share = f"{layer['choices_differing']:.2%} of choices, {layer['tokens_differing']:.1%} of tokens"
        rows.append((f"layer {layer['layer']}", f"{share}; replayed alone {layer['alone']:.2e}"))
    title = (
        f"{summary['checkpoint']}: engine {summary['engine_dtype']}, trainer {summary['trainer_dtype']}, "
        f"{summary['tokens']:,} tokens on {summary['prompts']} prompts"
    )
    return table(title + " of random tokens" * summary["random_prompts"], rows)


def table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return a title and the rows that have something to say, in two columns.

    >>> print(table("run", [("steps", "12"), ("left out", ""), ("reward", "0.5")]))
    run
      steps   12
      reward  0.5
    """
    rows = [row for row in rows if row[1]]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def value(summary: Mapping[str, Any], name: str) -> Any:
    """Return the figure at a dotted name, None where there is none.

    >>> value({"eval": {"after": {"accuracy": 0.9}}}, "eval.after.accuracy")
    0.9
    """
    at: Any = summary
    for part in name.split("."):
        at = at.get(part) if isinstance(at, Mapping) else None
    return at


def flatten(summary: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the figures of nested mappings under dotted names.

    >>> list(flatten({"a": {"b": 1}, "c": 2}))
    [('a.b', 1), ('c', 2)]
    """
    for name, figure in summary.items():
        if isinstance(figure, Mapping):
            yield from flatten(figure, f"{prefix}{name}.")
        elif figure is not None:
            yield prefix + name, figure


def curve(path: Path, name: str) -> list[float]:
    """Return a metric's values from `metrics.jsonl`, oldest first."""
    if not path.exists():
        return []
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line)
    return [float(line[name]) for line in lines if line.get(name) is not None]


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Draw values in one line of at most `width` bars; a bar is the mean of its share of them.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7])
    '▁▂▃▄▅▆▇█'
    >>> sparkline([1.0, 1.0])
    '▁▁'
    """
    bars = min(width, len(values))
    edges = [round(i * len(values) / bars) for i in range(bars + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[int((mean - low) / span * 7.999) if span else 0] for mean in means)


def duration(seconds: float) -> str:
    """Say a time in words.

    >>> duration(252.4)
    '4 min 12 s'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "0 s"


def _speeds(summary: Mapping[str, Any]) -> str:
    speeds = [
        (name, value(summary, f"{key}.tokens_per_second"))
        for name, key in (("rollouts", "rollout"), ("training", "train"))
    ]
    return ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds if speed is not None)


def _form(figure: Any, form: str) -> str:
    return "" if figure is None else form.format(figure)
