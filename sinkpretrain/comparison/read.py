"""What a comparison reads: folders of ``stream``, ``train``, ``inspect``, ``zero-shot``, merged and checked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinkpretrain import metrics
from sinkpretrain.config import RunConfig, load_yaml
from sinkpretrain.errors import UserError
from sinkpretrain.evaluate import FORMAT, RESULTS, changed_configuration
from sinkpretrain.files import read_json
from sinkpretrain.sinks import REGISTRY, label

ZERO_SHOT, INSPECTION = "zero_shot.json", "inspect.json"


@dataclass(frozen=True)
class About:
    """What a command found out about one model (``inspect``, ``zero-shot``; ``Result`` for ``stream``)."""

    folder: Path
    data: dict[str, Any]

    @property
    def mechanism(self) -> str:
        return str(self.data["model"]["mechanism"])

    @property
    def name(self) -> str:
        return str(self.data["model"]["name"])


@dataclass(frozen=True)
class Result(About):
    """One model over one text, as ``sinkpretrain stream`` left it, in one folder or in several.

    files: the losses of each setting, which may have stayed on another machine.
    sources: the content of each results file that something is shown from, with its folder.
    """

    files: dict[str, Path]
    sources: list[dict[str, Any]]

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        settings: dict[str, dict[str, Any]] = self.data["settings"]
        return settings

    @property
    def tokens(self) -> dict[str, Any]:
        tokens: dict[str, Any] = self.data["tokens"]
        return tokens

    def ppl(self, setting: str) -> float:
        """Perplexity; JSON has null where it is not a number, or infinite although the mean loss is one."""
        value = self.settings[setting]["ppl"]
        if value is not None:
            return float(value)
        return math.nan if self.settings[setting].get("nll") is None else math.inf

    def nll(self, setting: str) -> NDArray[np.float32] | None:
        """Losses, float32 [tokens - 1]; None if there is no file; raises UserError if it is not whole or of another
        text."""
        path = self.files[setting]
        try:
            values: NDArray[np.float32] = np.load(path)
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"cannot read the losses {path}: {error}; run stream again.") from error
        if values.shape != (self.tokens["count"] - 1,):
            raise UserError(
                f"{path} holds losses of shape {values.shape}, not the {self.tokens['count'] - 1} of its text; "
                "run stream again."
            )
        return values

    def difference(self, setting: str, reference: str) -> dict[str, Any] | None:
        """What ``stream`` wrote of two settings when it had their losses; None if it set them against others."""
        # Of a model in several folders, a setting may be shown from another one than the differences'.
        sources = (source for source in self.sources if source["settings"].keys() >= {setting, reference})
        known: list[dict[str, Any]] = [d for source in sources for d in source.get("differences", [])]
        return next((d for d in known if (d["setting"], d["against"]) == (setting, reference)), None)


@dataclass(frozen=True)
class Run:
    """One training run.

    lines: of metrics.jsonl.
    about: of run.json; empty if there is none.
    """

    folder: Path
    config: RunConfig
    lines: list[dict[str, Any]]
    about: dict[str, Any]

    @property
    def name(self) -> str:
        return self.config.name or self.folder.name

    @property
    def mechanism(self) -> str:
        return label(self.config.sink)

    @property
    def probes(self) -> list[dict[str, Any]]:
        """The lines with sink measures."""
        return [line for line in self.lines if line["kind"] == "probe"]

    def curve(self, kind: str) -> tuple[list[int], list[float]]:
        """Steps and losses of the lines of one kind (train, validation)."""
        # A step that was skipped has no loss.
        chosen = [line for line in self.lines if line["kind"] == kind and line["loss"] is not None]
        return [line["step"] for line in chosen], [line["loss"] for line in chosen]


@dataclass
class Found:
    """Everything to compare."""

    results: list[Result] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    inspections: list[About] = field(default_factory=list)
    zero_shot: list[About] = field(default_factory=list)


def find(paths: list[Path]) -> Found:
    """What lies at, or up to two levels below, the paths; the same folder given twice counts once.

    Raises:
        UserError: nothing there, results over different texts, or runs on different data.
    """
    results: dict[Path, Result] = {}
    runs: dict[Path, Run] = {}
    abouts: dict[str, dict[Path, About]] = {ZERO_SHOT: {}, INSPECTION: {}}
    for path in paths:
        found = False
        for folder in [path, *sorted(path.glob("*")), *sorted(path.glob("*/*"))]:
            key = folder.resolve()
            if (folder / RESULTS).is_file():
                results.setdefault(key, read_result(folder))
                found = True
            if (folder / "config.yaml").is_file() and (folder / metrics.FILE).is_file():
                runs.setdefault(key, read_run(folder))
                found = True
            for file, known in abouts.items():
                if (folder / file).is_file():
                    known.setdefault(key, read_about(folder / file))
                    found = True
        if not found:
            raise UserError(f"{path} holds neither results of stream, inspect or zero-shot nor a training run.")
    # Before models are merged: the same model over another text is not the same result.
    check_same_text(list(results.values()))
    check_same_data(list(runs.values()))
    return Found(
        sorted(merge(list(results.values())), key=by_mechanism),
        sorted(runs.values(), key=by_mechanism),
        *(sorted(newest(abouts[file].values()), key=by_mechanism) for file in (INSPECTION, ZERO_SHOT)),
    )


def by_mechanism(entry: Run | About) -> tuple[int, str]:
    """Mechanisms in the order of their registry."""
    names = list(REGISTRY)
    kind = entry.mechanism.partition("(")[0]
    return (names.index(kind) if kind in names else len(names), entry.mechanism)


def newest(abouts: Iterable[About]) -> list[About]:
    """One per model: what was found out last."""
    found: list[About] = []
    for about in reversed(sorted(abouts, key=lambda a: str(a.data.get("created", "")))):
        if not any(same_model(about.data["model"], later.data["model"]) for later in found):
            found.append(about)
    return found[::-1]


def same_model(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results are of the same weights under the same configuration."""
    return bool(a["sha256"] == b["sha256"]) and changed_configuration(a, b) is None


