"""The console script: one table of commands, each a function whose signature and docstring are its flags and help.

A command's module is imported when it is called, so that ``--help`` and mistakes in a flag answer at once.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sinkpretrain import __version__
from sinkpretrain.errors import TRY_AGAIN, LostProcessError, UserError, meant, out_of_memory
from sinkpretrain.files import UNWRITABLE, out_of_space
from sinkpretrain.output import let_go, say
from sinkpretrain.signals import PROCESS


@dataclass(frozen=True)
class Command:
    """Where a command lives and what it does in one line."""

    function: str
    summary: str
    module: str = "sinkpretrain.commands"
    takes_signals: bool = False


COMMANDS = {
    "prepare": Command("prepare", "text in, packed tokens out"),
    "train": Command("train", "train a model, or go on training it", takes_signals=True),
    "stream": Command("stream", "streaming perplexity of a model over a long text"),
    "inspect": Command("inspect", "sink measures, attention maps, and when sinks emerged"),
    "zero-shot": Command("zero_shot", "accuracy on tasks of lm-evaluation-harness"),
    "compare": Command("compare", "one page from results and runs: Table 3, differences, figures"),
    "generate": Command("generate", "text without end at constant memory, or a conversation"),
    "export": Command("export", "a Hugging Face folder from a run"),
    "list": Command("list_mechanisms", "the sink mechanisms and what each of them needs"),
    "bench": Command("bench", "how fast training, streaming and decoding are on this machine"),
    "doctor": Command("doctor", "is everything there that a training job needs?"),
    "submit": Command("submit", "a whole experiment, on a Slurm cluster or on this machine"),
    "supervise": Command("supervise", "what the job scripts start srun through", "sinkpretrain.supervise"),
    "demo": Command("demo", "the whole path in a few minutes, without a network"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 a mistake in the input, 75 other processes were lost,
    128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"sinkpretrain {__version__}")
        return 0
    warnings.showwarning = _one_line_warning
    try:
        command = find(arguments[0])
        if command.takes_signals:
            PROCESS.install()  # before any import that takes time: a signal on the way must not end the process
        function: Callable[..., int] = getattr(importlib.import_module(command.module), command.function)
        return function(arguments[1:])
    except UserError as error:
        say(f"sinkpretrain {arguments[0]}: {error}", sys.stderr)
        return 2
    except LostProcessError as error:
        say(f"sinkpretrain {arguments[0]}: {error}", sys.stderr)
        return TRY_AGAIN
    except RuntimeError as error:
        whose = out_of_memory(error)
        if whose is None:
            raise
        why = str(error).rpartition("DefaultCPUAllocator: ")[2].partition(". ")[0]
        full = "the GPU's memory is full" if whose == "GPU" else "there is not enough memory"
        less = "a smaller batch, 16-bit numbers or the CPU" if whose == "GPU" else "smaller batches or shorter inputs"
        text = f"{full} ({why}); use {less}: see sinkpretrain {arguments[0]} --help."
        say(f"sinkpretrain {arguments[0]}: {text}", sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        say(f"sinkpretrain {arguments[0]}: {str(stop) or 'stopped.'}", sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; Python would complain once more at exit.
        let_go(sys.stdout.fileno())
        return 141
    except OSError as error:
        # Met where no command looked for it.
        if error.filename is None or not (error.errno in UNWRITABLE or out_of_space(error)):
            raise
        why = str(error.strerror).lower()
        text = f"{error.filename}: {why}; choose a place you can write to."
        say(f"sinkpretrain {arguments[0]}: {text}", sys.stderr)
        return 2


def find(name: str) -> Command:
    """The command of this name; raises UserError with the nearest one."""
    if name in COMMANDS:
        return COMMANDS[name]
    raise UserError(f"there is no such command; {meant(name, COMMANDS)}")


def overview() -> str:
    """The text of ``sinkpretrain --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sinkpretrain COMMAND ...",
            "",
            "commands:",
            *lines,
            "",
            "sinkpretrain COMMAND --help tells more.",
        ]
    )


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}", sys.stderr)
