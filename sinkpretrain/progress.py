"""Progress of a long command: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from sinkpretrain.output import say, while_read

ROOMY = 120
"""Columns of a terminal from which there is room for a bar and the time so far."""

PLAIN_SECONDS = 10.0
"""How often a line is printed where no terminal can show a bar."""


@contextlib.contextmanager
def without_bars_of_transformers() -> Iterator[None]:
    """Of weights that are read in no time, or that nobody wants to watch."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


class ProgressBar:
    """Counts up to ``total`` (0: not known yet); ``update`` shows where it stands and a short note such as the loss.

    Written to stderr, so that a command's result can be piped.
    """

    def __init__(self, title: str, total: int, unit: str, enabled: bool = True) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.note = 0, ""
        self._enabled = enabled
        self._started = self._printed = time.monotonic()
        self._shown: tuple[int, str] | None = None
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            console = Console(stderr=True)
            roomy = console.width >= ROOMY
            self._bar = Progress(
                TextColumn("{task.description}"),
                *([BarColumn(bar_width=24)] if roomy else []),
                TextColumn("{task.fields[count]}"),
                *([TimeElapsedColumn(table_column=Column(no_wrap=True))] if roomy else []),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1)),
                console=console,
                expand=True,  # the note has what the others leave, and is what is cut
            )
            self._task = self._bar.add_task(title, total=total or None, count=self._count(), note="")

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            with while_read(sys.stderr):
                self._bar.stop()
        elif kind is None:
            self._line(final=True)

    def update(self, done: int, note: str = "") -> None:
        self.done, self.note = done, note or self.note
        if self._bar is not None:
            self._bar.update(self._task, total=self.total or None, completed=done, count=self._count(), note=self.note)
        else:
            self._line()

    def _count(self) -> str:
        return f"{self.done:,}{f'/{self.total:,}' if self.total else ''} {self.unit}"

    def _line(self, final: bool = False) -> None:
        now, shown = time.monotonic(), (self.done, self.note)
        if not self._enabled or (shown == self._shown if final else now - self._printed < PLAIN_SECONDS):
            return
        self._printed, self._shown = now, shown
        seconds = now - self._started
        text = f"{self.title}: {self._count()}, {seconds:.0f} s {self.note}"
        say(text.rstrip(), sys.stderr)
