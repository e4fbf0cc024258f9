"""An experiment: every variant and seed trained alike, evaluated, compared; one YAML file and the flags it means."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sinkpretrain.config import load_yaml
from sinkpretrain.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """Streaming evaluation of every trained model.

    Args:
        tokens: what ``stream --tokens`` takes; empty: no evaluation.
        cache: cache settings x+y, separated by commas.
        settings: further flags of ``stream``, e.g. ``{dtype: bfloat16}``.
        hours: time limit of each job, and of the comparison's.
    """

    tokens: str = ""
    cache: str = "0+1024,1+1023,2+1022,4+1020"
    settings: dict[str, Any] = field(default_factory=dict)
    hours: float = 4.0


@dataclass(frozen=True)
class Experiment:
    """What ``sinkpretrain submit`` sends to the cluster.

    Args:
        out: folder for everything: runs/, results/, comparison/ and logs/.
        recipe: recipes that all runs share, separated by commas.
        variants: one recipe per variant (``vanilla``, ``one-sink-token``, ...).
        seeds: seeds of the initial weights; the data order is the same for all runs, so that they can be paired.
        settings: dotted settings that all runs share, e.g. ``{data.path: data/pile}``.
        nodes: nodes per run.
        devices: processes per node, one per GPU.
        gpus: whether they need GPUs.
        cpus: CPUs per process.
        hours: time limit of a training job; a run that needs longer goes back into the queue.
        attempts: training jobs per run, one after the other; each goes on where the one before ended, and one that
            finds the run finished ends at once. What requeueing does not cover (a full disk, a SIGTERM) costs one.
        array: submit the training as an array, one task per run.
        at_once: most runs at the same time: tasks of the array (0 means all), or processes of ``submit --local`` (0
            means as many as there are GPUs for).
        evaluate: the streaming evaluation.
    """

    out: str = ""
    recipe: str = "pythia-160m"
    variants: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [1234])
    settings: dict[str, Any] = field(default_factory=dict)
    nodes: int = 1
    devices: int = 8
    gpus: bool = True
    cpus: int = 8
    hours: float = 24.0
    attempts: int = 2
    array: bool = False
    at_once: int = 0
    evaluate: Evaluation = field(default_factory=Evaluation)

    def members(self) -> list[Member]:
        """One per variant and seed, in the order of the array."""
        return [Member(self, variant, seed) for variant in self.variants for seed in self.seeds]

    def compare_flags(self) -> list[str]:
        """Arguments of ``sinkpretrain compare`` over all runs and their results."""
        return [f"{self.out}/results", f"{self.out}/runs", f"--out={self.out}/comparison"]


@dataclass(frozen=True)
class Member:
    """One run of an experiment."""

    experiment: Experiment
    variant: str
    seed: int

    @property
    def name(self) -> str:
        stem = Path(self.variant).stem
        return stem if len(self.experiment.seeds) == 1 else f"{stem}-seed{self.seed}"

    @property
    def run(self) -> str:
        return str(Path(self.experiment.out) / "runs" / self.name)

    @property
    def results(self) -> str:
        return str(Path(self.experiment.out) / "results" / self.name)

    def train_flags(self) -> list[str]:
        """Flags of ``sinkpretrain train``."""
        e = self.experiment
        own = {
            "training.nodes": e.nodes,
            "training.devices": e.devices,
            "training.seed": self.seed,
            "name": self.name,
            "out": self.run,
        }
        return ["--config", f"{e.recipe},{self.variant}", *flags(e.settings | own)]

    def stream_flags(self) -> list[str]:
        """Arguments of ``sinkpretrain stream``."""
        e = self.experiment.evaluate
        own = {"tokens": e.tokens, "cache": e.cache, "out": self.results}
        return [self.run, *flags(e.settings | own)]


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as command line flags."""
    return [f"--{name}={_text(value)}" for name, value in settings.items()]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment; raises UserError, naming the setting."""
    experiment = load_yaml(Experiment, path)
    for name in ("out", "variants", "seeds"):
        if not getattr(experiment, name):
            raise UserError(f"{path}: {name} is not set.")
    for name in ("nodes", "devices", "cpus", "attempts"):
        if getattr(experiment, name) < 1:
            raise UserError(f"{path}: {name} must be at least 1, not {getattr(experiment, name)}.")
    if experiment.hours <= 0 or experiment.evaluate.hours <= 0:
        raise UserError(f"{path}: hours must be more than 0.")
    names = [m.name for m in experiment.members()]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"{path}: {', '.join(twice)} would be trained twice; name every variant and seed once.")
    # As text that names files, paths mean the same in every job.
    return dataclasses.replace(experiment, out=str(Path(experiment.out).absolute()))


def load_member(path: Path, number: int) -> Member:
    """One run of the experiment in ``path``; raises UserError if there is no such number."""
    members = load_experiment(path).members()
    if not 0 <= number < len(members):
        raise UserError(f"{path} has the members 0 to {len(members) - 1}, not {number}.")
    return members[number]
