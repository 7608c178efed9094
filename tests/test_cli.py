"""The command: exit codes, messages without tracebacks, the SFT stage before GRPO, the closing tables."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from posttrain import cli, environment
from posttrain import recipe as recipes
from posttrain.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """\
policy: {config: {hidden_size: 32}, tokenizer: owner/tokenizer}
data:
  sft: {path: rows.jsonl}
  train: {path: rows.jsonl}
  eval: {path: rows.jsonl}
sft: {learning_rate: 1e-4}
grpo: {num_generations: 4, max_completion_length: 64}
rewards: [{name: format}]
eval: {count: 1}
"""
SUMMARY = {
    "stage": "grpo",
    "recipe": "tiny",
    "status": "complete",
    "steps": 12,
    "wall_seconds": 75.2,
    "eval": {"before": {"accuracy": 0.5}, "after": {"accuracy": 0.925}, "count": 500},
    "parity": {"max_abs_logprob_diff": 2.5e-6},
    "rollout": {"tokens_per_second": 4100.4},
    "train": {"tokens_per_second": 9000.0},
    "peak_rss_gib": 2.25,
    "mtp": {"acceptance": 0.97},
    "moe": {"max_violation": 0.51},
}


class Stages:
    """Stands in for the stages: records each call, returns `summary` or raises `error`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Recipe, bool]] = []
        self.summary: dict[str, Any] = SUMMARY
        self.error: Exception | None = None

    def module(self, stage: str) -> types.ModuleType:
        def run(recipe: Recipe, resume: bool) -> dict[str, Any]:
            self.calls.append((stage, recipe, resume))
            if self.error is not None:
                raise self.error
            return self.summary

        module = types.ModuleType(stage)
        module.run = run  # type: ignore[attr-defined]
        return module


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    stages = Stages()
    for stage in ("sft", "grpo"):
        monkeypatch.setitem(sys.modules, f"posttrain.training.{stage}", stages.module(stage))
    return stages


def sft_done() -> None:
    folder = Path("runs/tiny/sft/checkpoint")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder.parent / "summary.json").write_text(json.dumps({"eval": {"after": {"accuracy": 0.5}}}))


