"""What replay and the router bias do to learning: the default recipe's GRPO, arm by arm, seed by seed.

    python bench/replay_learning.py [--root runs/replay] [--sft runs/evidence] [--seeds 0 1 2] [--arms off r2 ...]

Each run starts from the SFT checkpoint of its seed under --sft (`python bench/arithmetic.py` makes them), with
a bfloat16 engine, a float32 trainer and two updates a rollout. Runs what is not there yet and prints the table;
`--table` only prints.

    off r2 r3          the three ways of replay, biases updated
    frozen             biases frozen, no replay
    r3-frozen          biases frozen, R3
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from posttrain.report import curve, sparkline

RECIPE = "recipes/arithmetic.yaml"
# Differences of single tokens are nats large where choices flip: the gate only has to catch wrong weights.
COMMON = ("rollout.dtype=bfloat16", "parity.tolerance=5.0", "grpo.num_iterations=2")
ARMS: dict[str, tuple[str, ...]] = {
    "off": (),
    "r2": ("grpo.replay=r2",),
    "r3": ("grpo.replay=r3",),
    "frozen": ("grpo.router_bias=frozen",),
    "r3-frozen": ("grpo.replay=r3", "grpo.router_bias=frozen"),
}


def summary(folder: Path) -> dict[str, Any]:
    """Read a stage's summary; empty if it has not been run to the end."""
    path = folder / "summary.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("status") == "complete" else {}


def run(folder: Path, arm: str, seed: int, args: argparse.Namespace) -> None:
    start = args.sft / f"seed-{seed}/arithmetic/sft/checkpoint"
    overrides = [
        f"output_root={folder}",
        f"seed={seed}",
        f"policy.path={start}",
        "policy.config=null",
        "sft=null",
        *COMMON,
        *ARMS[arm],
        *args.overrides,
    ]
    subprocess.run([sys.executable, "-m", "posttrain", "grpo", RECIPE, *overrides], check=True)


def table(args: argparse.Namespace) -> str:
    lines = [
        "| arm | accuracy, each seed | mean | reward, first seed | without replay, nats | precision | routing "
        "| staleness | choices differing | max violation | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in args.arms:
        folders = [args.root / arm / f"seed-{seed}/arithmetic/grpo" for seed in args.seeds]
        found = [(folder, summary(folder)) for folder in folders if summary(folder)]
        if not found:
            continue
        accuracies = [one["eval"]["after"]["accuracy"] for _, one in found]
        logs = [folder / "metrics.jsonl" for folder, _ in found]
        names = ("without_replay_mean", "precision_mean", "routing_mean", "staleness_mean")
        gaps = " | ".join(f"{average(logs, f'mismatch/{name}'):.1e}" for name in names)
        lines.append(
            f"| {arm} | {', '.join(f'{a:.1%}' for a in accuracies)} | {statistics.mean(accuracies):.1%} "
            f"| {sparkline(curve(logs[0], 'reward'))} | {gaps} "
            f"| {average(logs, 'mismatch/choices_differing'):.2%} "
            f"| {statistics.mean(one['moe']['max_violation'] for _, one in found):.2f} "
            f"| {statistics.mean(one['wall_seconds'] for _, one in found) / 60:.1f} |"
        )
    return "\n".join(lines)


def average(logs: list[Path], name: str) -> float:
    """The mean over all logged steps of all seeds."""
    return statistics.mean(value for log in logs for value in curve(log, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("runs/replay"))
    parser.add_argument("--sft", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="over the recipe's fields"
    )
    args = parser.parse_args()
    if not args.table:
        for seed in args.seeds:
            for arm in args.arms:
                folder = args.root / arm / f"seed-{seed}"
                if not summary(folder / "arithmetic/grpo"):
                    run(folder, arm, seed, args)
    print(table(args))


if __name__ == "__main__":
    main()
