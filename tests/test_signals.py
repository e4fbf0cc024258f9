"""Signals set a flag, from before the heavy imports until the end; the first one counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinkpretrain.signals import SIGNALS, StopRequest

ROOT = Path(__file__).parent.parent
TOLD = ["env", "--default-signal"]
"""Starts a process that no signal leaves cold, also where the tests run under nohup or in the background."""


def test_the_first_signal_counts_and_handlers_are_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    stop = StopRequest()
    stop.install()
    try:
        assert not stop.requested
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.signal == signal.SIGUSR1
        assert capfd.readouterr().err.count("finishing this step") == 1
    finally:
        stop.uninstall()
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_nohup_stays() -> None:
    """Whoever ignores SIGHUP before the process starts wants it to outlive the terminal; else it asks to stop."""
    code = (
        "import os, signal, sys; from sinkpretrain.signals import StopRequest; s = StopRequest(); s.install()\n"
        "os.kill(os.getpid(), signal.SIGHUP); sys.exit(s.signal or 0)"
    )
    for what, answer in (("--ignore-signal=HUP", 0), ("--default-signal=HUP", signal.SIGHUP)):
        assert subprocess.run(["env", what, sys.executable, "-c", code], cwd=ROOT, check=False).returncode == answer


def test_a_second_interrupt_ends_at_once() -> None:
    stop = StopRequest()
    stop.install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        stop.over = True
        signal.raise_signal(signal.SIGINT)  # all is written: nothing to end
    finally:
        stop.uninstall()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_not_lost_while_python_starts(number: signal.Signals) -> None:
    """What the job scripts start through blocks it; it is delivered once the handler is there."""
    code = (
        f"import os, signal, sys; os.kill(os.getpid(), {number:d})\n"
        "from sinkpretrain.signals import StopRequest; s = StopRequest(); s.install(); sys.exit(int(s.signal))"
    )
    start = 'source slurm/job.env; exec "${guard[@]}" "$@"'
    environment = os.environ | {"SINKPRETRAIN_SITE": "slurm/site.env"}
    plain = subprocess.run([*TOLD, sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    blocked = subprocess.run(
        [*TOLD, "bash", "-c", start, "bash", sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert plain.returncode == -number
    assert blocked.returncode == number, blocked.stderr


def test_only_the_standard_library_is_imported_before_the_handlers() -> None:
    code = (
        "import sys, sinkpretrain.cli\n"
        "names = {m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(n for n in names if not n.startswith('_') and sys.modules[n].__spec__.origin\n"
        "             and 'site-packages' in sys.modules[n].__spec__.origin))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_during_the_imports_does_not_kill(number: signal.Signals, tmp_path: Path) -> None:
    """The trap that kills jobs of Lightning: here it only leaves a note."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sinkpretrain", "train", "--data.path", str(tmp_path / "nothing"), "--out", "x"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(0.6)  # Python is up, torch is on its way
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error  # it lived to see that there are no data
    assert f"{number.name}: finishing" in error
