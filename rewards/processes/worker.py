"""The process that runs a reward: a function loaded once, then one reply for each request.

Run by path, as a fresh interpreter. Its first line of input is the trainer's module path, the first
frame names the function. The trainer may kill it at any moment; it ends itself when its input ends,
when the trainer is gone, and when a request takes more processor time than allowed.
"""

import json
import os
import pickle
import signal
import sys
import threading
import time
from typing import Any, BinaryIO

SPARE_SECONDS = 2.0
LOOK_SECONDS = 1.0


def main() -> None:
    """Answer requests until the input ends."""
    # The function's own prints go to the error output, and it reads nothing.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _be_killed_first()
    sys.path[:] = json.loads(requests.readline())
    serve(requests, replies)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Load the function that the first frame names, then score batch after batch."""
    # Only now is the path set on which these are found.
    from rewards.processes.calls import Calls
    from rewards.processes.wire import frame, read_frame

    def reply(message: dict[str, Any]) -> None:
        replies.write(frame(json.dumps(message).encode()))
        replies.flush()

    hello = read_frame(requests)
    if hello is None:
        return
    try:
        calls = Calls(*pickle.loads(hello))
    except BaseException as error:
        reply({"failed": str(error) or type(error).__name__})
        return
    # With no handler the timer's signal ends the process even inside a long C call.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    reply({"ready": True})
    while (request := read_frame(requests)) is not None:
        seconds, batch = pickle.loads(request)
        # Counted over all threads, so the trainer's clock comes first as long as there is a trainer.
        signal.setitimer(signal.ITIMER_PROF, (seconds + SPARE_SECONDS) * (os.cpu_count() or 1))
        message = calls.answer(batch)
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(message)


def _end_with(parent: int) -> None:
    """End this process when the trainer has: its input may be held open by others."""
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)


def _be_killed_first() -> None:
    """When memory runs out, the kernel is to take this process, not the trainer."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:
        pass


if __name__ == "__main__":
    main()
