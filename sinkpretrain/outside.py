"""Sink mechanisms from outside of the package: what ``sink.mechanism`` means by ``module:Class``.

The module is one that Python can import; the current directory counts, as for ``python -m``. A folder that is loaded
gives the name alone: no file in it is imported. The code is a part of what is trained: its hash goes with the run and
with the weights, and a copy lies beside them to be read.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from sinkpretrain.config import SinkConfig
from sinkpretrain.errors import UserError, meant
from sinkpretrain.files import write_bytes
from sinkpretrain.mechanism import Mechanism, require_usable

FOLDER = "mechanism"
"""In a run directory or an exported folder: the code that it was made with."""
HASHES = "mechanism_sha256"
"""What ``hashes`` gives, where a run or its weights are described."""


def outside_class(name: str) -> type[Mechanism]:
    """The class that ``module:Class`` names; raises UserError if it cannot be had or used."""
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)) or module_name.endswith(".py"):
        raise UserError(
            f"sink.mechanism {name!r} is not of the form module:Class; my_sinks:Mine is the class Mine in my_sinks.py."
        )
    module = _module(module_name, name)
    cls = getattr(module, class_name, None)
    place = getattr(module, "__file__", None) or "no file"
    if cls is None:
        classes = {k: v for k, v in vars(module).items() if isinstance(v, type) and v is not Mechanism}
        there = [k for k, v in classes.items() if issubclass(v, Mechanism)]
        known = meant(class_name, there or ["no class of a mechanism"], "it has")
        raise UserError(f"the module {module_name} ({place}) has no class {class_name}; {known}")
    if not isinstance(cls, type) or not issubclass(cls, Mechanism):
        raise UserError(f"{name} ({place}) is no subclass of sinkpretrain.mechanism.Mechanism; derive it from that.")
    try:
        require_usable(cls)
    except TypeError as error:
        raise UserError(f"the sink mechanism {name} cannot be used: {error}") from error
    _sources(cls)  # to be read now
    return cls


def _module(module: str, name: str) -> ModuleType:
    """The module, looked for in the current directory first, where the console script does not look by itself."""
    if "" not in sys.path:
        sys.path.append("")  # for what it may import later; last, where it shadows nothing
    sys.path.insert(0, "")
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"there is no module {module}, which holds the sink mechanism {name}; put "
                f"{module.replace('.', '/')}.py into the current directory, or the folder that it is in on PYTHONPATH."
            ) from error
        why = _reason(error, traceback.extract_tb(error.__traceback__)[-1])
        raise UserError(f"cannot import {module}, which holds the sink mechanism {name} ({why}).") from error
    finally:
        sys.path.remove("")  # the first one


def _reason(error: BaseException, frame: traceback.FrameSummary) -> str:
    where = "" if isinstance(error, SyntaxError) else f", {frame.filename} line {frame.lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


@contextmanager
def errors_placed(cls: type[Mechanism], what: str) -> Iterator[None]:
    """An error in the code of a mechanism of one's own as one sentence, with the line of that code where it arose."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        files = {inspect.getsourcefile(sys.modules[module]) for module in _sources(cls)}
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
        if not own:  # of the package, or another that it calls: that is no mistake of theirs
            raise
        name = f"{cls.__module__}:{cls.__qualname__}"
        raise UserError(f"the sink mechanism {name} {what} ({_reason(error, own[-1])}).") from error


_READ: dict[type[Mechanism], dict[str, bytes]] = {}
"""Read when a class is first asked for: a file may change later, and what runs does not."""


def _sources(cls: type[Mechanism]) -> dict[str, bytes]:
    """What the files hold that a class, and those that it extends, are defined in, by module; none of the package."""
    if cls in _READ:
        return _READ[cls]
    found = {}
    for base in cls.__mro__:
        if issubclass(base, Mechanism) and not base.__module__.startswith("sinkpretrain."):
            try:
                found[base.__module__] = Path(inspect.getsourcefile(base) or "").read_bytes()
            except (TypeError, OSError) as error:
                raise UserError(
                    f"the code of the sink mechanism {base.__module__}:{base.__qualname__} cannot be read, and goes "
                    "with every run; define it in a .py file."
                ) from error
    _READ[cls] = found
    return found


def _code(sink: SinkConfig) -> dict[str, bytes]:
    return _sources(outside_class(sink.mechanism)) if sink.from_outside else {}


def hashes(sink: SinkConfig) -> dict[str, str]:
    """sha256 of the files that a mechanism is defined in, by module; empty for those of the package."""
    return {module: hashlib.sha256(code).hexdigest() for module, code in _code(sink).items()}


def of_both(sha256: str, sink: SinkConfig) -> str:
    """The hash of weights together with the code that runs them, where that is from outside: both make the model."""
    code = hashes(sink)
    return hashlib.sha256("".join((sha256, *code.values())).encode()).hexdigest() if code else sha256


def keep(sink: SinkConfig, folder: Path) -> None:
    """Copy these files into a run directory or an exported folder, where nothing imports them."""
    for module, code in _code(sink).items():
        write_bytes(_kept(folder, module, hashlib.sha256(code).hexdigest()), code)


def _kept(folder: Path, module: str, sha256: str) -> Path:
    """A name that tells versions apart."""
    return folder / FOLDER / f"{module}-{sha256[:12]}.py"


def edited(sink: SinkConfig, about: dict[str, Any], folder: Path) -> list[str]:
    """The modules whose code is not that which weights were trained with, and where that is.

    Args:
        about: what is said of the weights.
        folder: their run directory or exported folder.
    """
    found, now, then = [], hashes(sink), about.get(HASHES) or {}
    for module in (m for m in {**then, **now} if then.get(m) != now.get(m)):
        copy = _kept(folder, module, then.get(module, ""))
        found.append(f"{module} (as it was: {copy})" if copy.is_file() else module)
    return found


def warn_if_edited(sink: SinkConfig, about: dict[str, Any], folder: Path) -> None:
    """Say so if weights were trained with other code than that which will run them; arguments as of ``edited``."""
    if about.get(HASHES) and (modules := edited(sink, about, folder)):
        text = f"the code of the sink mechanism has changed since {folder} was trained: {', '.join(modules)}."
        warnings.warn(text, stacklevel=2)
