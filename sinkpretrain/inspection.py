"""``sinkpretrain inspect``: a model and held-out text in; sink measures, attention maps and emergence curves out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinkpretrain import metrics
from sinkpretrain.device import choose_device, choose_dtype
from sinkpretrain.errors import UserError
from sinkpretrain.figures import save_figure
from sinkpretrain.files import write_json
from sinkpretrain.given_text import check_ids, read_text
from sinkpretrain.inspect_figures import emergence_figure, heads_figure, layers_figure, maps_figure
from sinkpretrain.language import LanguageModel
from sinkpretrain.load import LoadedModel, load_model, numbered
from sinkpretrain.measures import LONG_SAMPLES, average_logits, head_measures, last_queries, measure, sink_measures
from sinkpretrain.progress import ProgressBar
from sinkpretrain.provenance import provenance

FILE = "inspect.json"
SENTENCES, SENTENCE = 256, 16
"""Sequences, and their length, of the average logits (StreamingLLM, arXiv 2309.17453, figures 2 and 7)."""
LONG = 4096
"""Positions of the long inputs at most, if the user names no number: some models have contexts of 100,000 and more."""
ONSET = 0.01
"""A sink has appeared at the first step from which on this share of (layer, head, sequence) has one."""


class Head(NamedTuple):
    """One attention map: a layer, and a head of it or, with None, the mean over its heads."""

    layer: int
    head: int | None

    def of(self, values_LH: Tensor) -> Tensor:
        """What [L, H, ...] holds for it."""
        layer = values_LH[self.layer]
        return layer.mean(0) if self.head is None else layer[self.head]

    def __str__(self) -> str:
        return f"layer {self.layer}, {'mean of heads' if self.head is None else f'head {self.head}'}"


def inspect_model(
    model: str,
    tokens: str = "",
    text: str = "",
    out: str = "",
    beside: str = "",
    checkpoints: Literal["newest", "all"] = "newest",
    split: str = "",
    samples: int = 100,
    length: int = 64,
    long: int = 0,
    layers: str = "",
    heads: str = "0",
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Sink measures of a model, its attention maps, and when its sinks emerged in training.

    Args:
        model: run directory, checkpoint or weights file, Hugging Face folder, or name on the Hub.
        tokens: a .npy file of token ids, or a folder written by ``sinkpretrain prepare``.
        text: text to tokenize with the model's tokenizer instead: a file or folder, as ``prepare`` takes.
        out: folder for inspect.json and the figures.
        beside: another model, shown beside in the figures (with and without a sink, for example).
        checkpoints: all measures every weights file of a run directory too.
        split: split of a prepared folder; by default validation if there is one, else train.
        samples: sequences that are measured, spread over the text.
        length: positions of each, the mechanism's own tokens included.
        long: positions of the long inputs whose last query is looked at; 0 is the model's context, at most 4,096.
        layers: layers of the attention maps, separated by commas; by default six spread over the depth.
        heads: heads of the attention maps, or mean.
        dtype: of weights and activations; measures are computed in float32 in any case.
        device: where to compute.
        progress: show a progress bar over checkpoints.

    Returns:
        The content of inspect.json.

    Raises:
        UserError: model or text cannot be read or do not fit each other, the text is too short, or there is no such
            layer or head.
    """
    if not out:
        raise UserError("--out is missing; name a folder for the measures and figures.")
    if samples < 1 or long < 0:
        raise UserError("--samples must be at least 1 and --long at least 0.")
    where = choose_device(device)
    loaded = load_model(model)
    other = load_model(beside) if beside else None
    weights = all_weights(Path(model)) if checkpoints == "all" else []
    maps = parse_maps(layers, heads, loaded)
    if other is not None:
        check_maps(maps, other)
    given = read_text(tokens, text, split, 0, loaded)
    check_ids(given.ids, loaded)
    torch.set_float32_matmul_precision("highest")
    sizes = {"samples": samples, "length": length, "long": long}
    found = [inspect_loaded(loaded, given.ids, maps, sizes, where, dtype)]
    if other is not None:
        other_ids = read_text(tokens, text, split, 0, other).ids
        check_ids(other_ids, other)
        found.append(inspect_loaded(other, other_ids, maps, sizes, where, dtype))
    results = {
        "what": "inspect",
        "format": 1,
        "model": loaded.provenance(),
        "tokens": given.about(),
        **found[0],
        "beside": None if other is None else {"model": other.provenance(), **found[1]},
        "dtype": dtype,
        **provenance(where),
    }
    logged = list(metrics.read(Path(model)))  # none of what is no run
    lines = emergence(weights, given.ids, sizes, where, progress) or probes(logged)
    if lines:
        if len(metrics.tokens_per_step(logged)) > 1:
            lines = metrics.with_tokens(lines, logged)
        results["emergence"] = {
            "from": "checkpoints" if weights else "metrics.jsonl",
            "onset": onset(lines),
            "lines": lines,
        }
    write(Path(out), results, found)
    return results


