"""A whole experiment as Slurm jobs: training of every variant, then evaluation, then comparison, chained."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from sinkpretrain import local as here
from sinkpretrain.errors import UserError
from sinkpretrain.experiment import Experiment, load_experiment
from sinkpretrain.files import sha256_file, write_bytes

SITE_FILE = "site.env"


@dataclass(frozen=True)
class Job:
    """One call of sbatch.

    name: unique within the experiment.
    after: Slurm's dependency type and the job it is about (with ``_k``: task k of that array), or None.
    options: of sbatch.
    script: file name of the job script.
    arguments: of the script.
    """

    name: str
    script: str
    options: tuple[str, ...]
    arguments: tuple[str, ...]
    after: tuple[str, tuple[str, ...]] | None = None


def plan(experiment: Experiment, file: Path) -> list[Job]:
    """The jobs of an experiment in the order of submission; pure."""
    e, members = experiment, experiment.members()
    jobs = training(e, file)
    if not e.evaluate.tokens:
        return jobs
    limits = _limits(e, e.evaluate.hours)
    one_gpu = ("--gpus-per-node=1",) if e.gpus else ()
    evaluations = [
        Job(
            f"stream-{member.name}",
            "eval.sbatch",
            (*limits, *one_gpu, _log(e, f"stream-{member.name}-%j")),
            ("stream", *member.stream_flags()),
            ("afterok", (f"sweep-{e.attempts}_{number}" if e.array else f"train-{member.name}-{e.attempts}",)),
        )
        for number, member in enumerate(members)
    ]
    after = ("afterok", tuple(job.name for job in evaluations))
    comparison = Job("compare", "eval.sbatch", (*limits, _log(e, "compare-%j")), ("compare", *e.compare_flags()), after)
    return [*jobs, *evaluations, comparison]


def training(experiment: Experiment, file: Path) -> list[Job]:
    """The jobs that train: an array, or some for each run."""
    e, members = experiment, experiment.members()
    gpus = (f"--gpus-per-node={e.devices}",) if e.gpus else ()
    options = (f"--nodes={e.nodes}", f"--ntasks-per-node={e.devices}", *gpus, *_limits(e, e.hours))
    if e.array:
        tasks = f"--array=0-{len(members) - 1}" + (f"%{e.at_once}" if e.at_once else "")
        first = Job("sweep", "sweep.sbatch", (tasks, *options, _log(e, "train-%A_%a")), (str(file.absolute()),))
        return _in_turn(first, e.attempts)
    jobs = []
    for m in members:
        name = f"train-{m.name}"
        first = Job(name, "train.sbatch", (*options, _log(e, f"{name}-%j")), tuple(m.train_flags()))
        jobs += _in_turn(first, e.attempts)
    return jobs


def _in_turn(job: Job, times: int) -> list[Job]:
    """A job so many times, each behind the one before, however that ended."""
    names = [f"{job.name}-{number}" for number in range(1, times + 1)]
    after = [None, *(("afterany", (name,)) for name in names)]
    return [replace(job, name=name, after=before) for name, before in zip(names, after, strict=False)]


def _limits(experiment: Experiment, hours: float) -> tuple[str, ...]:
    minutes = max(1, round(60 * hours))
    return (f"--cpus-per-task={experiment.cpus}", f"--time={minutes // 60:02d}:{minutes % 60:02d}:00")


def _log(experiment: Experiment, name: str) -> str:
    return f"--output={experiment.out}/logs/{name}.log"


def command(job: Job, scripts: Path, ids: dict[str, str]) -> list[str]:
    """The call of sbatch; ``ids`` gives the id of every job before it."""
    dependency = []
    if job.after is not None:
        kind, names = job.after
        # Without the second, a job whose dependency can never be fulfilled waits for ever.
        dependency = [f"--dependency={kind}:{':'.join(_id(n, ids) for n in names)}", "--kill-on-invalid-dep=yes"]
    options = [f"--job-name={job.name}", *dependency, *job.options]
    return ["sbatch", "--parsable", *options, str(scripts / job.script), *job.arguments]


def _id(name: str, ids: dict[str, str]) -> str:
    if name in ids:
        return ids[name]
    array, _, task = name.rpartition("_")
    return f"{ids[array]}_{task}"


# --- sending ------------------------------------------------------------------------------------------------------


def submit(file: str, dry_run: bool = False, site: str = "", local: bool = False) -> int:
    """A whole experiment: training of every variant and seed, then streaming evaluation, then comparison.

    A job starts when the one before it ended well, and is cancelled when that cannot happen any more. Given again, the
    command goes on where the jobs ended.

    Args:
        file: the experiment's YAML file.
        dry_run: print the commands, as a shell script, instead.
        site: file with the site's settings; by default site.env beside the job scripts.
        local: do it on this machine, without Slurm: as many runs at the same time as there are GPUs for, or at_once.

    Returns:
        Exit code. The ids of the jobs and their names are printed, one job per line.

    Raises:
        UserError: a setting is wrong (all runs are checked first), or Slurm refuses; nothing stays submitted.
    """
    experiment = load_experiment(Path(file))
    check(experiment)
    if local and dry_run:
        print("\n".join(here.as_script(experiment)))
        return 0
    if local:
        return here.run_here(experiment)
    for name, number in send(experiment, Path(file), dry_run, site).items():
        print(f"{number}\t{name}")
    return 0


def send(experiment: Experiment, file: Path, dry_run: bool = False, site: str = "") -> dict[str, str]:
    """Send the jobs to Slurm, or print the calls of sbatch; returns their ids by name, raises as ``submit`` does."""
    scripts = script_folder()
    environment = {"SINKPRETRAIN_SLURM": str(scripts), "SINKPRETRAIN_SITE": str(_site(site, scripts))}
    kept = kept_file(experiment, file) if experiment.array else None
    jobs = plan(experiment, kept or file)
    if dry_run:
        copies = {file: kept} if kept else {}
        print("\n".join(as_script(jobs, scripts, environment, copies)))
        return {}
    logs = Path(experiment.out) / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {logs}: {error.strerror}.") from error
    if kept:
        write_bytes(kept, file.read_bytes())
    ids: dict[str, str] = {}
    try:
        for job in jobs:
            ids[job.name] = _send(command(job, scripts, ids), environment)
    except BaseException:  # Ctrl-C too
        if ids:
            subprocess.run(["scancel", *ids.values()], check=False)
        raise
    return ids


def kept_file(experiment: Experiment, file: Path) -> Path:
    """Where the experiment's file is copied to for the tasks of an array, which read it when they start, and again when
    they come back: in between, somebody may have edited it for the next experiment."""
    return Path(experiment.out) / f"{file.stem}-{sha256_file(file)[:12]}.yaml"


def check(experiment: Experiment) -> None:
    """Check the settings of every run before any is submitted; raises UserError."""
    from sinkpretrain.commands import load_run_config

    for member in experiment.members():
        try:
            sink = load_run_config(member.train_flags()).sink
            if sink.from_outside:  # its module may be missing; looking costs the import of torch
                from sinkpretrain.sinks import mechanism_class

                mechanism_class(sink)
        except UserError as error:
            raise UserError(f"{member.name}: {error}") from error


def script_folder() -> Path:
    """The job scripts: inside the package in a wheel, beside it in a checkout."""
    here = Path(__file__).parent
    for folder in (here / "slurm", here.parent / "slurm"):
        if (folder / "train.sbatch").is_file():
            return folder
    raise UserError("the job scripts (slurm/train.sbatch ...) are not installed; install sinkpretrain again.")


def _site(given: str, scripts: Path) -> Path:
    path = Path(given) if given else scripts / SITE_FILE
    if not path.is_file():
        raise UserError(f"there is no file {path} with the site's settings; see slurm/{SITE_FILE} for one.")
    return path.absolute()


def as_script(
    jobs: list[Job], scripts: Path, environment: dict[str, str], copies: dict[Path, Path] | None = None
) -> list[str]:
    """The same as lines of a shell script that can be run; ``copies`` are made before anything is sent."""
    names = {job.name: f"${{{_variable(job.name)}}}" for job in jobs}
    lines = [f"export {k}={shlex.quote(v)}" for k, v in environment.items()]
    lines.append('source "$SINKPRETRAIN_SITE"')
    outs = {shlex.quote(str(Path(o[9:]).parent)) for job in jobs for o in job.options if o.startswith("--output=")}
    lines += [f"mkdir -p {folder}" for folder in sorted(outs)]
    lines += [shlex.join(["cp", str(source.absolute()), str(copy)]) for source, copy in (copies or {}).items()]
    for job in jobs:
        words = [w if "${" in w else shlex.quote(w) for w in command(job, scripts, names)]
        lines.append(f"{_variable(job.name)}=$({' '.join(words)})")
    return lines


def _variable(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _send(words: list[str], environment: dict[str, str]) -> str:
    # Through a shell, because the site's settings are one; sbatch gets its words unchanged.
    shell = ["bash", "-c", 'source "$SINKPRETRAIN_SITE" && exec "$@"', "submit", *words]
    try:
        done = subprocess.run(shell, env=os.environ | environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"cannot run sbatch: {error}.") from error
    if done.returncode:
        raise UserError(f"sbatch refused the job ({' '.join(done.stderr.split()) or done.returncode}).")
    return done.stdout.strip().partition(";")[0]
