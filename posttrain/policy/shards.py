"""Safetensors files of a checkpoint: what is in them, one tensor at a time, and how to write them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
FP8 = "F8_E4M3"
FLOATS = ("F64", "F32", "F16", "BF16")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as it is; says file, tensor, rule and remedy."""


def listed(names: Iterable[str], bound: int = 8) -> str:
    """Join names, at most `bound` of them.

    >>> listed(["b", "a", "c"], bound=2)
    'a, b and 1 more'
    """
    ordered = sorted(names)
    more = len(ordered) - bound
    return ", ".join(ordered[:bound]) + (f" and {more} more" if more > 0 else "")


def read_json(file: Path) -> dict:
    """Read a JSON object; CheckpointError when the file is missing, damaged or no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: not found. A checkpoint folder holds config.json beside its safetensors "
            "files; give the folder itself, or fetch the file again"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds no JSON object; fetch it again")
    return content


def _weight_map(file: Path) -> dict[str, str]:
    """Read which file of the same folder holds which tensor."""
    content = read_json(file).get("weight_map")
    if not content or not isinstance(content, dict):
        raise CheckpointError(f"{file}: weight_map is missing or empty; fetch the index again")
    for name, shard in content.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{file}: weight_map puts {name} into {shard!r}, must be the name of a file beside "
                "the index; fetch the index again"
            )
    return content


@dataclass(frozen=True)
class Header:
    """Where a tensor lies, and what a file's header says of it (`dtype` in safetensors' words)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Shards:
    """The tensors of a checkpoint folder by name; headers are read at once, contents on demand.

    Raises CheckpointError for a missing shard, a truncated or damaged file, a tensor that the
    index promises and no file holds, and a tensor that two files hold.
    """

    def __init__(self, folder: Path) -> None:
        self.headers: dict[str, Header] = {}
        self._file: Path | None = None
        promised: dict[str, str] = {}
        if (folder / INDEX).is_file():
            promised = _weight_map(folder / INDEX)
            files = [folder / name for name in sorted(set(promised.values()))]
        elif (folder / SINGLE).is_file():
            files = [folder / SINGLE]
        else:
            raise CheckpointError(
                f"{folder}: holds neither {SINGLE} nor {INDEX}. Only safetensors are read; "
                "convert other formats with transformers' save_pretrained"
            )
        if absent := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(
                f"{folder}: shards named in {INDEX} are missing: {listed(absent)}; fetch them"
            )
        for file in files:
            self._add(file)
        if lost := [name for name in promised if name not in self.headers]:
            raise CheckpointError(
                f"{folder}: {INDEX} promises tensors that no file holds: {listed(lost)}; "
                "fetch index and shards again, from one revision"
            )

    def _add(self, file: Path) -> None:
        try:
            shard = safe_open(str(file), "pt")
            parts = [(name, shard.get_slice(name)) for name in shard.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: truncated or damaged ({error}); fetch it again"
            ) from error
        for name, part in parts:
            if name in self.headers:
                raise CheckpointError(
                    f"{name}: in {self.headers[name].file.name} and again in {file}; "
                    "remove the shard that belongs to another checkpoint"
                )
            self.headers[name] = Header(file, tuple(part.get_shape()), part.get_dtype())

    def read(self, name: str) -> Tensor:
        """Return one tensor as its file has it, mapped into memory rather than copied if possible.

        One file is open at a time, so that no more than one is mapped: read file by file.
        """
        file = self.headers[name].file
        if file != self._file:
            self._file, self._shard = file, safe_open(str(file), "pt")
        return self._shard.get_tensor(name)


class ShardWriter:
    """Writes tensors in the order in which they come, a file of at most `max_bytes` at a time.

    One shard is held in host memory. `close` gives the files their final names, and writes the
    index where there is more than one.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._buffer: dict[str, Tensor] = {}
        self._bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0
        probe = folder / "part.probe"
        probe.touch()
        self._mode = probe.stat().st_mode & 0o777
        probe.unlink()

    def add(self, name: str, tensor: Tensor) -> None:
        """Copy one tensor; flush first when the shard would pass its size."""
        size = tensor.numel() * tensor.element_size()
        if self._buffer and self._bytes + size > self._max_bytes:
            self._flush()
        self._buffer[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        self._bytes += size
        self._total += size

    def _file(self, index: int) -> Path:
        return self._folder / f"part-{index}.safetensors"

    def _flush(self) -> None:
        # transformers refuses files whose metadata does not name the framework.
        file = self._file(len(self._shards))
        save_file(self._buffer, file, metadata={"format": "pt"})
        # safetensors lets only the owner read; an ordinary new file follows the user's umask.
        file.chmod(self._mode)
        self._shards.append(list(self._buffer))
        self._buffer, self._bytes = {}, 0

    def close(self) -> None:
        """Write what is left, name the files, write the index."""
        if self._buffer:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._file(0).rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            file = SHARD.format(index + 1, count)
            self._file(index).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        content = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
