"""The evidence for the default recipe: seeds, the control, and SFT without the balance update.

    python bench/arithmetic.py [--root runs/evidence] [--seeds 0 1 2] [--table]

Runs what is not there yet, one after the other (some 12 minutes a seed on two cores), and prints the
table that stands in docs/arithmetic.md. `--table` only prints. The control continues SFT from the first
seed's SFT checkpoint, with the recipe's own settings, for as long as that seed's GRPO took.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from posttrain.report import curve, sparkline

RECIPE = "recipes/arithmetic.yaml"


def run(stage: str, root: Path, *overrides: str) -> None:
    """Run a stage as a user would."""
    command = [sys.executable, "-m", "posttrain", stage, RECIPE, f"output_root={root}", *overrides]
    subprocess.run(command, check=True)


def summary(folder: Path) -> dict[str, Any]:
    """Read a stage's summary; empty if it has not been run to the end."""
    path = folder / "summary.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("status") == "complete" else {}


def measure(root: Path, seeds: list[int]) -> None:
    """Run every stage that has no summary yet."""
    for seed in seeds:
        if not summary(root / f"seed-{seed}/arithmetic/grpo"):
            run("grpo", root / f"seed-{seed}", f"seed={seed}")
    first = root / f"seed-{seeds[0]}/arithmetic"
    if not summary(root / "control/arithmetic/sft"):
        sft, grpo = summary(first / "sft"), summary(first / "grpo")
        steps = round(grpo["wall_seconds"] / sft["train"]["seconds"] * sft["steps"])
        run(
            "sft",
            root / "control",
            "policy.config=null",
            f"policy.path={first}/sft/checkpoint",
            f"sft.max_steps={steps}",
            f"seed={seeds[0]}",
        )
    if not summary(root / "no-update/arithmetic/sft"):
        run("sft", root / "no-update", "sft.bias_update_rate=0.0", f"seed={seeds[0]}")


def table(root: Path, seeds: list[int]) -> str:
    """The figures of all runs as Markdown."""
    lines = [
        "| run | accuracy after SFT | after GRPO | reward | SFT, GRPO minutes | acceptance T=0, T=1: SFT | GRPO |"
        " max violation, SFT | parity, nats | rollout, train tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for seed in seeds:
        folder = root / f"seed-{seed}/arithmetic"
        sft, grpo = summary(folder / "sft"), summary(folder / "grpo")
        if not grpo:
            continue
        before, after = sft["eval"]["after"]["accuracy"], grpo["eval"]["after"]["accuracy"]
        lines.append(
            f"| seed {seed} | {before:.1%} | {after:.1%} "
            f"| {sparkline(curve(folder / 'grpo/metrics.jsonl', 'reward'))} "
            f"| {sft['wall_seconds'] / 60:.1f}, {grpo['wall_seconds'] / 60:.1f} "
            f"| {acceptance(sft)} | {acceptance(grpo)} | {sft['moe']['max_violation']:.2f} "
            f"| {grpo['parity']['max_abs_logprob_diff']:.1e} "
            f"| {grpo['rollout']['tokens_per_second']:,.0f}, {grpo['train']['tokens_per_second']:,.0f} |"
        )
    for name, text in (("control", "SFT continued"), ("no-update", "SFT, biases frozen")):
        sft = summary(root / name / "arithmetic/sft")
        if sft:
            lines.append(
                f"| {text} | {sft['eval']['after']['accuracy']:.1%} | - | - "
                f"| {sft['wall_seconds'] / 60:.1f} | {acceptance(sft)} | - "
                f"| {sft['moe']['max_violation']:.2f} | - | - |"
            )
    return "\n".join(lines)


def acceptance(found: dict[str, Any]) -> str:
    """Draft acceptance, greedy and at temperature 1."""
    return f"{found['mtp']['acceptance_greedy']:.3f}, {found['mtp']['acceptance']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        measure(args.root, args.seeds)
    print(table(args.root, args.seeds))


if __name__ == "__main__":
    main()
