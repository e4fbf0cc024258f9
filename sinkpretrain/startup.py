"""Starting quickly (standard library only)."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports(of: str) -> Iterator[None]:
    """Imports of large packages, ``of`` among them, without the garbage collector.

    They make some million objects that live as long as the process. The collector goes through all of them again and
    again while they are made, and at the end of the process, which takes as long as the imports themselves. What was
    imported is left out of its sight for good.
    """
    if of in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
