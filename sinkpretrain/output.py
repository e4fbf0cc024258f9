"""Lines for whoever reads them: whole ones, and no reason to fail once nobody does.

What ends a run often takes its readers along: a closed terminal, or the ``tee`` at the other end of a pipe, which the
same Ctrl-C ends. Standard library only: signals speak before anything else is imported.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

UNREAD = (errno.EIO, errno.EPIPE)
"""What writing to a closed terminal is, and to a pipe whose reader has gone."""

_LOCK = threading.Lock()


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line at once and whole, also where several threads print."""
    stream = file or sys.stdout
    with while_read(stream), _LOCK:
        stream.write(text + "\n")  # print would write the end of the line by itself, after another thread's text
        stream.flush()


@contextlib.contextmanager
def while_read(stream: TextIO) -> Iterator[None]:
    """Pass over the failure of writes to a stream that nobody reads any more."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNREAD:
            raise
        let_go(stream.fileno())


def let_go(descriptor: int) -> None:
    """From now on nothing that is written there fails: what is left in buffers must not either."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
