"""The command `posttrain`: train a stage of a recipe, score a checkpoint, measure its mismatch, look at the machine.

Exit codes: 0 done; 2 something given is wrong (recipe, data, reward, checkpoint); 1 the run failed its own checks
(parity, weight sync, gold answers); 130 stopped by a signal.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain import environment, report
from posttrain import recipe as recipes
from posttrain.recipe import Recipe, RecipeError, RewardSection

WRONG, FAILED, STOPPED = 2, 1, 130

# What a launcher tells its processes; a stage started from one of them must not join their group.
_LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    environment.prepare()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if wrong or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:  # overrides that came after an option
        options.overrides = [*options.overrides, *rest]
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return STOPPED
    except (ValueError, RuntimeError) as error:
        if type(error).__module__.partition(".")[0] not in ("posttrain", "rewards"):
            raise
        print(f"posttrain: {error}", file=sys.stderr)
        return WRONG if isinstance(error, ValueError) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="posttrain", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for stage, text in (
        ("sft", "supervised fine-tuning"),
        ("grpo", "GRPO with vLLM rollouts, after the SFT stage if the recipe has one"),
    ):
        command = commands.add_parser(stage, help=text, description=text, allow_abbrev=False)
        command.add_argument("recipe", type=Path, metavar="RECIPE")
        _add_overrides(command)
        command.add_argument(
            "--resume", action="store_true", help="continue from the newest step checkpoint"
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="check the recipe, its data and its memory; train nothing",
        )
        command.set_defaults(run=_train, stage=stage)
    command = commands.add_parser(
        "eval", help="score a checkpoint by generation", allow_abbrev=False
    )
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    command.add_argument("--recipe", type=Path, help="default: recipe.yaml beside the checkpoint")
    _add_overrides(command)
    command.set_defaults(run=_evaluate)
    _add_rewards(commands)
    command = commands.add_parser(
        "mismatch",
        help="split what engine and trainer differ by into precision and routing",
        allow_abbrev=False,
    )
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    command.add_argument(
        "--recipe",
        type=Path,
        help="default: recipe.yaml beside the checkpoint; without any, prompts are random tokens",
    )
    command.add_argument("--prompts", type=int, default=64, help="how many (default: 64)")
    for side, names in (
        ("engine", ("float32", "bfloat16", "float16")),
        ("trainer", ("float32", "bfloat16")),
    ):
        command.add_argument(f"--{side}-dtype", choices=names, help="default: the recipe's")
    _add_overrides(command)
    command.set_defaults(run=_mismatch)
    command = commands.add_parser(
        "doctor", help="say what this machine has, and check engine against trainer"
    )
    command.set_defaults(run=_doctor)
    return parser


def _add_rewards(commands: Any) -> None:
    parts = commands.add_parser("rewards", help="look at reward functions").add_subparsers(
        required=True, metavar="COMMAND"
    )
    text = (
        "score the gold answers of a data set: each must get the top score, else the exit code is 1"
    )
    command = parts.add_parser("check", help=text, description=text, allow_abbrev=False)
    command.add_argument(
        "spec", metavar="SPEC", help="a built-in name, module:function or file.py:function"
    )
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help=".jsonl, .json, .csv, .parquet, .py",
    )
    command.add_argument(
        "--completion", metavar="TEMPLATE", help="what a policy would write: '\\boxed{{{answer}}}'"
    )
    command.add_argument(
        "--answer", metavar="TEMPLATE", help="what it is compared with: '{solution}'"
    )
    command.add_argument(
        "--tokenizer", help="for rewards that count tokens: a folder or a hub name"
    )
    command.add_argument("--seconds", type=float, help="the time limit of one sample")
    _add_overrides(command, "options of the reward: fallback=last_number")
    command.set_defaults(run=_check_reward)


def _add_overrides(
    command: argparse.ArgumentParser,
    text: str = "over the recipe's fields: grpo.learning_rate=1e-6",
) -> None:
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=text,
    )


def _train(options: argparse.Namespace) -> int:
    recipe = recipes.load(options.recipe, options.overrides)
    if getattr(recipe, options.stage) is None:
        raise RecipeError(f"{options.recipe}: the recipe has no section `{options.stage}`")
    if options.dry_run:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from posttrain import dryrun

        text = dryrun.run(recipe, options.stage)
        _say(f"dry run of {options.recipe}\n{text}")
        return 0
    from posttrain import preflight

    first = options.stage == "grpo" and recipe.sft is not None
    preflight.check(recipe, ["sft", "grpo"] if first else [options.stage]).raise_faults()
    resume = options.resume
    sft = recipe.run_dir("sft") / "checkpoint"
    if first and (sft / "config.json").exists():
        _check_sft(recipe, sft)
    elif first:
        code = _sft_first(options, recipe, sft)
        if code:
            return code
        resume = False  # it was the SFT stage that there was to resume
    stage = importlib.import_module(f"posttrain.training.{options.stage}")
    summary = stage.run(recipe, resume=resume)
    if summary.get("status") == "interrupted":
        _say(
            f"stopped after {summary.get('steps')} steps; go on with: {_command(options)} --resume"
        )
        return STOPPED
    before = _read_json(recipe.run_dir("sft") / "summary.json") if options.stage == "grpo" else None
    _say(report.training(summary, recipe.run_dir(options.stage), before))
    return 0


def _check_sft(recipe: Recipe, checkpoint: Path) -> None:
    """Raise RecipeError if the SFT checkpoint was made with settings that are not the recipe's."""
    file = checkpoint.with_name("recipe.yaml")
    if not file.exists():
        return
    made = recipes.load(file)
    pairs = {
        "policy": (made.policy, recipe.policy),
        "data.sft": (made.data.sft, recipe.data.sft),
        "sft": (made.sft, recipe.sft),
        "seed": (made.seed, recipe.seed),
    }
    other = [name for name, (before, now) in pairs.items() if before != now]
    if other:
        raise RecipeError(
            f"{checkpoint}: made with another {', '.join(other)} (see {file}); give output_root or name for a run "
            "beside it, run the SFT stage anew, or start from this checkpoint as it is with "
            f"policy.path={checkpoint} policy.config=null sft=null"
        )
    _say(f"{recipe.name}: starts from the SFT checkpoint at {checkpoint}")