def test_grpo_ends_with_a_table(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    sft_done()
    Path("runs/tiny/grpo").mkdir()
    Path("runs/tiny/grpo/metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "reward": i / 7}) + "\n" for i in range(8)) + '{"step": 9}\n'
    )
    assert cli.main(["grpo", "tiny.yaml", "--resume", "grpo.beta=0.1"]) == 0
    [(stage, recipe, resume)] = stages.calls
    assert (stage, resume) == ("grpo", True)
    assert recipe.grpo is not None
    assert recipe.grpo["beta"] == 0.1
    assert capsys.readouterr().out == (
        "tiny: grpo complete, 12 steps, 1 min 15 s\n"
        "  after SFT       50.0%\n"
        "  accuracy        50.0% -> 92.5%  (500 held-out problems)\n"
        "  reward          ▁▂▃▄▅▆▇█  0.000 -> 1.000\n"
        "  tokens/s        rollouts 4,100, training 9,000\n"
        "  MTP acceptance  0.970\n"
        "  load violation  0.51\n"
        "  parity          2.5e-06 nats at most\n"
        "  peak memory     2.2 GiB\n"
        "  checkpoint      runs/tiny/grpo/checkpoint\n"
        f"  serve it        {environment.serve_command('runs/tiny/grpo/checkpoint')}\n"
        '  load it         AutoModelForCausalLM.from_pretrained("runs/tiny/grpo/checkpoint")\n'
    )


def test_sft_runs_first_with_the_same_overrides(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def run(command: list[str], env: dict[str, str]) -> int:
        assert len(stages.calls) == len(started), "GRPO began before its SFT stage"
        started.append(command)
        return 0

    monkeypatch.setattr(cli, "_run", run)
    Path("runs/tiny/sft/steps").mkdir(parents=True)
    assert cli.main(["grpo", "tiny.yaml", "seed=3"]) == 0
    sft = [sys.executable, "-m", "posttrain", "sft", "tiny.yaml", "seed=3"]
    assert started == [sft]
    assert "no SFT checkpoint at runs/tiny/sft/checkpoint yet" in capsys.readouterr().out
    # What is resumed is the stage that was stopped; the one after it begins.
    assert cli.main(["grpo", "tiny.yaml", "seed=3", "--resume"]) == 0
    assert started[1] == [*sft, "--resume"]
    assert [(call[0], call[2]) for call in stages.calls] == [("grpo", False), ("grpo", False)]


def test_faults_of_all_data_are_told_before_a_stage_begins(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing column for SFT, no row for GRPO, too few for the evaluation: one message."""
    Path("bare.jsonl").write_text('{"prompt": "p"}\n')
    Path("empty.jsonl").write_text("")
    sft_done()
    overrides = ["data.sft.path=bare.jsonl", "data.train.path=empty.jsonl", "eval.count=2"]
    assert cli.main(["grpo", "tiny.yaml", *overrides]) == 2
    told = capsys.readouterr().err
    assert "data.sft: " in told
    assert "empty.jsonl has no rows" in told
    assert "eval.count 2 is more than its 1 rows" in told
    assert stages.calls == []


def test_an_sft_checkpoint_of_other_settings_is_not_taken(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    sft_done()
    recipes.load("tiny.yaml").dump("runs/tiny/sft/recipe.yaml")
    assert cli.main(["grpo", "tiny.yaml", "grpo.beta=0.1"]) == 0
    assert "starts from the SFT checkpoint at runs/tiny/sft/checkpoint" in capsys.readouterr().out
    assert cli.main(["grpo", "tiny.yaml", "seed=7", "sft.max_steps=3"]) == 2
    told = capsys.readouterr().err
    assert "runs/tiny/sft/checkpoint: made with another sft, seed" in told
    assert "policy.path=runs/tiny/sft/checkpoint policy.config=null sft=null" in told
    assert len(stages.calls) == 1


def test_the_child_is_this_very_command(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """For real: the child finds the broken recipe, and its exit code comes back."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    real = cli._run

    def run(command: list[str], env: dict[str, str]) -> int:
        Path("rows.jsonl").unlink()  # the parent has already checked that it exists
        return real(command, env)

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["grpo", "tiny.yaml"]) == cli.WRONG
    assert stages.calls == []
    err = capfd.readouterr().err
    assert "there is no file rows.jsonl" in err
    assert "the SFT stage ended with exit code 2" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_is_told_to_stop_ends_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The parent of a stage lives on until the stage has saved; SIGTERM reaches it, SIGINT comes from the keyboard."""
    code = (
        "import os, signal, sys, time\n"
        "def stop(*_):\n    time.sleep(1)\n    open('saved', 'w').close()\n    sys.exit(130)\n"
        f"signal.signal({int(number)}, stop)\n"
        f"os.kill(os.getppid(), {int(number)})\n"
        f"{'' if number == signal.SIGTERM else f'os.kill(os.getpid(), {int(number)})'}\n"
        "time.sleep(30)\n"
    )
    (tmp_path / "child.py").write_text(code)
    before = signal.getsignal(number)
    monkeypatch.chdir(tmp_path)
    assert cli._run([sys.executable, "child.py"], dict(os.environ)) == cli.STOPPED
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(number) == before


def test_several_processes_start_as_many_for_sft(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("FSDP_VERSION", "2")
    seen: dict[str, Any] = {}

    def run(command: list[str], env: dict[str, str]) -> int:
        seen.update(command=command, env=env)
        return 0

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["grpo", "tiny.yaml"]) == 0
    assert seen["command"][1:6] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
    ]  # fmt: skip
    assert not {"RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"} & seen["env"].keys()
    assert seen["env"]["FSDP_VERSION"] == "2"
    # The other process goes on with the first one's exit code, and starts nothing.
    monkeypatch.setenv("RANK", "1")
    seen.clear()
    assert cli.main(["grpo", "tiny.yaml"]) == 0
    assert seen == {}
    (tmp_path / f"posttrain-sft-{os.getppid()}").write_text("2")
    assert cli.main(["grpo", "tiny.yaml"]) == 2


def test_several_machines_are_told_what_to_run(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cli.main(["grpo", "tiny.yaml", "seed=1"]) == 2
    assert "posttrain sft tiny.yaml seed=1" in capsys.readouterr().err


def test_only_the_main_process_speaks(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sft_done()
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["grpo", "tiny.yaml"]) == 0
    assert capsys.readouterr().out == ""


def test_stopped_runs_say_how_to_go_on(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    stages.summary = {"status": "interrupted", "steps": 5}
    assert cli.main(["sft", "tiny.yaml", "seed=1"]) == cli.STOPPED
    assert "go on with: posttrain sft tiny.yaml seed=1 --resume" in capsys.readouterr().out


def error_of(module: str, base: type[Exception]) -> Exception:
    return type("SomeError", (base,), {"__module__": module})("what is wrong")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (error_of("posttrain.tasks", ValueError), cli.WRONG),
        (error_of("rewards.errors", ValueError), cli.WRONG),
        (error_of("posttrain.rollout.parity", RuntimeError), cli.FAILED),
    ],
)
def test_our_errors_are_one_message(
    stages: Stages, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    stages.error = error
    assert cli.main(["sft", "tiny.yaml"]) == code
    assert capsys.readouterr().err == "posttrain: what is wrong\n"


def test_other_errors_keep_their_traceback(stages: Stages) -> None:
    stages.error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["sft", "tiny.yaml"])


def test_eval(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(checkpoint: Path, recipe: Recipe) -> dict[str, Any]:
        assert recipe.eval.max_tokens == 9
        return {"accuracy": 0.5, "count": 2, "mtp": {"acceptance": 0.98765}, "none": None}

    evaluate = types.ModuleType("posttrain.evaluate")
    evaluate.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "posttrain.evaluate", evaluate)
    monkeypatch.setattr("posttrain.evaluate", evaluate, raising=False)
    sft_done()
    Path("runs/tiny/sft/recipe.yaml").write_text(RECIPE)
    assert cli.main(["eval", "runs/tiny/sft/checkpoint", "eval.max_tokens=9"]) == 0
    assert capsys.readouterr().out == (
        "runs/tiny/sft/checkpoint\n  accuracy        50.0%\n  count           2\n  mtp.acceptance  0.9877\n"
    )
    assert cli.main(["eval", "nowhere", "--recipe", "tiny.yaml"]) == 2
    assert "nowhere: there is no checkpoint here" in capsys.readouterr().err
    Path("runs/tiny/sft/recipe.yaml").unlink()
    assert cli.main(["eval", "runs/tiny/sft/checkpoint"]) == 2
    assert "name the one to score by with --recipe" in capsys.readouterr().err


def test_a_stage_that_the_recipe_lacks(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["grpo", "tiny.yaml", "grpo=null"]) == 2
    assert "the recipe has no section `grpo`" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["grpo"], ["grpo", "r.yaml", "--resum"], ["walk"],
                                       ["doctor", "a=b"], ["grpo", "r.yaml", "--resume", "word"]])  # fmt: skip
def test_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_faults_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(RECIPE.replace("grpo: {", "grpo: {learing_rate: 1, "))
    code = (
        "import sys\nfrom posttrain.cli import main\ncode = main(['grpo', 'bad.yaml'])\n"
        "heavy = {'torch', 'transformers', 'trl', 'vllm', 'datasets'} & sys.modules.keys()\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert (
        "bad.yaml:7: grpo.learing_rate: unknown field; did you mean 'learning_rate'?" in done.stderr
    )
    assert done.stderr.count("there is no file rows.jsonl") == 3
