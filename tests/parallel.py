"""`make test`: independent make targets, several at a time, with one readable log.

Most of a test's time is spent waiting for a server to boot or a service to answer, so two at a time take little longer
than one. Each line is shown as it comes, with its target's name; the end is a table, and the last words of what failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

#: Lines of a failed target that are shown once more at the end.
LAST_WORDS = 80


@dataclass
class Target:
    """A make target and how it went."""

    name: str
    code: int = -1
    seconds: float = 0.0
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_WORDS))

    def run(self, width: int) -> None:
        """Run it to its end, showing each line with the name in front."""
        started = time.monotonic()
        process = subprocess.Popen(
            ["make", "--no-print-directory", self.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        for line in process.stdout:
            self.tail.append(line)
            print(f"{self.name:<{width}} | {line}", end="", flush=True)
        self.code, self.seconds = process.wait(), time.monotonic() - started


def main() -> int:
    """Run all targets, also after one failed; 0 when each ended well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="targets that run at a time")
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="make targets, the longest first")
    options = parser.parse_args()
    targets = [Target(name) for name in options.targets]
    waiting: SimpleQueue[Target] = SimpleQueue()
    for target in targets:
        waiting.put(target)

    def work() -> None:
        while True:
            try:
                target = waiting.get_nowait()
            except Empty:
                return
            target.run(max(len(name) for name in options.targets))

    workers = [threading.Thread(target=work) for _ in range(options.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for target in targets:
        if target.code:
            print(f"\n== the end of {target.name}\n{''.join(target.tail)}")
    for target in targets:
        outcome = "ok" if target.code == 0 else f"FAILED ({target.code})"
        print(f"{target.name:<28} {outcome:<12} {target.seconds / 60:5.1f} min")
    return 0 if all(target.code == 0 for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
