"""Differences of mean losses over the same tokens, paired: of one model's caches, and of mechanisms against vanilla."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinkpretrain.comparison.numbers import Group, Record, mean_over
from sinkpretrain.comparison.read import setting_order
from sinkpretrain.statistics import paired_difference, t_interval


def own_differences(groups: list[Group]) -> list[Record]:
    """Each cache of a model against its own cache of the same size with the most initial positions, over the models of
    a group that were streamed with both. Where losses are missing, one model's are those that ``stream`` wrote."""
    found = []
    for g in groups:
        references = ((s, g.reference(entry)) for s, entry in _caches(g))
        for s, reference in references:
            if reference is None or s == reference or not (both := g.having(s, reference)).results:
                continue
            if both.of(s) and both.of(reference):
                found.append(difference(both, s, both, reference))
            elif len(both.results) == 1 and (known := both.results[0].difference(s, reference)):
                found.append(_record(both, s, both, reference, 1, (known["nats"], *known["interval"])))
    return found


def vanilla_differences(groups: list[Group]) -> list[Record]:
    """Each cache of the other mechanisms against vanilla with the most initial positions: is one sink worth four?
    Of those whose losses are there."""
    found = []
    for g in groups:
        base = next((b for b in groups if b.mechanism == "vanilla" and _alike(b) == _alike(g)), None)
        if base is None or base is g:
            continue
        references = ((s, base.reference(entry)) for s, entry in _caches(g))
        found += [
            difference(g, s, base, reference)
            for s, reference in references
            if reference is not None and g.of(s) and base.of(reference)
        ]
    return found


def _caches(g: Group) -> list[tuple[str, Record]]:
    caches = [(s, entry) for s, entry in g.settings.items() if setting_order(s)[0] == 0]
    return sorted(caches, key=lambda cache: setting_order(cache[0]))


def _alike(g: Group) -> Any:
    """What must be the same for two mechanisms to be set against each other."""
    model = g.results[0].data["model"]
    return model["shape"], model["step"]


@dataclass(frozen=True)
class Paired:
    """Losses of two groups over the same tokens, over the same trainings where there are some.

    a, b: mean over the seeds.
    n: how many of the first group.
    of_seeds: mean difference of each pair of seeds; none where they are not paired.
    """

    a: NDArray[np.floating]
    b: NDArray[np.floating]
    n: int
    of_seeds: list[float]


def pair(a: Group, setting: str, b: Group, reference: str) -> Paired:
    """Of two mechanisms the seeds that both have, of one the models that have both settings: another one's level would
    count as a difference. All of both, not paired, where there are none or not all seeds are known."""
    of_a, of_b = a.of(setting), b.of(reference)
    if a is b:
        both = a.having(setting, reference)
        same_a, same_b = both.of(setting), both.of(reference)
    else:
        seeds_a, seeds_b = ({seeds for seeds, _ in of} for of in (of_a, of_b))
        common = sorted(seeds_a & seeds_b) if None not in seeds_a | seeds_b else []
        same_a, same_b = ([(seeds, dict(of)[seeds]) for seeds in common] for of in (of_a, of_b))
    if same_a:
        of_a, of_b = same_a, same_b
    pairs = zip(same_a, same_b, strict=True)
    of_seeds = [float((x.astype(np.float64) - y).mean()) for (_, x), (_, y) in pairs]
    return Paired(mean_over([x for _, x in of_a]), mean_over([y for _, y in of_b]), len(of_a), of_seeds)


def difference(a: Group, setting: str, b: Group, reference: str) -> Record:
    """Mean loss of ``a`` minus that of ``b`` over the same tokens, nats, with two 95 % intervals.

    ``low``, ``high``: bootstrap over blocks of the text, of the losses averaged over seeds. ``seed_low``,
    ``seed_high``: t-interval over the differences of single seeds, where both have at least two in common.
    """
    paired = pair(a, setting, b, reference)
    over_text = paired_difference(paired.a, paired.b)
    return _record(a, setting, b, reference, paired.n, over_text, t_interval(paired.of_seeds))


def _record(
    a: Group,
    setting: str,
    b: Group,
    reference: str,
    n: int,
    over_text: tuple[float, float, float],
    seeds: tuple[float, float] | None = None,
) -> Record:
    mean, low, high = over_text
    return {
        "title": a.title,
        "mechanism": a.mechanism,
        "setting": setting,
        "against": b.title,
        "reference": reference,
        "n": n,
        "nats": mean,
        "low": low,
        "high": high,
        "seed_low": seeds[0] if seeds else None,
        "seed_high": seeds[1] if seeds else None,
    }
