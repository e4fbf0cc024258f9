"""A request to stop: signals set a flag, the training loop acts on it between two steps."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """``requested`` becomes True on the first SIGINT, SIGTERM or SIGUSR1; a second SIGINT ends the process at once.

    Saving inside a signal handler can deadlock or meet half-updated weights, so the handler only takes a note.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def install(self) -> None:
        """Take over the signals (main thread only; elsewhere nothing happens)."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)

    def uninstall(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        text = "finishing this step and saving"
        if number == signal.SIGINT:
            text += "; press Ctrl-C again to stop without saving"
        print(f"\n{self.signal.name}: {text}.", file=sys.stderr, flush=True)
