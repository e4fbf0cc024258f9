"""Where a long command stands: plain lines in a log, one line of a terminal."""

from __future__ import annotations

import io
import os
import re
import sys

import pytest

from sinkpretrain import progress
from sinkpretrain.output import let_go, say
from sinkpretrain.progress import ProgressBar

NOTE = "loss 5.322  21,734 tokens/s  validation 5.586"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_says_the_same_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with ProgressBar("a", 2, "steps") as bar:
        bar.update(1)
        bar.update(2, NOTE)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["a: 1/2 steps", "a: 2/2 steps"]


@pytest.mark.parametrize(("columns", "bar_too"), [(80, False), (140, True)])
def test_count_time_and_loss_are_whole(columns: int, bar_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    with ProgressBar("zero-sink", 200, "steps") as bar:
        bar.update(200, NOTE)
    last = re.sub(r"\x1b\[[0-9;?]*\w", "", terminal.getvalue()).rstrip().splitlines()[-1].rpartition("\r")[2]
    assert len(last) <= columns
    assert re.fullmatch(rf"zero-sink .*200/200 steps ( *0:00:00)+ {re.escape(NOTE)} *", last), last
    assert ("━" in last) == bar_too


def test_a_terminal_that_was_closed_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, its = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(its, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with ProgressBar("a", 2, "steps") as bar:
            bar.update(1)
            os.close(ours)
            bar.update(2)
        assert sys.stderr is terminal
        print("what comes later", file=sys.stderr, flush=True)


def test_other_faults_of_an_output_are_not_passed_over() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        with pytest.raises(OSError, match="No space left"):
            say("a line", full)
        let_go(full.fileno())
