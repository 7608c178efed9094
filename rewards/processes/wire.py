"""Frames between trainer and worker: eight bytes of length, then the payload.

Requests are pickles, made by the trainer out of its own data. Replies are JSON: what comes back from
a process that read hostile text is never unpickled.
"""

import json
import struct
from typing import Any, BinaryIO

HEADER = struct.Struct(">Q")


def frame(payload: bytes) -> bytes:
    """The payload with its length in front."""
    return HEADER.pack(len(payload)) + payload


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next payload; None when the stream has ended."""
    head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    (size,) = HEADER.unpack(head)
    payload = stream.read(size)
    return payload if len(payload) == size else None


def plain(value: Any) -> Any:
    """`value` as JSON can carry it: numpy and tensor scalars and arrays as numbers, else its text."""
    try:
        return json.loads(json.dumps(value, default=_converted))
    except (TypeError, ValueError, RecursionError):
        return repr(value)


def _converted(value: Any) -> Any:
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else str(value)
