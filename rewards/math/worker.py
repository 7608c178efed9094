"""The process that does the algebra: one JSON request a line in, one JSON reply a line out.

Run by path, by `rewards.math.comparison`; it imports nothing of this package. A request is
`[gold, answer, seconds]`; with a null answer it asks only whether the gold can be read. The process
may be killed at any moment, and it ends itself when a request takes more processor time than allowed
(so that it does not outlive a parent that was killed) or when its input ends.
"""

import functools
import json
import os
import resource
import signal
import sys
from typing import Any

MEMORY_BYTES = 2 * 1024**3
SPARE_SECONDS = 1.0


def main() -> None:
    """Answer requests until the input ends."""
    # Replies go to a private copy of stdout, so that nothing printed by a library mixes with them.
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Without a Python handler the timer's signal ends the process even inside a long C call.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    try:
        equal, readable = _algebra()
        # The first call fills the parser's tables; it must not count against a request.
        equal(r"\frac{1}{2}", "0.5")
    except Exception as error:
        print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
        return
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds + SPARE_SECONDS)
        try:
            reply: dict[str, Any] = {
                "result": readable(gold) if answer is None else equal(gold, answer)
            }
        except (Exception, RecursionError, MemoryError) as error:
            reply = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _algebra() -> tuple[Any, Any]:
    import math_verify

    formula = (math_verify.LatexExtractionConfig(boxed_match_priority=-1),)

    @functools.lru_cache(maxsize=256)
    def parse(latex: str) -> list[Any]:
        # The time limit is the parent's; math-verify's own uses signals.
        return math_verify.parse(
            f"${latex}$", formula, fallback_mode="no_fallback", parsing_timeout=None
        )

    def readable(gold: str) -> bool:
        return bool(parse(gold))

    def equal(gold: str, answer: str) -> bool:
        return math_verify.verify(parse(gold), parse(answer), timeout_seconds=None)

    return equal, readable


if __name__ == "__main__":
    main()
