"""``sinkpretrain bench curves``: do the fast paths of training learn what the plain one learns?

The same steps on the same batches from the same weights, once plain, once fused and compiled, once also in several
passes. Rounding differs, and training amplifies what differs; what must agree is the loss, averaged over some steps.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinkpretrain import metrics
from sinkpretrain.bench import device_precision, only_losses
from sinkpretrain.config import RunConfig, load_yaml, recipe_path, sink_recipe
from sinkpretrain.data import open_data
from sinkpretrain.errors import UserError
from sinkpretrain.files import write_json
from sinkpretrain.provenance import provenance
from sinkpretrain.timing import device, start_clean
from sinkpretrain.train import train_whole

WINDOW = 20
"""Steps whose mean losses are compared."""


def bench_curves(
    data: str,
    out: str = "curves.json",
    model: str = "pythia-160m",
    sink: str = "vanilla",
    steps: int = 300,
    micro_batch: int = 8,
    context: int = 0,
    tolerance: float = 0.01,
) -> dict[str, Any]:
    """Train the same steps on the plain path and on the fast ones, and compare the loss curves.

    Args:
        data: folder of tokens, as ``prepare`` writes it; real text, on which losses fall.
        out: JSON file for the curves.
        model: recipe of the model.
        sink: recipe of the sink mechanism.
        steps: optimizer steps, the schedule's length too.
        micro_batch: samples per step; an even number, because one of the runs takes them in two passes.
        context: tokens per sample; 0 is the recipe's.
        tolerance: largest relative difference of the mean loss over 20 steps.

    Returns:
        What is in the file: curves, largest differences, and whether all are within the tolerance.

    Raises:
        UserError: no such recipe or data, an odd batch, or too few steps.
    """
    if micro_batch < 2 or micro_batch % 2:
        raise UserError(f"--micro-batch {micro_batch} cannot be halved; give an even number.")
    if steps < WINDOW:
        raise UserError(f"--steps {steps} is less than one mean over {WINDOW} steps.")
    base = load_yaml(RunConfig, recipe_path(model))
    manifest = open_data(dataclasses.replace(base.data, path=data)).manifest
    base = dataclasses.replace(
        base,
        sink=sink_recipe(sink),
        model=dataclasses.replace(
            base.model,
            context=context or base.model.context,
            # The recipe's padded vocabulary stays; which of its rows are text is the data's matter.
            tokenizer_size=0 if manifest else base.model.tokenizer_size,
        ),
        data=dataclasses.replace(base.data, path=data, batch_size=micro_batch),
        training=dataclasses.replace(base.training, steps=steps, devices=1, precision=device_precision()),
        log=only_losses(WINDOW),
    )
    report = provenance(device()) | compare_paths(base, tolerance)
    write_json(Path(out), report)
    for name, difference in report["largest_difference"].items():
        verdict = "within" if difference <= tolerance else "NOT within"
        print(f"{name}: mean losses over {WINDOW} steps differ by {100 * difference:.3f} % at most, {verdict} ", end="")
        print(f"{100 * tolerance:g} %")
    return report


def compare_paths(base: RunConfig, tolerance: float) -> dict[str, Any]:
    """Curves of a run's paths, the largest relative difference of each from the plain one, and whether all agree."""
    size = base.data.batch_size
    paths: dict[str, dict[str, Any]] = {
        "plain": {"fused": False, "compile": False, "micro_batch": size},
        "fast": {"fused": True, "compile": True, "micro_batch": size},
        "fast, not compiled": {"fused": True, "compile": False, "micro_batch": size},
        "fast, in two passes": {"fused": True, "compile": True, "micro_batch": size // 2},
    }
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, settings) in enumerate(paths.items()):
            start_clean()
            run = Path(folder) / str(number)
            train_whole(
                dataclasses.replace(
                    base, out=str(run), name=name, training=dataclasses.replace(base.training, **settings)
                )
            )
            curves[name] = [line["loss"] for line in metrics.read(run) if line["kind"] == "train"]
    plain = np.array(curves["plain"])
    largest = {name: difference(np.array(curve), plain) for name, curve in curves.items() if name != "plain"}
    return {
        "what": "curves",
        "steps": len(plain),
        "window": WINDOW,
        "tolerance": tolerance,
        "largest_difference": largest,
        "agree": all(d <= tolerance for d in largest.values()),
        "curves": curves,
    }


def difference(curve: NDArray[np.float64], plain: NDArray[np.float64]) -> float:
    """Largest relative difference of the means over ``WINDOW`` steps at any place; infinite if a loss is missing."""
    if curve.shape != plain.shape or not np.isfinite(curve.astype(float)).all():
        return float("inf")
    kernel = np.ones(WINDOW) / WINDOW
    ours, theirs = (np.convolve(x.astype(float), kernel, mode="valid") for x in (curve, plain))
    return float(np.abs(ours / theirs - 1).max())
