"""Commands in processes of their own that begin with everything imported, where what they do is tested and not how they
start: importing torch and Lightning takes seconds of a core each time, and a fork of a process that did takes none.

Run as a program, this is the process that is forked. A fork leaves its loop and is a main program like any other: its
threads, handlers and its end are those of an interpreter of its own.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Forked:
    """A process and what it prints, with the methods of ``subprocess.Popen`` that tests of processes use."""

    def __init__(self, status: int, output: Path) -> None:
        self.returncode: int | None = None
        self._status, self._output, self._said = status, output, b""
        while b"\n" not in self._said:
            self._hear(60)
        self.pid = int(self._said.split(b"\n")[0])

    def _hear(self, timeout: float) -> None:
        """More of what the watcher of the process says: its pid, and at its end its exit code."""
        if not select.select([self._status], [], [], timeout)[0]:
            return
        more = os.read(self._status, 100)
        assert more, f"nobody watches over the process any more: {self._output.read_text()}"
        self._said += more
        if self._said.count(b"\n") == 2:
            self.returncode = int(self._said.split(b"\n")[1])
            os.close(self._status)

    def poll(self) -> int | None:
        if self.returncode is None:
            self._hear(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            left = deadline - time.monotonic()
            if left <= 0:
                self.kill()
                raise AssertionError(f"not ended after {timeout} s: {self._output.read_text()}")
            self._hear(left)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        self.wait(timeout)
        return self._output.read_text(), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """The process that is forked, from the first use until the end of the tests."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, script: Path, *words: str, output: Path, **environment: str) -> Forked:
        """A program with its arguments, what it prints in a file, and more environment."""
        if self.process is None:
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
            theirs.close()
        request = {"words": [str(script), *words], "environment": os.environ | environment}
        ours, status = os.pipe()
        with output.open("wb") as file:
            socket.send_fds(self.control, [json.dumps(request).encode()], [file.fileno(), status])
        os.close(status)
        return Forked(ours, output)

    def close(self) -> None:
        if self.process is not None:
            self.control.close()
            self.process.wait(60)


def serve(control: socket.socket) -> dict[str, Any]:
    """Fork for each request; returns, in the fork, what is to be run. The end of the tests ends the process."""
    while True:
        message, files, *_ = socket.recv_fds(control, 1 << 20, 2)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not message:
            os._exit(0)
        output, status = files
        if os.fork() == 0:
            break
        os.close(output)
        os.close(status)
    control.close()
    if pid := os.fork():
        os.close(output)
        os.write(status, b"%d\n" % pid)
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)
    os.close(status)
    request: dict[str, Any] = json.loads(message)
    return request


if __name__ == "__main__":
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    import sinkpretrain.commands
    import sinkpretrain.train  # noqa: F401

    gc.freeze()  # the collector leaves alone what all forks share
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(request["environment"])
    rank_zero_only.rank = int(os.environ.get("RANK", "0"))  # as Lightning notes it when it is imported
    sys.argv[:] = request["words"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    exec(compile(Path(sys.argv[0]).read_text(), sys.argv[0], "exec"), {"__name__": "__main__"})
