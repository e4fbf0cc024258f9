"""The numbers of a comparison, as plain records: perplexities, speed, sinks, tasks."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from sinkpretrain import evaluate, metrics
from sinkpretrain.comparison import paper
from sinkpretrain.comparison.read import About, Found, Result, Run, setting_order
from sinkpretrain.config import to_dict
from sinkpretrain.statistics import paired_difference, t_interval

Losses = NDArray[np.float32]
Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Models that differ in their seed only.

    title: the mechanism, with names and step where several groups share it.
    losses: of each model, by setting; not of all settings where files are missing.
    """

    title: str
    mechanism: str
    results: list[Result]
    losses: list[dict[str, Losses]]

    def perplexities(self, setting: str) -> list[float]:
        return [r.ppl(setting) for r in self.results if setting in r.settings]

    def of(self, setting: str) -> list[tuple[Any, Losses]]:
        """(seeds, losses) of each model that has the setting; seeds of None are not known. None of them where one's
        losses are missing: a mean over the others would stand beside perplexities over all."""
        having = [(r, of) for r, of in zip(self.results, self.losses, strict=True) if setting in r.settings]
        return [(_seeds(r), of[setting]) for r, of in having] if all(setting in of for _, of in having) else []

    def having(self, *settings: str) -> Group:
        """The models that have all of these settings."""
        kept = [i for i, r in enumerate(self.results) if r.settings.keys() >= {*settings}]
        return replace(self, results=[self.results[i] for i in kept], losses=[self.losses[i] for i in kept])

    def mean_losses(self, setting: str) -> NDArray[np.floating]:
        """Losses [tokens - 1], mean over the seeds."""
        return mean_over([losses for _, losses in self.of(setting)])

    @property
    def settings(self) -> dict[str, Record]:
        """What each setting was, of the models together."""
        return {s: entry for r in self.results for s, entry in r.settings.items()}

    def reference(self, entry: Record) -> str | None:
        """The cache that ``stream`` would set another one against, which may be another model's, of those that these
        models were streamed with; None if it is no cache, or none is as large and treats documents alike."""
        settings = self.settings
        found = None if entry["recent"] is None else evaluate.reference(entry, settings)
        return found if found is not None and evaluate.alike(entry, settings[found]) else None


def mean_over(losses: Sequence[Losses]) -> NDArray[np.floating]:
    """Losses [tokens - 1], mean over the models."""
    return losses[0] if len(losses) == 1 else np.mean(losses, axis=0, dtype=np.float64)


def _seeds(model: About) -> tuple[int, ...] | None:
    """Seeds of the initial weights and of the data order: two trainings with the same ones are a pair."""
    seeds = model.data["model"].get("seeds")
    return (seeds["training"], seeds["data"]) if seeds else None


def group(results: list[Result]) -> list[Group]:
    """Models of one mechanism, shape and number of steps together, unless two of them have the same seeds.

    Reads all losses that are there; raises UserError if it cannot.
    """

    def losses(r: Result) -> dict[str, Losses]:
        return {s: nll for s in r.settings if (nll := r.nll(s)) is not None}

    return [Group(title, of[0].mechanism, of, [losses(r) for r in of]) for title, of in by_seed(results)]


Model = TypeVar("Model", bound=About)


def by_seed(models: Sequence[Model]) -> list[tuple[str, list[Model]]]:
    """Title and members of each group of models of one mechanism, shape and number of steps."""
    alike: dict[str, list[Model]] = defaultdict(list)
    for m in models:
        model = m.data["model"]
        alike[json.dumps([m.mechanism, model["shape"], model["step"]], sort_keys=True)].append(m)
    members = [part for found in alike.values() for part in _only_seeds_differ(found)]
    groups_of = Counter(found[0].mechanism for found in members)
    return [(of[0].mechanism if groups_of[of[0].mechanism] == 1 else full_name(of), of) for of in members]


