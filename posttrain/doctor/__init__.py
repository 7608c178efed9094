"""What this machine has, what will be slow on it, what is wrong with it; and the engine against the trainer.

`machine` looks, `findings` judges, `trial` runs a tiny random policy through vLLM and through the trainer's code.
"""

from posttrain import environment, report
from posttrain.doctor.findings import CORE, findings
from posttrain.doctor.machine import Machine
from posttrain.doctor.trial import trial_run


def run() -> int:
    """Print the report; 0 when nothing is wrong, 1 otherwise."""
    environment.prepare()
    machine = Machine.look()
    print(report.table("this machine", overview(machine)), flush=True)
    found = list(findings(machine))
    rows, failures = trial_run()
    if rows:
        print(report.table("engine against trainer, a tiny random policy", rows))
    found += failures
    for kind, title in (("note", "worth knowing"), ("slow", "slow here"), ("wrong", "wrong")):
        shown = [finding for finding in found if finding.kind == kind]
        for finding in shown:
            if finding is shown[0]:
                print(title)
            print(f"  - {finding.what}")
            if finding.remedy:
                print(f"    remedy: {finding.remedy}")
    wrong = sum(finding.kind == "wrong" for finding in found)
    print(f"{wrong} wrong" if wrong else "nothing is wrong")
    return 1 if wrong else 0


def overview(machine: Machine) -> list[tuple[str, str]]:
    """Rows for the table on top of the report."""
    packages = machine.packages
    threads = machine.environ.get("OMP_NUM_THREADS", str(machine.cores))
    on_cpu = "vllm" not in packages
    known = [f"{name} {packages[name]}" for name in CORE if name in packages]
    return [
        ("device", "; ".join(machine.gpus) or f"CPU, {machine.processor}"),
        ("cores", f"{machine.cores}, {threads} threads for torch and vLLM"),
        ("instructions", ", ".join(sorted(machine.instructions)) or "no vector extension known"),
        ("memory", f"{machine.memory_gib:.1f} GiB, {machine.free_gib:.1f} free"),
        ("shared memory", f"{machine.shm_gib:.1f} GiB free in /dev/shm"),
        ("python", machine.python),
        ("versions", ", ".join(known)),
        ("vLLM runs on", "the CPU, eagerly" if on_cpu else "CUDA (this path has not been run yet)"),
    ]
