"""An experiment as jobs: what waits for what, what is refused before anything is sent."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from sinkpretrain.cache import Cache
from sinkpretrain.cli import main
from sinkpretrain.commands import load_run_config
from sinkpretrain.errors import UserError
from sinkpretrain.experiment import load_experiment, load_member
from sinkpretrain.submit import check, command, kept_file, plan, script_folder, submit

CONFIGS = Path(__file__).parent.parent / "configs"

EXPERIMENT = {
    "recipe": "pythia-14m",
    "variants": ["vanilla", "one-sink-token"],
    "seeds": [1, 2],
    "settings": {"training.steps": 100, "data.shuffle": True},
    "nodes": 2,
    "devices": 4,
    "hours": 1.5,
    "evaluate": {"tokens": "data/novels", "cache": "0+64,1+63"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path, {})


def written(folder: Path, changes: dict) -> Path:
    path = folder / "my experiment.yaml"
    path.write_text(yaml.safe_dump({"out": str(folder / "results here")} | EXPERIMENT | changes))
    return path


def programs(folder: Path, **scripts: str) -> Path:
    """A folder with stand-ins for Slurm's programs, which know it as HERE."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\nHERE={folder}\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def test_every_evaluation_waits_for_its_last_training_job_and_the_comparison_for_all(file: Path) -> None:
    jobs = {job.name: job for job in plan(load_experiment(file), file)}
    names = [f"{v}-seed{s}" for v in ("vanilla", "one-sink-token") for s in (1, 2)]
    assert list(jobs) == [
        *(f"train-{n}-{k}" for n in names for k in (1, 2)),
        *(f"stream-{n}" for n in names),
        "compare",
    ]
    for name in names:
        assert jobs[f"train-{name}-1"].after is None
        assert jobs[f"train-{name}-2"].after == ("afterany", (f"train-{name}-1",))
        assert jobs[f"stream-{name}"].after == ("afterok", (f"train-{name}-2",))
    assert jobs["compare"].after == ("afterok", tuple(f"stream-{n}" for n in names))
    words = command(jobs["train-vanilla-seed2-2"], Path("slurm"), {"train-vanilla-seed2-1": "17"})
    assert {"--dependency=afterany:17", "--kill-on-invalid-dep=yes", "--nodes=2", "--ntasks-per-node=4"} <= set(words)
    assert {"--gpus-per-node=4", "--time=01:30:00"} <= set(words)


def test_as_an_array_tasks_are_waited_for_one_by_one(tmp_path: Path) -> None:
    file = written(tmp_path, {"array": True, "attempts": 1, "at_once": 3})
    jobs = plan(load_experiment(file), file)
    assert [j.name for j in jobs][:2] == ["sweep-1", "stream-vanilla-seed1"]
    assert "--array=0-3%3" in jobs[0].options
    assert "--dependency=afterok:9_2" in command(jobs[3], Path("slurm"), {"sweep-1": "9"})
    flags = load_member(file, 2).train_flags()
    config = load_run_config(flags)
    assert config.sink.mechanism == "sink_tokens"
    assert (config.training.seed, config.training.nodes, config.training.devices) == (1, 2, 4)
    assert config.data.shuffle is True
    assert load_run_config(["--experiment", str(file), "--member=2"]) == config


@pytest.mark.parametrize("array", [False, True])
def test_dry_run_prints_a_script_that_sends_the_same(array: bool, tmp_path: Path, capsys) -> None:
    """Run with an sbatch that only notes what it is given: words stay whole, ids find their place."""
    file = written(tmp_path, {"array": array})
    assert main(["submit", str(file), "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert not (tmp_path / "results here").exists()
    count = "n=$(($(cat $HERE/n 2>/dev/null || echo 100) + 1)); echo $n | tee $HERE/next; mv $HERE/next $HERE/n"
    fake = programs(tmp_path / "bin", sbatch=count + '; printf "%s\\n" "$@" >$HERE/$n')
    subprocess.run(["bash", "-euc", script], check=True, env={"PATH": f"{fake}:/usr/bin:/bin"})
    sent = {int(p.name): p.read_text().splitlines() for p in fake.iterdir() if p.name.isdigit()}
    experiment = load_experiment(file)
    jobs = plan(experiment, kept_file(experiment, file) if array else file)
    assert kept_file(experiment, file).is_file() == array
    ids = {job.name: str(101 + i) for i, job in enumerate(jobs)}
    assert sent == {101 + i: command(job, script_folder(), ids)[1:] for i, job in enumerate(jobs)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"variants": []}, "variants is not set"),
        ({"variants": ["vanila"]}, "did you mean vanilla"),
        ({"settings": {"training.stpes": 3}}, "there is no flag --training.stpes; did you mean --training.steps"),
        ({"hours": "24:00:00"}, "'hours' must be float"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"seeds": [1, 1]}, "would be trained twice"),
        ({"shape": 1}, "unknown setting 'shape'"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(changes: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        submit(str(written(tmp_path, changes)))
    assert not (tmp_path / "results here").exists()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("experiments/*.yaml")), ids=lambda p: p.stem)
def test_the_experiments_that_come_with_the_project_are_valid(path: Path) -> None:
    experiment = load_experiment(path)
    check(experiment)
    context = load_run_config(experiment.members()[0].train_flags()).model.context
    assert all(c.size <= context for c in map(Cache.parse, experiment.evaluate.cache.split(",")))


def test_members_are_numbered(file: Path) -> None:
    with pytest.raises(UserError, match="members 0 to 3, not 4"):
        load_member(file, 4)
    with pytest.raises(UserError, match="go together"):
        load_run_config(["--experiment", str(file)])


def test_tasks_of_an_array_are_those_that_were_submitted(tmp_path: Path, monkeypatch) -> None:
    """A task reads the experiment when it starts, maybe days later, when its file describes the next one."""
    file = written(tmp_path, {"array": True, "attempts": 1})
    fake = programs(tmp_path / "bin", sbatch='echo "${@: -1}" >>$HERE/last; echo 1')
    monkeypatch.setenv("PATH", f"{fake}:/usr/bin:/bin")
    assert submit(str(file)) == 0
    before = load_member(file, 2)
    written(tmp_path, {"array": True, "attempts": 1, "variants": ["zero-sink", "vanilla", "one-sink-token"]})
    assert load_member(file, 2) != before
    assert load_member(Path((fake / "last").read_text().splitlines()[0]), 2) == before


def test_what_is_refused_half_way_is_taken_back(file: Path, tmp_path: Path, monkeypatch) -> None:
    fake = programs(
        tmp_path / "bin",
        sbatch="[ -e $HERE/once ] && { echo full >&2; exit 1; }; touch $HERE/once; echo 41",
        scancel='echo "$@" >$HERE/cancelled',
    )
    monkeypatch.setenv("PATH", f"{fake}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"sbatch refused the job \(full\)"):
        submit(str(file))
    assert (fake / "cancelled").read_text().strip() == "41"
