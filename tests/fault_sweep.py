"""Kill a training process at random instants, many times; what it leaves must be what an undisturbed run leaves.

    python -m tests.fault_sweep --kills 200

Imports cost seconds and a step here milliseconds, so one process imports everything and each attempt is a fork of it.
Half of the kills come at a random time; for the other half the attempt stops itself (SIGSTOP) at a random place inside
the writing of a checkpoint, and is killed there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from data_factory import make_data
from test_train import config, same

from sinkpretrain import checkpoint, files, metrics
from sinkpretrain.checkpoint import newest_checkpoint
from sinkpretrain.config import ModelConfig, RunConfig
from sinkpretrain.load import step_of
from sinkpretrain.provenance import provenance
from sinkpretrain.train import train

STEPS = 240
PLACES = (
    "before the file",
    "half of the file",
    "before it is verified",
    "before it is in place",
    "before the pointer",
    "before pruning",
)


@dataclass
class Kill:
    """One fault: where it hit, at which step on record, and where the next attempt went on."""

    place: str
    at: int
    resumed_at: int
    left_behind: bool

    @property
    def lost(self) -> int:
        return max(0, self.at - self.resumed_at)


def tiny(data: Path, out: Path) -> RunConfig:
    base = config(data, out, steps=STEPS)
    return dataclasses.replace(
        base,
        model=ModelConfig(n_layer=1, d_model=32, n_head=2, context=16),
        data=dataclasses.replace(base.data, batch_size=4),
        log=dataclasses.replace(base.log, every=3, validate_every=60, probe_every=0, checkpoint_every=5, keep=2),
    )


def attempt(run: RunConfig, stop_at: str | None, skip: int) -> int:
    """Fork a process that trains; it stops itself the ``skip``-th time that it comes to a place. Returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(os.open(f"{run.out}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if stop_at:
            stop_inside_checkpoints(stop_at, skip)
        code = 0 if train(run).finished else 1
    finally:
        os._exit(code)


def stop_inside_checkpoints(place: str, skip: int) -> None:
    """Make this process stop at a place of ``write_checkpoint``."""
    left = [skip]

    def here(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)

    def before(owner: object, name: str, only: Callable[..., bool] = lambda *_: True) -> None:
        original = getattr(owner, name)

        def patched(*args: object, **kwargs: object) -> object:
            if only(*args):
                here()
            return original(*args, **kwargs)

        setattr(owner, name, patched)

    def half_written(content: object, path: Path) -> None:
        save(content, path)
        if left[0] == 0:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        here()

    if place == PLACES[0]:
        before(checkpoint.torch, "save")
    elif place == PLACES[1]:
        save = checkpoint.torch.save
        checkpoint.torch.save = half_written
    elif place == PLACES[2]:
        before(checkpoint, "verify", lambda path: path.name.endswith(".tmp"))
    elif place == PLACES[3]:
        before(files.os, "replace", lambda source, target: str(target).endswith(".ckpt"))
    elif place == PLACES[4]:
        before(checkpoint, "write_json")
    else:
        import sinkpretrain.lit as lit

        before(lit, "prune_checkpoints")


def last_step(run: Path) -> int:
    return max((x["step"] for x in metrics.read(run) if x["kind"] == "train"), default=0)


def sweep(folder: Path, kills: int, seed: int = 0, say: Callable[[str], None] = print) -> tuple[list[Kill], int]:
    """Inject ``kills`` faults into as many runs as that takes; returns them and the number of runs, all of them equal.

    Raises:
        AssertionError: a run did not end as the undisturbed one did.
    """
    chance = random.Random(seed)
    data = make_data(folder / "data")
    reference = tiny(data, folder / "undisturbed")
    pid = attempt(reference, None, 0)
    started = time.monotonic()
    assert os.waitpid(pid, 0)[1] == 0, Path(f"{reference.out}.err").read_text()
    seconds = time.monotonic() - started
    done: list[Kill] = []
    runs = 0
    while len(done) < kills:
        runs += 1
        run = dataclasses.replace(reference, out=str(folder / f"run{runs}"))
        disturb(run, chance, kills - len(done), seconds, done)
        assert same(Path(run.out), Path(reference.out), STEPS), f"{run.out} differs from the undisturbed run"
        steps = [x["step"] for x in metrics.read(Path(run.out)) if x["kind"] == "train"]
        assert steps == list(range(1, STEPS + 1))
        left = [p.name for p in Path(run.out).rglob(".*.tmp")]
        assert not left, left
        say(f"run {runs}: equal to the undisturbed one after {len(done)} kills in all")
        shutil.rmtree(run.out)
    return done, runs


def disturb(run: RunConfig, chance: random.Random, most: int, seconds: float, done: list[Kill]) -> None:
    """Kill attempts of a run until one gets to the end, or ``most`` were killed and one is left alone."""
    out, killed = Path(run.out), 0
    while True:
        place = chance.choice(PLACES) if chance.random() < 0.5 else None
        pid = attempt(run, place if killed < most else None, chance.randrange(6))
        if killed < most:
            if not place:
                time.sleep(chance.uniform(0.0, 0.7 * seconds))
            ended = _kill(pid, wait_for_stop=place is not None)
        else:
            ended = os.waitpid(pid, 0)[1]
        if ended is not None:
            assert ended == 0, f"{ended}: {Path(f'{run.out}.err').read_text()}"
            return
        killed += 1
        at = last_step(out) if out.is_dir() else 0
        newest = newest_checkpoint(out)
        left = any(out.rglob(".*.tmp")) if out.is_dir() else False
        done.append(Kill(place or "any", at, step_of(newest) if newest else 0, left))


def _kill(pid: int, wait_for_stop: bool) -> int | None:
    """Kill a process, at once or where it stops itself; returns its status if it had ended before, else None."""
    if wait_for_stop:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return status
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return None if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else status


def summary(done: list[Kill], runs: int, seconds: float) -> dict[str, object]:
    places = sorted({k.place for k in done}, key=("any", *PLACES).index)
    return {
        "kills": len(done),
        "runs_equal_to_the_undisturbed_one": runs,
        "steps_per_run": STEPS,
        "checkpoint_every": 5,
        "kills_that_left_a_temporary_file": sum(k.left_behind for k in done),
        "steps_lost": _lost(done),
        "by_place": {place: _lost([k for k in done if k.place == place]) for place in places},
        "seconds": round(seconds, 1),
    }


def _lost(kills: list[Kill]) -> dict[str, float]:
    lost = [k.lost for k in kills]
    return {"kills": len(lost), "mean": round(sum(lost) / len(lost), 2), "max": max(lost)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the summary here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        done, runs = sweep(Path(folder), arguments.kills, arguments.seed)
        command = f"python -m tests.fault_sweep --kills {arguments.kills} --seed {arguments.seed}"
        about = provenance("cpu") | {"command": command, "cores": os.cpu_count()}
        result = summary(done, runs, time.monotonic() - started) | {"provenance": about}
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