def read_run(folder: Path) -> Run:
    """The training run in a folder."""
    about = folder / "run.json"
    return Run(
        folder,
        load_yaml(RunConfig, folder / "config.yaml"),
        list(metrics.read(folder)),
        read_json(about) if about.is_file() else {},
    )


def read_about(path: Path) -> About:
    """A file of ``inspect`` or ``zero-shot``; raises UserError if it is something else."""
    data = read_json(path)
    if not isinstance(data, dict) or data.get("what") != path.stem or "model" not in data:
        raise UserError(f"{path} was not written by sinkpretrain {path.stem.replace('_', '-')}; remove or rename it.")
    return About(path.parent, data)


def read_result(folder: Path) -> Result:
    """The results in a folder; raises UserError for another release's format or a file of something else."""
    path = folder / RESULTS
    data = read_json(path)
    if not isinstance(data, dict) or not data.keys() >= {"format", "model", "tokens", "settings"}:
        raise UserError(f"{path} was not written by sinkpretrain stream; name the folder that stream wrote.")
    if data["format"] != FORMAT:
        raise UserError(
            f"{path} has format {data['format']} and this release reads {FORMAT}; "
            "use the release that wrote it, or run stream again."
        )
    files = {s: folder / entry["file"] for s, entry in data["settings"].items()}
    return Result(folder, data, files, [{"folder": str(folder)} | data])


def merge(results: list[Result]) -> list[Result]:
    """One result per model: settings streamed into several folders come together, one found twice counts once."""
    models: list[Result] = []
    for result in results:
        place = next((n for n, m in enumerate(models) if same_model(m.data["model"], result.data["model"])), None)
        if place is None:
            models.append(result)
            continue
        first = models[place]
        twice = [s for s in result.settings if s in first.settings]
        if twice:
            warnings.warn(
                f"{result.folder} holds {', '.join(twice)} of the same model as {first.folder}; "
                f"shown once, from {first.folder}.",
                stacklevel=2,
            )
        new = {s: entry for s, entry in result.settings.items() if s not in first.settings}
        models[place] = Result(
            first.folder,
            first.data | {"settings": first.settings | new},
            result.files | first.files,
            first.sources + ([result.sources[0] | {"settings": new}] if new else []),
        )
    return models


def check_same_text(results: list[Result]) -> None:
    """Refuse perplexities over different tokens: another hash, or another number of them."""
    for other in results[1:]:
        first = results[0]
        if any(other.tokens[key] != first.tokens[key] for key in ("sha256", "count")):
            raise UserError(
                f"{first.folder} and {other.folder} were streamed over different texts "
                f"({first.tokens['count']:,} and {other.tokens['count']:,} tokens); compare results "
                "over the same one."
            )


def check_same_data(runs: list[Run]) -> None:
    """Refuse runs that were trained, or validated, on different data: their losses say nothing about each other."""
    known = [run for run in runs if run.about.get("data")]
    for run in (r for r in runs if not r.about.get("data")):
        if len(runs) > 1:
            warnings.warn(f"{run.folder} does not say what data it was trained on.", stacklevel=2)
    for other in known[1:]:
        first, a, b = known[0], known[0].about["data"], other.about["data"]
        changed = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        if changed:
            values = ", ".join(f"{key} {str(a.get(key))[:12]} and {str(b.get(key))[:12]}" for key in changed)
            raise UserError(
                f"{first.folder} and {other.folder} were trained on different data ({values}); compare runs on the "
                "same data."
            )


def setting_order(name: str) -> tuple[Any, ...]:
    """Caches by size, x, and reading of the column; the other strategies behind them."""
    cache, _, suffix = name.partition("-")
    start, plus, recent = cache.partition("+")
    if plus and start.isdigit() and recent.isdigit():
        return (0, int(start) + int(recent), int(start), suffix)
    return (1, name)
