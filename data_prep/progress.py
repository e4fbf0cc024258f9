"""Progress of a preparation: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows documents, tokens and tokens per second on stderr.

    Args:
        n_bytes: size of the whole source on disk, 0 where unknown
    """

    def __init__(self, n_bytes: int) -> None:
        console = Console(file=sys.stderr)
        self._n_bytes = n_bytes
        self._documents = 0
        self._tokens = 0
        self._start = self._last_line = time.monotonic()
        self._seconds = 0.0
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("reading", total=n_bytes or None)

    def update(self, documents: int, new_tokens: int, bytes_read: int) -> None:
        """Report documents so far, tokens since the last call, and bytes of the source so far."""
        self._documents = documents
        self._tokens += new_tokens
        now = time.monotonic()
        self._seconds = now - self._start
        text = f"{documents:,} documents  {self._tokens:,} tokens  {self._tokens / self._seconds:,.0f} tokens/s"
        self._bar.update(self._task, description=text, completed=bytes_read)
        if self._bar.disable and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            share = f"  {100 * bytes_read / self._n_bytes:.0f} %" if self._n_bytes else ""
            print(text + share, file=sys.stderr, flush=True)
            self._last_line = now

    @property
    def tokens_per_second(self) -> float | None:
        """Mean rate of this run, None if it encoded nothing."""
        return self._tokens / self._seconds if self._seconds else None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
