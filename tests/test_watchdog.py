"""Standing still: the process that the others wait for is named, whatever it is stuck in."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from sinkpretrain import slurm
from sinkpretrain.errors import TRY_AGAIN
from sinkpretrain.slurm import TimeLeft
from sinkpretrain.watchdog import Beat, Watchdog, diagnosis


class Shared:
    """A key-value store in one process."""

    def __init__(self) -> None:
        self.data: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.data[key] = value

    def get(self, key: str) -> bytes:
        return self.data[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(k in self.data for k in keys)


def beat(rank: int, step: int, doing: str, age: float | None = 0.0) -> Beat:
    return Beat(rank, f"node{rank}", step, doing, 61.0, age)


def test_who_is_silent_is_named() -> None:
    beats = [beat(0, 7, "computing"), beat(1, 7, "computing", 40.0), beat(2, 0, "?", None)]
    text = diagnosis(0, beats, 60, 18)
    assert text.endswith("rank 1 on node1 has not been heard from, rank 2 on node2 has not been heard from.")


def test_who_is_behind_and_not_waiting_is_named() -> None:
    beats = [beat(0, 7, "computing"), beat(1, 7, "reading data"), beat(2, 7, "computing")]
    assert diagnosis(2, beats, 60, 18).endswith("rank 1 on node1 has been reading data for 61 s at step 7.")
    beats = [beat(0, 8, "between two steps"), beat(1, 7, "computing")]
    assert diagnosis(0, beats, 60, 18).endswith("rank 1 on node1 has been computing for 61 s at step 7.")


def test_no_answer_means_rank_0() -> None:
    assert "rank 0 does not answer" in diagnosis(3, [], 60, 18)


@pytest.mark.parametrize("stopped", ["silent", "stuck"])
def test_a_stalled_process_is_found(stopped: str) -> None:
    store, said, found = Shared(), [], threading.Event()

    def end(sentence: str) -> None:
        said.append(sentence)
        found.set()

    waiting = Watchdog(store, 0, 2, 1.0, end)
    late = Watchdog(store, 1, 2, 100.0, lambda _: None)
    waiting.start()
    waiting.at(5, "computing")
    if stopped == "stuck":
        late._interval = 0.05
        late.at(5, "reading data")
        late.start()
    assert found.wait(10)
    if stopped == "stuck":
        late.stop()
    assert "rank 1 on" in said[0]
    assert ("reading data" in said[0]) == (stopped == "stuck")


def test_a_stalled_process_ends_also_where_nobody_reads_why() -> None:
    code = (
        "import os; from sinkpretrain import watchdog; r, w = os.pipe(); os.close(r); os.dup2(w, 2); "
        "watchdog._leave('rank 0 stands still.')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == TRY_AGAIN


def test_who_goes_on_is_left_alone() -> None:
    said: list[str] = []
    one = Watchdog(Shared(), 0, 1, 0.3, said.append)
    one.start()
    for step in range(20):
        one.at(step, "computing")
        time.sleep(0.05)
    one.stop()
    assert said == []


# --- the job's time -----------------------------------------------------------------------------------------------


def test_time_left_is_asked_again_because_limits_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(slurm.time, "time", lambda: now[0])
    ends = iter([2000.0, 3000.0, 3000.0])
    clock = TimeLeft(120.0, lambda: next(ends))
    assert not clock.over()
    now[0] = 1890.0
    assert not clock.over()  # the limit was raised meanwhile
    now[0] = 2881.0
    assert clock.over()


def test_the_margin_leaves_a_short_job_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.time, "time", lambda: 1000.0)
    assert TimeLeft(120.0, lambda: 1060.0).margin == 15.0
    assert not TimeLeft(120.0, lambda: None).over()


def test_an_array_task_is_not_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert slurm.job_id() == "9_3"


def test_without_scontrol_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1234")
    assert slurm.requeue("1") == "there is no scontrol on this node"
    assert slurm.end_time("1") == 1234.0


def test_the_end_of_a_job_is_read_in_one_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM_TIME_FORMAT changes what scontrol prints for people."""
    script = tmp_path / "scontrol"
    script.write_text(
        '#!/bin/bash\nif [ "${SLURM_TIME_FORMAT:-standard}" = standard ]; then echo "EndTime=2099-01-01T00:00:00"\n'
        'else echo "EndTime=1 Jan 00:00"; fi\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert slurm.end_time("1") == datetime(2099, 1, 1).timestamp()
