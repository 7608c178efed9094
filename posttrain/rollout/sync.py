"""Send the trainer's weights to the engine, layer by layer, and prove that they arrived.

The stream is checked while it passes (names, shapes, finite values, one checksum a tensor), and the
engine's memory is read back afterwards: the checksum of every copy that a forward pass may read must be
that of the tensor sent. Router biases and the drafter's MTP modules are part of it.
"""

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.rollout.readback import checksum

LAYER = re.compile(r"model\.layers\.(\d+)\.")


class SyncError(RuntimeError):
    """The engine does not hold what the trainer sent."""


@dataclass(frozen=True)
class SyncReport:
    """What one sync did. Times in seconds; `unused` tensors are MTP modules without a drafter."""

    tensors: int
    parameters: int
    unused: int
    load_seconds: float
    verify_seconds: float

    @property
    def seconds(self) -> float:
        """Whole time of the sync."""
        return self.load_seconds + self.verify_seconds


class Link:
    """The way of the weights into one engine; remembers what it must hold.

    llm: vLLM's `LLM` with `PolicyWorker` as worker extension. trunk_layers: number of layers of the
    model itself; tensors of later layers are MTP modules, unused by an engine that does not draft.
    """

    def __init__(self, llm: Any, trunk_layers: int) -> None:
        self.llm = llm
        self.trunk_layers = trunk_layers
        self.layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = self._call("policy_layout")
        self.sent: dict[str, int] = {}

    @torch.no_grad()
    def sync(self, named_tensors: Iterable[tuple[str, Tensor]]) -> SyncReport:
        """Load a stream of (checkpoint name, tensor) and verify it.

        Every process that owns a part of the weights must iterate the stream. Raises SyncError
        naming the tensors that are missing, unknown, misshapen, not finite, or held otherwise
        than sent; the engine must not be used then until a sync has passed.
        """
        start = time.perf_counter()
        stream = iter(named_tensors)
        self.sent = {}
        sums: list[tuple[str, Tensor]] = []
        unused: list[str] = []
        parameters = 0
        self._call("policy_load_begin")
        try:
            for layer in self._by_layer(stream, unused):
                sums.extend((name, checksum(tensor)) for name, tensor in layer)
                parameters += sum(tensor.numel() for _, tensor in layer)
                self._call("policy_load", layer)
        finally:
            self._call("policy_load_end")
            for _ in stream:  # after a failure the other processes still gather: do not leave them
                pass
        self.sent = dict(zip((n for n, _ in sums), _values([s for _, s in sums]), strict=True))
        self._complete(sums)
        loaded = time.perf_counter()
        self.verify()
        if not self.llm.reset_prefix_cache():
            raise SyncError(
                "the prefix cache still serves requests computed with the old weights; "
                "remedy: finish or abort every request before a sync"
            )
        ended = time.perf_counter()
        return SyncReport(len(sums), parameters, len(unused), loaded - start, ended - loaded)

    def verify(self) -> None:
        """Compare the engine's memory with the last stream; raises SyncError naming tensors."""
        wrong = []
        for name, value in self._call("policy_checksums"):
            if self.sent.get(name) != value and name not in wrong:
                wrong.append(name)
        if wrong:
            raise SyncError(
                f"the engine holds other values than were sent in {_some(wrong)} "
                f"(of {len(self.layout)} tensors); remedy: sync again, and if it happens again run "
                "`posttrain doctor`: vLLM may keep weights in a way that is not known here"
            )

    def _by_layer(
        self, stream: Iterator[tuple[str, Tensor]], unused: list[str]
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Group the stream by layer; yields each group's tensors in the engine's types."""
        group: list[tuple[str, Tensor]] = []
        current: str | None = None
        for name, tensor in stream:
            place = LAYER.match(name)
            if name not in self.layout and place and int(place[1]) >= self.trunk_layers:
                unused.append(name)
                continue
            layer = place[1] if place else None
            if group and layer != current:
                yield group
                group = []
            current = layer
            group.append((name, self._checked(name, tensor)))
        if group:
            yield group

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.layout:
            raise SyncError(
                f"{name}: sent, but the engine has no such tensor; remedy: start the engine on a "
                "checkpoint of this policy, and send checkpoint names (one tensor per expert)"
            )
        shape, dtype = self.layout[name]
        if tuple(tensor.shape) != shape:
            raise SyncError(f"{name}: sent as {tuple(tensor.shape)}, the engine holds {shape}")
        tensor = tensor.detach().to(dtype)
        if not tensor.isfinite().all():
            raise SyncError(f"{name}: has values that are not finite; the training has diverged")
        return tensor

    def _complete(self, sums: list[tuple[str, Tensor]]) -> None:
        if missing := [name for name in self.layout if name not in self.sent]:
            raise SyncError(f"the engine holds tensors that were not sent: {_some(missing)}")
        if len(sums) != len(self.sent):
            seen: set[str] = set()
            twice = [n for n, _ in sums if n in seen or seen.add(n)]  # type: ignore[func-returns-value]
            raise SyncError(f"sent more than once: {_some(twice)}")

    def _call(self, method: str, *args: Any) -> Any:
        return self.llm.collective_rpc(method, args=args)[0]


def _values(sums: list[Tensor]) -> list[int]:
    return torch.stack(sums).tolist() if sums else []


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
