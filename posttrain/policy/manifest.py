"""What a checkpoint's files must hold for a model, checked on their headers alone.

N trunk layers; MTP modules are layers N, N+1, ...
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import DeepseekV3Config

from posttrain.policy.fp8 import SCALE, scale_shape
from posttrain.policy.layout import EMBEDDING, HEAD, layer_name, mtp_copies
from posttrain.policy.shards import FLOATS, FP8, CheckpointError, Header, Shards, listed


@dataclass(frozen=True)
class Manifest:
    """Which tensors of the files fill the model, and which only repeat one of those.

    fills: released names; each fills its own place. copies: name -> name of the tensor it repeats.
    """

    fills: list[str]
    copies: dict[str, str]


def depth_in(shards: Shards, num_hidden_layers: int) -> int:
    """Count the MTP modules in the files, from layer N on without a gap."""
    depth = 0
    while any(name.startswith(layer_name(num_hidden_layers + depth)) for name in shards.headers):
        depth += 1
    return depth


def _fault(
    name: str, shape: tuple[int, ...], shards: Shards, block: tuple[int, int]
) -> tuple[str, str] | None:
    """Return what is wrong with one tensor as (kind, words), or None."""
    header = shards.headers[name]
    where = f"{name} in {header.file.name}"
    if header.shape != shape:
        return "wrong shape", f"{where} is {header.shape}, must be {shape}"
    if header.dtype in FLOATS:
        return None
    scale: Header | None = shards.headers.get(name + SCALE)
    if header.dtype != FP8 or len(shape) != 2:
        return "wrong type", f"{where} is {header.dtype}"
    if scale is None:
        return "missing", f"{name}{SCALE}"
    blocks = scale_shape(header.shape, block)
    if scale.shape != blocks or scale.dtype not in FLOATS:
        words = f"{name}{SCALE} is {scale.dtype} {scale.shape}, must be float {blocks}"
        return "wrong shape", words
    return None


REMEDIES = {
    "missing": "fetch the missing files, or correct config.json",
    "unexpected": "correct config.json (num_hidden_layers, num_nextn_predict_layers, "
    "n_routed_experts ...), or load a checkpoint of this architecture",
    "wrong shape": "correct the sizes in config.json (block sizes under quantization_config)",
    "wrong type": "only floating point, and FP8 with block scales, are read; take the "
    "unquantised checkpoint",
}


def match(
    folder: Path,
    config: DeepseekV3Config,
    shapes: dict[str, tuple[int, ...]],
    shards: Shards,
    block: tuple[int, int],
    leave_out: bool,
) -> Manifest:
    """Match the files with a model's released tensors and their shapes.

    MTP modules that the model has and the files do not are nobody's fault here; those that only
    the files have are left out with `leave_out`, and unexpected without. `block`: of FP8 weights.
    Raises one CheckpointError that names all missing, unexpected, misshapen and mistyped tensors.
    """
    last = config.num_hidden_layers
    found, depth = depth_in(shards, last), config.num_nextn_predict_layers
    absent = tuple(layer_name(last + k) for k in range(found, depth))
    extra = tuple(layer_name(last + k) for k in range(depth, found)) if leave_out else ()
    copies: dict[str, str] = {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
    for k in range(min(found, depth)):
        copies |= mtp_copies(last + k)
    fills = [name for name in shapes if not name.startswith(absent) and name not in copies]
    copies = {name: original for name, original in copies.items() if name in shards.headers}

    faults: dict[str, list[str]] = {kind: [] for kind in REMEDIES}
    used: set[str] = set()
    for name in [*fills, *copies]:
        if name not in shards.headers:
            faults["missing"].append(name)
            continue
        used |= {name, name + SCALE} if shards.headers[name].dtype == FP8 else {name}
        if fault := _fault(name, shapes[copies.get(name, name)], shards, block):
            faults[fault[0]].append(fault[1])
    faults["unexpected"] = [
        name
        for name in shards.headers
        if name not in used and not name.startswith(extra) and not name.endswith(".inv_freq")
    ]
    lines = [
        f"{len(words)} {kind}: {listed(words)}; {REMEDIES[kind]}"
        for kind, words in faults.items()
        if words
    ]
    if lines:
        raise CheckpointError("\n  ".join([f"{folder}: does not fit its config.json", *lines]))
    return Manifest(fills, copies)