def _only_seeds_differ(models: list[Model]) -> list[list[Model]]:
    """The models as one group; each alone if two have the same seeds, for then something else differs as well."""
    known = [seeds for seeds in map(_seeds, models) if seeds is not None]
    return [models] if len(known) == len(set(known)) else [[m] for m in models]


def runs_by_seed(runs: list[Run]) -> list[tuple[str, Run]]:
    """Every run with the name that its curves go by: its own, or the mechanism's if all its runs are seeds of one
    recipe."""
    of: dict[str, list[Run]] = defaultdict(list)
    for r in runs:
        of[r.mechanism].append(r)

    def alike(same: list[Run]) -> bool:
        seeds = {(r.config.training.seed, r.config.data.seed) for r in same}
        return len(set(map(_recipe, same))) == 1 and len(seeds) == len(same) > 1

    return [(r.mechanism if alike(of[r.mechanism]) else r.name, r) for r in runs]


def steps_differ(runs: list[Run]) -> bool:
    """Whether steps of these runs have different numbers of tokens: then they compare by tokens and not by steps."""
    sizes = [metrics.tokens_per_step(r.lines) for r in runs]
    return all(sizes) and len(set().union(*sizes)) > 1


def _recipe(run: Run) -> str:
    """What a run was told to do, but for its seeds and where it writes."""
    told = to_dict(run.config)
    for section, setting in (("training", "seed"), ("data", "seed")):
        told[section].pop(setting)
    return json.dumps({k: v for k, v in told.items() if k not in ("name", "out", "log")}, sort_keys=True, default=str)


def full_name(of: Sequence[About]) -> str:
    """``vanilla: small, step 500``: what tells models from others of their mechanism."""
    names = ", ".join(dict.fromkeys(entry.name for entry in of))
    step = of[0].data["model"]["step"]
    return f"{of[0].mechanism}: {names}" + (f", step {step:,}" if step is not None else "")


def titles(of: Sequence[About]) -> list[str]:
    """The mechanism of each, with its name and step where several share one."""
    counts = Counter(entry.mechanism for entry in of)
    return [entry.mechanism if counts[entry.mechanism] == 1 else full_name([entry]) for entry in of]


# --- perplexity ---------------------------------------------------------------------------------------------------


def perplexities(results: list[Result], settings: list[str]) -> list[Record]:
    """One record per model and setting; the interval is over blocks of the text."""
    return [
        {
            "mechanism": r.mechanism,
            "name": r.name,
            "step": r.data["model"]["step"],
            "setting": s,
            "perplexity": r.ppl(s),
            "low": r.settings[s]["interval"][0],
            "high": r.settings[s]["interval"][1],
            "paper": paper.value(r.mechanism, s, r.data["model"]["shape"]),
        }
        for r in results
        for s in settings
        if s in r.settings
    ]


def cells(group: Group, settings: list[str]) -> dict[str, Record]:
    """By setting: mean over the seeds, its t-interval if there are several, and the paper's value."""
    found = {}
    for s in settings:
        values = group.perplexities(s)
        if values:
            interval = t_interval(values) or (None, None)
            found[s] = {
                "mean": float(np.mean(values)),
                "low": interval[0],
                "high": interval[1],
                "n": len(values),
                "paper": paper.value(group.mechanism, s, group.results[0].data["model"]["shape"]),
            }
    return found


# --- training, speed ----------------------------------------------------------------------------------------------


def training(run: Run) -> Record:
    """Where a run stands, and how fast it went there."""
    steps, losses = run.curve("train")
    _, validation = run.curve("validation")
    rates = [line["tokens_per_second"] for line in run.lines if "tokens_per_second" in line]
    memory = [line["peak_memory_bytes"] for line in run.lines if "peak_memory_bytes" in line]
    attempts = run.about.get("attempts") or [{}]
    return {
        "folder": str(run.folder),
        "name": run.name,
        "mechanism": run.mechanism,
        "seed": run.config.training.seed,
        "steps": steps[-1] if steps else 0,
        "training_loss": float(np.mean(losses[-20:])) if losses else None,
        "validation_loss": validation[-1] if validation else None,
        "tokens_per_second": float(np.median(rates)) if rates else None,
        "peak_memory_bytes": max(memory) if memory else None,
        "device": " then ".join(dict.fromkeys(a["device"] for a in attempts if "device" in a)),
    }