def _sft_first(options: argparse.Namespace, recipe: Recipe, checkpoint: Path) -> int:
    """Run the SFT stage, whose checkpoint is missing, in processes of its own; return its exit code.

    Of several processes on one machine the first starts as many for the SFT stage, while the others wait.
    """
    processes, here = (
        int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    if processes > here:
        raise RecipeError(
            f"{options.recipe}: there is no SFT checkpoint at {checkpoint}; on several machines run that stage "
            f"first, with the same launcher: {_command(options).replace(' grpo ', ' sft ', 1)}"
        )
    # The launcher is the parent of every process here, and of no other run's.
    done = Path(tempfile.gettempdir()) / f"posttrain-sft-{os.getppid()}"
    if not _is_main():
        while not done.exists():
            time.sleep(0.5)
        return int(done.read_text(encoding="utf-8"))
    _say(f"{recipe.name}: no SFT checkpoint at {checkpoint} yet, so the SFT stage runs first")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "posttrain", "sft"]
    command += [str(options.recipe), *options.overrides]
    if (recipe.run_dir("sft") / "steps").exists() and options.resume:
        command.append("--resume")
    inherited = {
        name: text
        for name, text in os.environ.items()
        if name not in _LAUNCHED and not name.startswith(("MASTER_", "TORCHELASTIC_"))
    }
    # By default torch's launcher kills after 30 s what is still saving.
    inherited.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1800")
    done.unlink(missing_ok=True)
    code = _run(command, inherited)
    if processes > 1:
        partial = done.with_suffix(".partial")
        partial.write_text(str(code), encoding="utf-8")
        partial.replace(done)
    if code:
        print(f"posttrain: the SFT stage ended with exit code {code}", file=sys.stderr)
    return code


def _run(command: list[str], env: dict[str, str]) -> int:
    """Run a command to its end, also when this process is told to stop: the command then saves and ends itself.

    An interrupt from the keyboard reaches it without help, a SIGTERM is handed on.
    """
    child = subprocess.Popen(command, env=env)
    handlers = {
        signal.SIGINT: lambda number, frame: None,
        signal.SIGTERM: lambda number, frame: child.send_signal(number),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return STOPPED if code < 0 else code


def _evaluate(options: argparse.Namespace) -> int:
    if not (options.checkpoint / "config.json").is_file():
        raise RecipeError(f"{options.checkpoint}: there is no checkpoint here (no config.json)")
    path = options.recipe or options.checkpoint.resolve().parent / "recipe.yaml"
    if not path.exists():
        raise RecipeError(
            f"{path}: there is no recipe here; name the one to score by with --recipe"
        )
    recipe = recipes.load(path, options.overrides)
    from posttrain import evaluate

    summary = evaluate.run(checkpoint=options.checkpoint, recipe=recipe)
    _say(report.evaluation(summary, options.checkpoint))
    return 0


def _check_reward(options: argparse.Namespace) -> int:
    from posttrain import gold

    reward = RewardSection(
        options.spec, options=recipes.key_values(options.overrides), seconds=options.seconds
    )
    text, right = gold.check(
        reward, options.data, options.completion, options.answer, options.tokenizer
    )
    _say(text)
    return 0 if right else FAILED


def _mismatch(options: argparse.Namespace) -> int:
    if not (options.checkpoint / "config.json").is_file():
        raise RecipeError(f"{options.checkpoint}: there is no checkpoint here (no config.json)")
    if options.prompts < 1:
        raise RecipeError(f"--prompts: must be at least 1, got {options.prompts}")
    path = options.recipe or options.checkpoint.resolve().parent / "recipe.yaml"
    recipe = None
    if options.recipe or path.exists():
        recipe = recipes.load(path, options.overrides)
    elif options.overrides:
        raise RecipeError(f"{path}: there is no recipe here to override; name one with --recipe")
    from posttrain.mismatch import measure

    summary = measure.run(
        options.checkpoint,
        recipe,
        prompts=options.prompts,
        engine_dtype=options.engine_dtype,
        trainer_dtype=options.trainer_dtype,
    )
    _say(report.mismatch(summary))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from posttrain import doctor

    return int(doctor.run())


def _command(options: argparse.Namespace) -> str:
    return " ".join(["posttrain", options.stage, str(options.recipe), *options.overrides])


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    if _is_main():
        print(text, flush=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
