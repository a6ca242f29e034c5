"""Who works at something in the container: an object that its holder writes anew every few seconds.

A holder that was killed is told by its silence; nobody's clock is compared with another's. One that finds its lease
taken over stops its load.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from typing import Any

from labctl_etl.model import CONTROL
from labctl_etl.store import Store
from labctl_job.errors import Failure

LEASES = f"{CONTROL}/leases"
#: Seconds between a holder's signs of life; looks without one, and seconds between them, after which it is given up.
BEAT, SILENT_LOOKS, LOOK = 5.0, 20, 2.0
#: Seconds after which a new lease is read again: a store that ignores conditions has let another one write by then.
SETTLE = 1.0


def host_id(folder: str) -> str:
    """What tells this host from others; the same as long as its disk lives."""
    path = os.path.join(folder, "etl-host-id")
    with contextlib.suppress(FileExistsError), open(path, "x", encoding="ascii") as file:
        file.write(f"{os.uname().nodename}-{uuid.uuid4().hex[:8]}")
    with open(path, encoding="ascii") as file:
        return file.read().strip()


class Lease:
    """One lease. `holder`: who has it; a lease of the same holder, from a run that was killed, is taken up at once."""

    def __init__(self, store: Store, name: str, holder: str) -> None:
        self._store, self._path, self.holder = store, f"{LEASES}/{name}.json", holder
        self._ended = threading.Event()
        self._lost = False
        self._beats = 0
        self._keeper: threading.Thread | None = None

    def take(self, *, wait: bool = False, settle: bool = True) -> bool:
        """Have it. False where another has it; with `wait` only once that one was given up, which takes a minute.

        Without `settle`, a store that takes conditions is trusted to mind them.
        """
        silent, last = 0, None
        while True:
            found = self._read()
            if found is not None and found.get("holder") == self.holder:
                self._write()
                break
            if found is None:
                created = self._store.create(self._path, self._document())
                if created and ((self._store.conditional and not settle) or self._settled()):
                    break
                continue
            if not wait:
                return False
            silent, last = (silent + 1 if found == last else 0), found
            if silent >= SILENT_LOOKS:
                self._write()
                if self._settled():
                    break
            time.sleep(LOOK)
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        return True

    def check(self) -> None:
        """Failure if another took it over meanwhile."""
        if self._lost:
            raise Failure(
                "Another host has taken this load over, for this one was silent for too long.",
                next_step="wait for that one; labctl etl tells when all is there",
            )

    def held_by(self) -> str:
        """Its holder's name, "" where it has none."""
        return str((self._read() or {}).get("holder", ""))

    def release(self) -> None:
        """Give it back, unless another has it."""
        self._ended.set()
        if self._keeper is not None:
            self._keeper.join()
            if not self._lost:
                self._store.remove([self._path])

    def leave(self) -> None:
        """No more signs of life, but others of the same holder may go on."""
        self._ended.set()
        if self._keeper is not None:
            self._keeper.join()

    def _settled(self) -> bool:
        time.sleep(SETTLE)
        return (self._read() or {}).get("holder") == self.holder

    def _keep(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(Failure):  # a store that is away has no news of others either
                if (self._read() or {}).get("holder") != self.holder:
                    self._lost = True
                    return
                self._write()

    def _read(self) -> dict[str, Any] | None:
        data = self._store.get(self._path)
        try:
            return None if data is None else dict(json.loads(data))
        except (ValueError, TypeError):
            return {}

    def _document(self) -> bytes:
        self._beats += 1
        return json.dumps({"holder": self.holder, "beat": f"{self._beats}-{uuid.uuid4().hex[:6]}"}).encode()

    def _write(self) -> None:
        self._store.put(self._path, self._document())
