"""What a user did wrong, as opposed to what we did wrong."""

import difflib
from collections.abc import Collection
from typing import Literal


class UserError(ValueError):
    """A mistake in the input: one sentence saying what is wrong, which value, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


TRY_AGAIN = 75
"""Exit code of a process that ends for a reason outside of it (EX_TEMPFAIL): the same command may work next time."""


class LostProcessError(RuntimeError):
    """Another process of the run has gone or does not answer. The command line exits with code 75."""


class SettingHasNoEffect(UserWarning):
    """A setting was given that changes nothing in this configuration."""


def out_of_memory(error: RuntimeError) -> Literal["GPU", "host"] | None:
    """Whose memory is full, if that is what torch says; torch itself is not imported for this."""
    if type(error).__name__ == "OutOfMemoryError":
        return "GPU"
    return "host" if "DefaultCPUAllocator: " in str(error) else None


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's says, as far as it fits into a sentence; its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def meant(name: str, known: Collection[str], known_are: str = "known:") -> str:
    """The end of a sentence about a name that is not known: the one that was meant, or all there are."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"{known_are} {', '.join(known)}."
