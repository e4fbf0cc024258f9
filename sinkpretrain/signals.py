"""A request to stop: signals set a flag, the training loop acts on it between two steps.

Standard library only: the handlers are in place before torch and Lightning, which take seconds to import.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from sinkpretrain.output import let_go

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_BY_WEIGHT = (0, signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def agreed(largest: Callable[[int], int], number: int) -> int:
    """Of the signals that processes of one run met first, 0 for none, the one that counts for all of them.

    That is SIGUSR1, which takes the job back into the queue: a SIGTERM on its heels may overtake it on another node,
    and changes nothing in a process by itself either.

    Args:
        largest: tells a process the largest number of all, given its own.
        number: the signal that this process met.
    """
    return int(_BY_WEIGHT[largest(_BY_WEIGHT.index(number))])


def to_take() -> list[signal.Signals]:
    """The SIGNALS that ask this process to stop: not SIGHUP if it was started to outlive its terminal (nohup)."""
    outlives = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if not (outlives and number == signal.SIGHUP)]


class StopRequest:
    """``requested`` becomes True on the first of SIGNALS; a second SIGINT ends the process at once.

    Saving inside a signal handler can deadlock or meet half-updated weights, so the handler only takes a note. Later
    signals change nothing: the first one says why the run stops. Nor do any once the run is ``over``.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.over = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def installed(self) -> bool:
        return bool(self._previous)

    def install(self) -> None:
        """Take over the signals (main thread only; elsewhere nothing happens); one that was blocked arrives now."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.over = False
        for number in to_take():
            self._previous[number] = signal.signal(number, self._note)
        # The job scripts block signals until here, because one that arrives while Python starts would end the process.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def uninstall(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.over:
            return
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            return
        self.signal = signal.Signals(number)
        text = "finishing this step and saving"
        if number == signal.SIGINT:
            text += "; press Ctrl-C again to stop without saving"
        if launched_rank() == 0:
            # Not print: the interrupted code may be inside the same buffer.
            try:
                os.write(2, f"\n{self.signal.name}: {text}.\n".encode())
            except OSError:
                let_go(2)  # a closed terminal, or a reader that the same signal ended: the run is still to be saved


PROCESS = StopRequest()
"""The one that the console script installs; signal handlers belong to the process."""


def launched_rank() -> int:
    """This process's rank as its launcher's environment says; 0 if it was not launched as one of several."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0