@dataclass(frozen=True)
class SameBatches:
    """Training losses of a run minus those of another on the same batches.

    steps: those that both have, with as many tokens read.
    nats: the difference of each.
    """

    run: Run
    base: Run
    steps: NDArray[np.int64]
    nats: NDArray[np.float64]


LAST = 5
"""The last fifth of the steps says where a training loss ended."""


def same_batches(runs: list[Run]) -> list[SameBatches]:
    """Every run beside a vanilla one that saw the same batches, of the same initial weights if there is one."""
    vanilla = [r for r in runs if r.mechanism == "vanilla"]
    found = []
    for run in runs:
        others = [v for v in vanilla if v is not run and _order(v) == _order(run)]
        others.sort(key=lambda v: v.config.training.seed != run.config.training.seed)
        if run.mechanism != "vanilla" and others and run.about.get("data") and others[0].about.get("data"):
            ours, theirs = _losses(run), _losses(others[0])
            steps = np.array(
                sorted(s for s in ours.keys() & theirs.keys() if ours[s][0] == theirs[s][0]), dtype=np.int64
            )
            if len(steps) >= LAST:
                nats = np.array([ours[s][1] - theirs[s][1] for s in steps.tolist()])
                found.append(SameBatches(run, others[0], steps, nats))
    return found


def _order(run: Run) -> tuple[Any, ...]:
    """What decides which samples are in which batch, but for their number; the data were found to be the same."""
    data = run.config.data
    return run.config.model.context, data.seed, data.shuffle


def _losses(run: Run) -> dict[int, tuple[int, float]]:
    """By step: the tokens read so far, and the training loss."""
    lines = (line for line in run.lines if line["kind"] == "train" and line["loss"] is not None)
    return {line["step"]: (line.get("tokens", 0), line["loss"]) for line in lines}


