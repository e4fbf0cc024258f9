"""Who keeps the others waiting: every process tells where it is, and a run that stands still ends with a name.

One thread per process writes its place (step, what it is doing) into a key-value store of the process group every few
seconds. The training itself only sets an attribute.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from sinkpretrain.errors import TRY_AGAIN
from sinkpretrain.output import say

ANSWER_SECONDS = 10.0
BEATS_PER_TIMEOUT = 10
SILENT_BEATS = 3


class Store(Protocol):
    """What is needed of ``torch.distributed.TCPStore``."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Beat:
    """Where a process was when it was last heard from.

    seconds: how long it has been at it.
    age: how long ago it said so; None if it never did.
    """

    rank: int
    node: str
    step: int
    doing: str
    seconds: float
    age: float | None


class Watchdog:
    """Ends the process when it has made no step for a while, and says which process the others wait for.

    Args:
        store: shared by all processes; its clock is not needed, silence is measured here.
        timeout: seconds without a step.
        end: called with the sentence; by default prints it and leaves at once, since the main thread is stuck.
    """

    def __init__(
        self, store: Store, rank: int, size: int, timeout: float, end: Callable[[str], None] | None = None
    ) -> None:
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._end = end or _leave
        self._interval = max(0.05, min(10.0, timeout / BEATS_PER_TIMEOUT))
        self._place = self._seen = (0, "starting")
        self._clock = self._since = 0.0
        self._over = threading.Event()
        self._count = 0
        self._heard: dict[int, tuple[int, float]] = {}
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No longer watch; a process that is done keeps nobody waiting."""
        self._over.set()
        self._thread.join(ANSWER_SECONDS)

    def at(self, step: int, doing: str) -> None:
        """This process begins something; the only call on the way of the training."""
        self._place = (step, doing)

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            # Of a sleep counts what was asked for: who is suspended, this watcher included, does not stand still.
            self._clock += self._interval
            if self._place is not self._seen:
                self._seen, self._since = self._place, self._clock
            began = time.monotonic()
            try:
                self._tell()
                beats = self._listen()
            except Exception:
                beats = []  # rank 0, who keeps the store, does not answer
            self._clock += min(time.monotonic() - began, ANSWER_SECONDS)
            over = self._over.is_set() or self._place is not self._seen
            if self._clock - self._since > self._timeout and not over:
                self._end(diagnosis(self._rank, beats, self._timeout, SILENT_BEATS * self._interval))
                return

    def _tell(self) -> None:
        step, doing = self._seen
        self._count += 1
        place = (self._count, socket.gethostname(), step, doing, self._clock - self._since)
        self._store.set(f"place/{self._rank}", json.dumps(place))

    def _listen(self) -> list[Beat]:
        if self._clock - self._since < self._timeout / 2:
            return []  # only those who wait have a reason to ask
        now, beats = self._clock, []
        for rank in range(self._size):
            key = f"place/{rank}"
            if not self._store.check([key]):
                beats.append(Beat(rank, "?", 0, "?", 0.0, None))
                continue
            count, node, step, doing, seconds = json.loads(self._store.get(key))
            if self._heard.get(rank, (0, 0.0))[0] != count:
                self._heard[rank] = (count, now)
            beats.append(Beat(rank, node, step, doing, seconds, now - self._heard[rank][1]))
        return beats


def diagnosis(me: int, beats: list[Beat], timeout: float, silence: float) -> str:
    """One sentence that names the process which the others wait for.

    Args:
        beats: of all processes; none if rank 0, who keeps them, does not answer.
        timeout: seconds without a step.
        silence: seconds after which a process that was not heard from counts as gone.
    """
    head = f"rank {me} has made no step for {timeout:.0f} s: "
    if not beats:
        return head + "rank 0 does not answer (its process or node is gone or stopped)."
    gone = [b for b in beats if b.age is None or b.age > silence]
    if gone:
        return head + ", ".join(f"rank {b.rank} on {b.node} has not been heard from" for b in gone) + "."
    behind = min(b.step for b in beats)
    last = [b for b in beats if b.step == behind]
    # Who computes may be waiting for the others inside an exchange of gradients; who does anything else is not.
    busy = [b for b in last if b.doing != "computing"] or last
    names = ", ".join(f"rank {b.rank} on {b.node} has been {b.doing} for {b.seconds:.0f} s" for b in busy)
    return head + f"{names} at step {behind}."


def _leave(sentence: str) -> None:
    say(f"sinkpretrain train: {sentence}", sys.stderr)
    os._exit(TRY_AGAIN)


def connect(rank: int, size: int, timeout: float) -> Watchdog | None:
    """A watchdog at work, with a connection of its own to rank 0's store; None if there is one process, or no limit."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if size == 1 or not timeout:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_SECONDS))
    watchdog = Watchdog(store, rank, size, timeout)
    watchdog.start()
    return watchdog
