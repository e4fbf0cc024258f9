"""A few kills of the sweep whose full size is recorded in results/faults.md, and its negative control."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_factory import make_data
from fault_sweep import STEPS, tiny
from test_train import same

from sinkpretrain.train import train


def test_killed_at_any_moment_the_run_ends_the_same(tmp_path: Path) -> None:
    """In a process of its own: it forks, which does not go with the threads of other tests."""
    command = [sys.executable, "-m", "tests.fault_sweep", "--kills", "8", "--seed", "1", "--out", str(tmp_path / "out")]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out").read_text())
    assert result["kills"] == 8
    assert result["steps_lost"]["max"] <= 2 * 5 + 3


def test_the_comparison_sees_a_single_sample_out_of_order(tmp_path: Path) -> None:
    """The control: another seed of the data order is another final state."""
    run = tiny(make_data(tmp_path / "data"), tmp_path / "a")
    other = dataclasses.replace(run, out=str(tmp_path / "b"), data=dataclasses.replace(run.data, seed=1235))
    for one in (run, other):
        train(one)
    with pytest.raises(AssertionError):
        assert same(tmp_path / "a", tmp_path / "b", STEPS)