def training_difference(pair: SameBatches) -> Record:
    """Over the last fifth of the steps that two runs share: nats, with the 95 % interval over blocks of steps."""
    last = pair.nats[-max(1, len(pair.nats) // LAST) :]
    nats, low, high = paired_difference(last, np.zeros_like(last))
    return {
        "name": pair.run.name,
        "mechanism": pair.run.mechanism,
        "seed": pair.run.config.training.seed,
        "against": pair.base.name,
        "first_step": int(pair.steps[-len(last)]),
        "last_step": int(pair.steps[-1]),
        "nats": nats,
        "low": low,
        "high": high,
    }


def streaming_speed(results: list[Result]) -> list[Record]:
    """One record per model and setting."""
    return [
        {
            "title": title,
            "setting": s,
            "tokens_per_second": entry.get("tokens_per_second"),
            "peak_memory_bytes": entry.get("peak_memory_bytes"),
            "dtype": entry.get("dtype", r.data["dtype"]),
            "device": r.data["device"],
        }
        for title, r in zip(titles(results), results, strict=True)
        for s, entry in sorted(r.settings.items(), key=lambda item: setting_order(item[0]))
    ]


# --- sinks, tasks -------------------------------------------------------------------------------------------------


def inspected(abouts: list[About]) -> list[Record]:
    """The sink measures of each inspected model in one line."""
    found = []
    for title, a in zip(titles(abouts), abouts, strict=True):
        m = a.data["measures"]
        last = a.data["last_query"]
        found.append(
            {
                "title": title,
                "sink_rates": m["sink_rates"],
                "text_rate": m.get("text_rates", {}).get("0.3"),
                "column_rate": m.get("column_rates", {}).get("0.3"),
                "first": float(np.mean(m["first"])),
                "floor": m["floor"]["first"],
                "last_query": float(np.mean(last["prefix"])) + float(np.mean(last["column"])),
                "last_query_positions": last["length"],
                "massive": max(m["massive"]),
                "norm": max(m["norm"]),
                "kurtosis": max(m["kurtosis"]),
                "value_norm": float(np.mean(m["value_norm"])),
            }
        )
    return found


def common_maps(abouts: list[About], most: int = 6) -> list[list[Record]]:
    """The attention maps of each model, of the first layers and heads that all were inspected at."""
    maps = [{(m["layer"], m["head"]): m for m in a.data["average_logits"]} for a in abouts]
    common = [key for key in maps[0] if all(key in of for of in maps)][:most]
    return [[of[key] for key in common] for of in maps]


def logged_sinks(runs: list[Run]) -> list[Record]:
    """The last measures that each run logged."""
    return [
        {"name": r.name, "mechanism": r.mechanism, **{k: v for k, v in r.probes[-1].items() if k != "kind"}}
        for r in runs
        if r.probes
    ]


def emergence(abouts: list[About], runs: list[Run]) -> list[tuple[str, list[Record]]]:
    """Name and lines of measures of each run, in order of steps: those of its checkpoints where they were inspected.

    Seeds of one recipe go by one name. Where steps of the runs differ in size, lines have the tokens read as well.
    """
    found = {r.name: (name, r.probes) for name, r in runs_by_seed(runs)}
    for a in abouts:
        measured = a.data.get("emergence")
        if measured and (measured["from"] == "checkpoints" or a.name not in found):
            found[a.name] = found[a.name][0] if a.name in found else a.name, measured["lines"]
    if steps_differ(runs):
        for r in runs:
            name, lines = found[r.name]
            found[r.name] = name, metrics.with_tokens(lines, r.lines)
    return list(found.values())


def accuracies(about: About) -> dict[str, tuple[float, float | None]]:
    """By task: accuracy, or the task's first metric where it has none, and its standard error."""
    found = {}
    for task, entry in about.data["tasks"].items():
        names = [k for k in entry if k not in ("n", "version") and not k.endswith("stderr")]
        if names:
            found[task] = (float(entry["acc" if "acc" in names else names[0]]), entry.get("stderr"))
    return found


# --- provenance ---------------------------------------------------------------------------------------------------


def sources(found: Found) -> list[Record]:
    """One record per file, and per attempt of a run, that a number came from."""
    records = []
    for r in found.results:
        for source in r.sources:
            data = source["tokens"]["sha256"]
            records.append(_source("stream", source, source["model"]["name"], data) | {"folder": source["folder"]})
    for run in found.runs:
        identity = run.about.get("data", {})
        data = identity.get("train_sha256") or identity.get("train_fingerprint") or ""
        for attempt in run.about.get("attempts") or [run.about]:
            records.append(_source("train", attempt, run.name, data) | {"folder": str(run.folder)})
    for kind, abouts in (("inspect", found.inspections), ("zero-shot", found.zero_shot)):
        for a in abouts:
            tasks = {name: file["sha256"] for name, file in a.data.get("data", {}).items() if file}
            data = a.data.get("tokens", {}).get("sha256") or " ".join(tasks.values())
            records.append(_source(kind, a.data, a.name, data) | {"folder": str(a.folder)})
    return records


def _source(kind: str, about: dict[str, Any], name: str, data: str) -> Record:
    library = about.get("versions", {})
    return {
        "from": kind,
        "name": name,
        "model": about.get("model", {}).get("sha256", ""),
        "data": data,
        "device": about.get("device", ""),
        "versions": ", ".join(f"{k} {library[k]}" for k in ("sinkpretrain", "torch") if k in library),
        "commit": about.get("commit") or "",
        "made": about.get("created", ""),
        "command": about.get("command", ""),
    }