def write(out: Path, results: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """The figures, and inspect.json last: where it is, the rest is."""
    measured = [(f["title"], f["measures"]) for f in found]
    figures = {
        "attention_maps": maps_figure([(f["title"], f["sequences"]["prefix"], f["average_logits"]) for f in found]),
        "heads": heads_figure(measured),
        "layers": layers_figure(measured),
    }
    if "emergence" in results:
        figures["emergence"] = emergence_figure([(found[0]["title"], results["emergence"]["lines"])])
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
    write_json(out / FILE, results)


# --- one model ----------------------------------------------------------------------------------------------------


def inspect_loaded(
    loaded: LoadedModel,
    ids: NDArray[np.integer],
    maps: list[Head],
    sizes: dict[str, int],
    where: torch.device,
    dtype: str,
) -> dict[str, Any]:
    """Everything measured about one model, as plain data; the model goes to its device and stays there."""
    net = loaded.model.to(where, choose_dtype(dtype, where))
    short = sequences(net, ids, sizes["samples"], sizes["length"]).to(where)
    measured = measure(net, short)
    if any(isinstance(values, Tensor) and not values.isfinite().all() for values in vars(measured).values()):
        raise UserError(f"what is measured of {loaded.name} is not finite; use float32, or check the weights.")
    measures = head_measures(measured)
    long = long_sequences(net, ids, sizes["long"]).to(where)
    last = last_queries(net, long)
    sentences = sequences(net, ids, SENTENCES, SENTENCE + len(net.prefix_ids)).to(where)
    logits, columns = average_logits(net, sentences)
    return {
        "title": loaded.name if loaded.name == loaded.label else f"{loaded.name} ({loaded.label})",
        "sequences": {"count": len(short), "length": short.shape[1], "prefix": len(net.prefix_ids)},
        "measures": measures,
        "last_query": {
            "count": len(long),
            "length": long.shape[1],
            **{name: values.double().round(decimals=5).tolist() for name, values in last.items()},
        },
        "average_logits": [
            {
                "layer": m.layer,
                "head": m.head,
                "count": len(sentences),
                "rows": [_plain(row[: i + 1]) for i, row in enumerate(m.of(logits))],
                "column": None if columns is None or m.of(columns).isnan().all() else _plain(m.of(columns)),
            }
            for m in maps
        ],
    }


def _plain(values: Tensor) -> list[float | None]:
    """With three decimals, None for what is not seen."""
    return [None if v != v else round(v, 3) for v in values.tolist()]


def sequences(model: LanguageModel, ids: NDArray[np.integer], count: int, length: int) -> Tensor:
    """Ids [at most count, length] spread evenly over a text without overlap, the model's prefix in front of each.

    Raises:
        UserError: no room for text behind the prefix, or not one sequence of text.
    """
    prefix = torch.tensor(model.prefix_ids, dtype=torch.int64)
    own = length - len(prefix)
    if own < 2:
        raise UserError(
            f"sequences of {length} positions leave no text behind {len(prefix)} sink tokens; make it longer."
        )
    if length > (model.learned_positions or length):
        raise UserError(
            f"the model has {model.learned_positions:,} learned positions, too few for sequences of {length:,}; "
            "lower --length or --long."
        )
    fit = len(ids) // own
    if fit < 1:
        raise UserError(f"the text has {len(ids):,} tokens, too few for a sequence of {own}; give a longer text.")
    if fit < count:
        warnings.warn(f"the text has room for {fit} of {count} sequences of {own} tokens.", stacklevel=2)
    starts = np.linspace(0, len(ids) - own, min(count, fit)).astype(np.int64)
    text = torch.from_numpy(np.stack([np.asarray(ids[s : s + own], dtype=np.int64) for s in starts]))
    return torch.cat((prefix.expand(len(text), -1), text), dim=1)


def long_sequences(model: LanguageModel, ids: NDArray[np.integer], length: int) -> Tensor:
    """Ids [LONG_SAMPLES, length] of the inputs whose last query is looked at; 0 means the model's context."""
    return sequences(model, ids, LONG_SAMPLES, min(length or min(model.config.context, LONG), len(ids)))


def parse_maps(layers: str, heads: str, loaded: LoadedModel) -> list[Head]:
    """Every chosen head of every chosen layer; raises UserError for one that the model does not have."""
    n_layer, n_head = loaded.model.config.n_layer, loaded.model.config.n_head
    spread = sorted({round(x) for x in np.linspace(0, n_layer - 1, min(6, n_layer))})
    chosen = [_index("--layers", x, n_layer, loaded) for x in layers.split(",") if x.strip()] or spread
    of = [None if x.strip() == "mean" else _index("--heads", x, n_head, loaded) for x in heads.split(",") if x.strip()]
    return [Head(layer, head) for layer in chosen for head in of or [0]]


def check_maps(maps: list[Head], loaded: LoadedModel) -> None:
    """Refuse panels that the second model does not have."""
    shape = loaded.model.config
    for m in maps:
        if m.layer >= shape.n_layer or (m.head or 0) >= shape.n_head:
            raise UserError(
                f"{loaded.name} has no {m}, only layers 0 .. {shape.n_layer - 1} and heads 0 .. {shape.n_head - 1}; "
                "choose --layers and --heads that both models have."
            )


def _index(flag: str, text: str, count: int, loaded: LoadedModel) -> int:
    if not text.strip().isdigit() or int(text) >= count:
        raise UserError(f"{flag} has {text.strip()!r}, but {loaded.name} has 0 .. {count - 1}.")
    return int(text)


# --- over training ------------------------------------------------------------------------------------------------


def all_weights(run: Path) -> list[Path]:
    """The weights files of a run directory, by step; raises UserError if it is none or has none."""
    files = numbered(run / "weights", ".safetensors") if (run / "config.yaml").is_file() else []
    if not files:
        raise UserError(f"--checkpoints all needs a run directory with weights, and {run} is none.")
    return files


def emergence(
    weights: list[Path], ids: NDArray[np.integer], sizes: dict[str, int], where: torch.device, progress: bool
) -> list[dict[str, Any]]:
    """The measures of each weights file as the lines that training logs."""
    lines = []
    with ProgressBar("measuring", len(weights), "checkpoints", progress and bool(weights)) as bar:
        for done, file in enumerate(weights, start=1):
            loaded = load_model(file)
            net = loaded.model.to(where)
            ids_BT = sequences(net, ids, sizes["samples"], sizes["length"]).to(where)
            long_BT = long_sequences(net, ids, sizes["long"]).to(where)
            lines.append({"step": loaded.step, **sink_measures(net, ids_BT, long_BT)})
            bar.update(done)
    return lines


def probes(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a run logged about its sinks."""
    return [{k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == "probe"]


def onset(lines: list[dict[str, Any]]) -> dict[str, dict[str, int | None]]:
    """At each threshold, the step from which on Sink_1 stays above ``ONSET``; None if it never does.

    Of position 0 (``sink_rates``), and of the first text token and the column where there are such.
    """
    found: dict[str, dict[str, int | None]] = {}
    for name in ("sink_rates", "text_rates", "column_rates"):
        having = [line for line in lines if name in line]
        for threshold in having[-1][name] if having else ():
            step = None
            for line in reversed(having):
                if line[name].get(threshold, 0.0) < ONSET:
                    break
                step = line["step"]
            found.setdefault(name, {})[threshold] = step
    return found


# --- in words -----------------------------------------------------------------------------------------------------


def describe(results: dict[str, Any]) -> list[str]:
    """The main measures as lines of text."""
    m, last = results["measures"], results["last_query"]

    def rates(name: str) -> str:
        return ", ".join(f"{100 * v:.1f} % at {k}" for k, v in m[name].items())

    lines = [
        f"{results['model']['name']} ({results['model']['mechanism']}), {results['sequences']['count']} sequences of "
        f"{results['sequences']['length']}:",
        f"  Sink_1 of position 0: {rates('sink_rates')}",
        f"  attention to position 0 {np.mean(m['first']):.3f}, evenly {m['floor']['first']:.3f}; "
        f"of the last query at {last['length']:,} positions {np.mean(last['first']):.3f}",
    ]
    if "text_rates" in m:
        lines.append(f"  Sink of the first text token: {rates('text_rates')}")
    if "column_rates" in m:
        lines.append(
            f"  attention to the column {np.mean(m['column']):.3f}, of the last query {np.mean(last['column']):.3f}"
        )
    lines.append(
        f"  largest over depths: massive activations {max(m['massive']):,.0f} x median, first token's norm "
        f"{max(m['norm']):.2f} x mean, kurtosis {max(m['kurtosis']):.1f}"
    )
    for name, what in (("sink_rates", "position 0"), ("column_rates", "the column")):
        for threshold, step in results.get("emergence", {}).get("onset", {}).get(name, {}).items():
            if threshold == "0.3":
                upto = results["emergence"]["lines"][-1]["step"]
                when = f"from step {step:,} on" if step is not None else f"not up to step {upto:,}"
                lines.append(f"  a sink at {what} ({100 * ONSET:.0f} % of heads above 0.3): {when}")
    return lines
