"""``sinkpretrain stream``: a model, a text, cache settings in; per-token losses and one results file out."""

from __future__ import annotations

import io
import json
import math
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sinkpretrain.cache import Positions
from sinkpretrain.device import choose_device, choose_dtype, device_memory, peak_memory
from sinkpretrain.errors import UserError
from sinkpretrain.files import exclusive, read_json, write_atomically, write_json
from sinkpretrain.given_text import Text, check_ids, read_text
from sinkpretrain.load import LoadedModel, load_model
from sinkpretrain.progress import ProgressBar
from sinkpretrain.provenance import provenance
from sinkpretrain.scoring import BlockSize, Losses
from sinkpretrain.setting import Setting, Wanted, check_length, settings_for
from sinkpretrain.statistics import block_bootstrap, change, t_interval
from sinkpretrain.streaming import documents as parts_of

RESULTS, FIGURE, LOCK = "results.json", "stream.png", "lock"
FORMAT = 1
CONVENTION = (
    "cache x+y: a query sees the first x positions (sink tokens included), the y before it, and itself in addition; "
    "positions are slots in the cache, unless the setting says absolute; one stream over all documents, unless it says "
    "documents; nll[i] scores token i + 1, in nats, and is NaN where that was not scored"
)


def stream(
    model: str,
    tokens: str = "",
    text: str = "",
    cache: str = "0+1024,1+1023,2+1022,4+1020",
    strategy: str = "streaming",
    out: str = "",
    split: str = "",
    max_tokens: int = 0,
    positions: Positions = "in-cache",
    documents: Literal["one-stream", "reset"] = "one-stream",
    window: int = 0,
    stride: int = 1,
    sample: int = 0,
    replace_initial: str = "",
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    block: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Streaming perplexity of a model over a long text.

    Settings that the results file in --out already holds for the same model and tokens are not computed again.

    Args:
        model: run directory, checkpoint or weights file; or a Hugging Face folder or Hub name of any decoder that
            transformers has and that can be streamed exactly (docs/streaming.md).
        tokens: a .npy file of token ids, or a folder written by ``sinkpretrain prepare``.
        text: text to tokenize with the model's tokenizer instead: a file or folder, as ``prepare`` takes.
        cache: cache settings x+y, separated by commas: x initial positions (sink tokens included), y recent ones.
        strategy: streaming, window (0+y), dense, recompute, token-loop; several separated by commas.
        out: folder for results.json, stream.png and one folder with nll.npy per setting.
        split: split of a prepared folder; by default validation if there is one, else train.
        max_tokens: use only so many tokens from the start; 0 means all.
        positions: of keys and queries: slots in the cache as in StreamingLLM, or absolute places in the text.
        documents: one stream over all of them, or a reset: every document begins with an empty cache (and sink tokens).
        window: tokens per window of the strategies window and recompute; by default the largest cache.
        stride: recompute scores the last so many tokens of each window; the cost falls by as much.
        sample: recompute so many windows at random places only, with a standard error; 0 means all.
        replace_initial: a token id, or a text of one token ("\\n"): evaluate each cache with initial positions a second
            time with this token in place of the text's first x.
        dtype: of weights and activations; losses are computed in float32 in any case.
        device: where to compute.
        block: tokens per forward; changes speed and memory, not the numbers. 0 chooses for the device; a GPU that runs
            short of memory gets less.
        progress: show a progress bar.

    Returns:
        The content of results.json.

    Raises:
        UserError: model or text cannot be read, do not fit each other, or the text is too short for a cache.
        KeyboardInterrupt: Ctrl-C, with a sentence on what is finished.
    """
    if not out:
        raise UserError("--out is missing; name a folder for the results.")
    if block < 0:
        raise UserError(f"--block {block} is negative; give a number of tokens, or 0 to choose for the device.")
    where = choose_device(device)
    loaded = load_model(model, choose_dtype(dtype, where))
    given = read_text(tokens, text, split, max_tokens, loaded)
    check_ids(given.ids, loaded)
    initial = one_token(replace_initial, loaded) if replace_initial else None
    resets = documents == "reset"
    settings = settings_for(loaded.model, Wanted(cache, strategy, window, stride, sample, positions, resets, initial))
    reading = Reading.of(given, resets, loaded)
    check_length(settings, loaded.model, len(given.ids), reading.longest)
    _say_windows(loaded)
    folder = Path(out)
    results = open_results(folder, loaded.provenance(), given.about())
    _check_writable(folder)
    about = {"dtype": dtype, **provenance(where)}
    results |= {"convention": CONVENTION, **about}
    missing = [s for s in settings if not _is_there(results["settings"].get(s.name, {}), s, dtype, reading)]
    if missing:
        # float32 means float32: no tf32 products, whatever ran in this process before.
        torch.set_float32_matmul_precision("highest")
        smaller = "use --dtype bfloat16 or --device cpu"
        with device_memory(lambda: f"the memory of {where} does not hold {loaded.name} in {dtype}; {smaller}."):
            loaded.model.to(where)
    size = BlockSize(block) if block else BlockSize.default(where)
    for number, setting in enumerate(missing):
        entry, nll = _evaluate(setting, loaded, reading, size, where, progress, f"{number + 1}/{len(missing)}", out)
        write_atomically(folder / setting.name / "nll.npy", lambda p, nll=nll: _save_npy(p, nll))  # type: ignore[misc]
        _keep(results, folder, {setting.name: entry | {k: about[k] for k in ("dtype", "device", "commit")}})
    _keep(results, folder, {}, compared=True)
    _draw(results, folder, reading)
    return results


@dataclass(frozen=True)
class Reading:
    """How a text is read.

    parts: documents, each with an empty cache; None: one stream.
    longest: tokens read in one go.
    """

    ids: NDArray[np.integer]
    parts: list[slice] | None
    longest: int

    @classmethod
    def of(cls, text: Text, resets: bool, loaded: LoadedModel) -> Reading:
        """Raises UserError if documents are asked for and nobody knows where they end."""
        if not resets:
            return cls(text.ids, None, len(text.ids))
        bounds = text.document_bounds()
        if bounds is None:
            raise UserError(
                f"--documents reset needs to know where documents end, but {loaded.name} comes without a tokenizer "
                "that says so; give a folder written by prepare."
            )
        # What a tokenizer puts in front of a document is its beginning; else it is the token that ended the last one.
        parts = parts_of(text.ids, bounds, None if text.opens else text.end)
        return cls(text.ids, parts, max((p.stop - p.start for p in parts), default=0))

    def places(self) -> NDArray[np.int64]:
        """How many tokens have been read before token i since the cache was last empty, int64 [tokens - 1]."""
        places = np.arange(len(self.ids) - 1)
        for part in self.parts or ():
            places[part.start : part.stop - 1] -= part.start
        return places


def _is_there(entry: dict[str, Any], setting: Setting, dtype: str, reading: Reading) -> bool:
    """Whether an entry of the results is of this setting: the ids do not say where documents end."""
    if entry.get("dtype") != dtype or reading.parts is None:
        return entry.get("dtype") == dtype
    scored = sum(part.stop - part.start - 1 for part in reading.parts)
    return entry["documents"] == len(reading.parts) and (setting.sample > 0 or entry["scored"] == scored)


def _evaluate(
    setting: Setting,
    loaded: LoadedModel,
    reading: Reading,
    size: BlockSize,
    where: torch.device,
    progress: bool,
    number: str,
    out: str,
) -> tuple[dict[str, Any], Losses]:
    """One setting: its entry in the results, and its losses."""
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    total = len(reading.ids) - 1
    if setting.sample:
        total = min(total, setting.sample * setting.stride)
    started = time.perf_counter()
    with ProgressBar(f"{loaded.name} {setting.name} ({number})", total, "tokens", progress) as bar:

        def advance(done: int) -> None:
            bar.update(done, f"{done / (time.perf_counter() - started):,.0f} tokens/s")

        try:
            nll = setting.run(loaded.model, reading.ids, reading.parts, size, advance)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped in {setting.name} after {bar.done:,} of {total:,} tokens; the settings before it are in "
                f"{out}, and the same command goes on with this one."
            ) from None
        seconds = time.perf_counter() - started
        bar.update(total, f"perplexity {perplexity(nll[np.isfinite(nll)]):.2f}")
    entry = summary(setting, nll, reading, seconds)
    return entry | {"block": size.tokens, "peak_memory_bytes": peak_memory(where)}, nll


def summary(setting: Setting, nll: Losses, reading: Reading, seconds: float) -> dict[str, Any]:
    """The numbers of one setting, perplexities with a 95 % interval; see ``mean_interval``."""
    scored = np.isfinite(nll)
    beyond = nll[scored & (reading.places() >= setting.beyond)]
    low, high, error = mean_interval(nll[scored], setting.stride if setting.sample else None)
    return {
        "strategy": setting.strategy,
        "start": setting.cache.start if setting.cache else None,
        "recent": setting.cache.recent if setting.cache else None,
        "window": setting.window,
        "stride": setting.stride if setting.window else None,
        "sample": setting.sample or None,
        "positions": setting.positions if setting.cache else None,
        "documents": len(reading.parts) if reading.parts is not None else None,
        "column": setting.column,
        "initial": setting.initial,
        "ppl": perplexity(nll[scored]),
        "nll": float(nll[scored].mean(dtype=np.float64)),
        "ppl_beyond_cache": perplexity(beyond) if len(beyond) and setting.beyond else None,
        "interval": [exponential(low), exponential(high)],
        "standard_error": error,
        "scored": int(scored.sum()),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(int(scored.sum()) / seconds, 1),
        "file": f"{setting.name}/nll.npy",
    }


def mean_interval(values: NDArray[np.floating], window: int | None = None) -> tuple[float, float, float | None]:
    """95 % interval of a mean over text, and its standard error where that is known.

    Args:
        values: losses, or differences of such, in the order of the text.
        window: values per window, where windows were drawn at random: they are independent of each other, so that
            Student's t serves. None: a bootstrap over blocks of the text.
    """
    if window is None:
        return (*block_bootstrap(values), None)
    means = [float(part.mean(dtype=np.float64)) for part in np.split(values, range(window, len(values), window))]
    interval = t_interval(means)
    assert interval is not None
    return (*interval, float(np.std(means, ddof=1)) / len(means) ** 0.5)


def differences(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Mean loss of each setting minus that of another, nats, over the tokens that both score, with a 95 % interval.

    The other one is ``reference``'s; pairing removes what is hard for both.
    """
    losses: dict[str, Losses] = {}

    def of(name: str) -> Losses:
        if name not in losses:
            losses[name] = np.load(folder / settings[name]["file"])
        return losses[name]

    found = []
    for name, entry in settings.items():
        against = reference(entry, settings)
        if against is None or against == name:
            continue
        both = np.isfinite(of(name)) & np.isfinite(of(against))
        if not both.any():
            continue
        ours, theirs = of(name)[both].astype(np.float64), of(against)[both]
        low, high, _ = mean_interval(ours - theirs, entry["stride"] if entry["sample"] else None)
        found.append(
            {
                "setting": name,
                "against": against,
                "nats": float((ours - theirs).mean()),
                "interval": [low, high],
            }
        )
    return found


def reference(entry: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """The setting that another one is compared with: of the caches as large, the one with most initial positions.

    Where none is as large, the largest; documents treated alike and positions in the cache come first. A column left
    out or tokens replaced make no reference. None: there is no cache.
    """
    size = _size(entry)

    def fit(name: str) -> tuple[Any, ...]:
        other = settings[name]
        return (
            _documents_alike(entry, other),
            _size(other) == size,
            other["positions"] == "in-cache",
            _size(other) if _size(other) != size else 0,
            other["start"],
        )

    caches = [
        name
        for name, other in settings.items()
        if other["strategy"] in ("streaming", "window") and other["column"] != "dropped" and other["initial"] is None
    ]
    return max(caches, key=fit, default=None)


def alike(entry: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two settings hold as many tokens and treat documents alike."""
    return _documents_alike(entry, other) and _size(entry) == _size(other)


def _documents_alike(entry: dict[str, Any], other: dict[str, Any]) -> bool:
    return (entry["documents"] is None) == (other["documents"] is None)


def _size(entry: dict[str, Any]) -> int:
    """Tokens that a setting holds at most; 0 where there is no limit."""
    return entry["window"] or (entry["recent"] or 0) + (entry["start"] or 0)


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Results for the eye: names of columns, a row per setting, and what the column of changes is against.

    A row names its reference where that is not the only one of its size.
    """
    settings, against = results["settings"], {d["setting"]: d for d in results["differences"]}
    references = sorted({d["against"] for d in against.values()})
    rows = []
    for name, s in settings.items():
        difference, text = against.get(name), ""
        if difference:
            low, high = map(change, difference["interval"])
            text = f"{change(difference['nats'])} % ({low} to {high})"
            same = [r for r in references if _size(settings[r]) == _size(s)]
            if len(references) > 1 and same != [difference["against"]]:
                text += f" against {difference['against']}"
        beyond = _number(s["ppl_beyond_cache"]) if s["ppl_beyond_cache"] else ""
        interval = " - ".join(map(_number, s["interval"]))
        rows.append([name, _number(s["ppl"]), interval, beyond, text, f"{s['tokens_per_second']:,.0f}"])
    head = ["setting", "perplexity", "95 %", "beyond the cache", "change", "tokens/s"]
    which = ", the one of the same size" if len(references) > 1 else ""
    note = f"change: of the perplexity against {' or '.join(references)}{which}, over the same tokens"
    return head, rows, note if references else ""


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def perplexity(nll: Losses) -> float:
    """exp of the mean loss, the mean taken in fp64."""
    return exponential(float(nll.mean(dtype=np.float64)))


def exponential(nats: float) -> float:
    """exp, held below the largest double: losses beyond 700 nats are as bad as can be said."""
    return math.exp(min(700.0, nats))


def _save_npy(path: Path, values: Losses) -> None:
    # By way of memory: numpy writes into a file through a buffer of its own, whose end is lost unsaid on a full disk.
    content = io.BytesIO()
    np.save(content, values.astype(np.float32))
    path.write_bytes(content.getbuffer())


# --- what is read and written -------------------------------------------------------------------------------------


def one_token(text: str, loaded: LoadedModel) -> int:
    """The id that ``--replace-initial`` names: a number, or a text (with \\n for a line break) that is one token.

    Raises:
        UserError: the model has no such id, no tokenizer, or the text is not one token.
    """
    known = loaded.model.config.tokenizer_size
    if text.isascii() and text.isdigit():
        if int(text) >= known:
            raise UserError(f"--replace-initial {text} is not an id of {loaded.name}, which has 0 .. {known - 1}.")
        return int(text)
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.name} comes without a tokenizer; give --replace-initial a token id.")
    from data_prep.tokenizer import load_tokenizer

    plain = text.replace("\\n", "\n").replace("\\t", "\t")
    ids: list[int] = load_tokenizer(str(loaded.tokenizer)).load().encode(plain, add_special_tokens=False).ids
    if len(ids) != 1:
        raise UserError(
            f"--replace-initial {text!r} is {len(ids)} tokens for {loaded.name}; give a text of one, or an id."
        )
    return ids[0]


def _say_windows(loaded: LoadedModel) -> None:
    windows = sorted({w for w in loaded.model.windows if w is not None})
    if windows:
        layers = sum(w is not None for w in loaded.model.windows)
        warnings.warn(
            f"{loaded.name} attends within a window of {', '.join(f'{w:,}' for w in windows)} positions in {layers} of "
            f"{len(loaded.model.windows)} layers, also here.",
            stacklevel=2,
        )


def open_results(folder: Path, model: dict[str, Any], tokens: dict[str, Any]) -> dict[str, Any]:
    """The results so far, or empty ones; raises UserError if the folder holds another model's or text's.

    Args:
        model, tokens: what results say about them.
    """
    path = folder / RESULTS
    if not path.is_file():
        return {"format": FORMAT, "model": model, "tokens": tokens, "settings": {}}
    old: dict[str, Any] = read_json(path)
    if not isinstance(old, dict) or old.get("format") != FORMAT or not {"model", "tokens", "settings"} <= old.keys():
        raise UserError(f"{path} is not of this release of sinkpretrain stream; choose another --out.")
    if old["model"]["sha256"] != model["sha256"] or old["tokens"]["sha256"] != tokens["sha256"]:
        raise UserError(f"{folder} holds results of another model or text; choose another --out.")
    changed = changed_configuration(old["model"], model)
    if changed is not None:
        raise UserError(
            f"{folder} holds results of the same weights under another configuration ({changed}); choose another --out."
        )
    # A setting whose losses are gone or damaged is computed again.
    old["settings"] = {n: e for n, e in old["settings"].items() if _has_losses(folder / e["file"], tokens["count"])}
    return old


def changed_configuration(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """What differs in how two models read the same weights, with both values; what one does not say is no difference.

    Weights do not say how positions are scaled or how far a layer sees: a configuration edited beside them does.
    """
    for part in ("shape", "sink"):
        then, now = old.get(part) or {}, json.loads(json.dumps(new.get(part) or {}))
        for name in then.keys() & now.keys():
            if not _alike(then[name], now[name]):
                return f"{name} {str(then[name])[:60]} then, {str(now[name])[:60]} now"
    return None


def _alike(a: Any, b: Any) -> bool:
    """Whether two values of a configuration are the same; machines round angles differently."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in a)
    return bool(a == b)


def _has_losses(path: Path, tokens: int) -> bool:
    """Whether the losses of so many tokens are there."""
    try:
        return bool(np.load(path, mmap_mode="r").shape == (tokens - 1,))  # mapped: its length is checked, nothing read
    except (OSError, ValueError, EOFError):
        return False


def _keep(results: dict[str, Any], folder: Path, entries: dict[str, Any], compared: bool = False) -> None:
    """Write results with new settings beside those in the folder, to which another process may have added meanwhile.

    Raises:
        UserError: they are of another model or text.
    """
    with exclusive(folder / LOCK, f"{folder} is in use by another process"):
        results["settings"] = open_results(folder, results["model"], results["tokens"])["settings"] | entries
        if compared:
            results["differences"] = differences(results["settings"], folder)
        write_json(folder / RESULTS, results)


def _check_writable(folder: Path) -> None:
    """Before anything is computed: raises UserError if results could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out.") from error


def _draw(results: dict[str, Any], folder: Path, reading: Reading) -> None:
    from sinkpretrain.figures import save_figure, settings_figure

    settings = results["settings"]
    losses = {name: np.load(folder / entry["file"]) for name, entry in settings.items()}
    chosen = Counter(entry["against"] for entry in results["differences"]).most_common(1)
    sizes = {entry["start"] + entry["recent"] for entry in settings.values() if entry["start"] is not None}
    per_document = all(entry["documents"] for entry in settings.values())
    figure = settings_figure(
        losses,
        reading.places() if per_document else np.arange(len(reading.ids) - 1),
        chosen[0][0] if chosen else None,
        sorted(sizes),
        "tokens read of the document" if per_document else "tokens read",
    )
    save_figure(figure, folder / FIGURE)
