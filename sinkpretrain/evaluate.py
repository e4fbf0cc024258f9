"""``sinkpretrain stream``: a model, a text, cache settings in; per-token losses and one results file out."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sinkpretrain.cache import Cache
from sinkpretrain.device import choose_device, peak_memory
from sinkpretrain.errors import UserError
from sinkpretrain.files import read_json, write_atomically, write_json
from sinkpretrain.language import LanguageModel
from sinkpretrain.load import LoadedModel, load_model
from sinkpretrain.progress import ProgressBar
from sinkpretrain.provenance import provenance
from sinkpretrain.statistics import block_bootstrap
from sinkpretrain.streaming import dense_nll, recompute_nll, stream_nll, token_loop_nll

Ids = NDArray[np.integer]
Losses = NDArray[np.float32]
Strategy = Literal["streaming", "window", "dense", "recompute", "token-loop"]
STRATEGIES: tuple[str, ...] = ("streaming", "window", "dense", "recompute", "token-loop")
RESULTS = "results.json"
FORMAT = 1
CONVENTION = (
    "cache x+y: a query sees the first x positions (sink tokens included), the y before it, and itself in addition; "
    "positions are slots in the cache; one stream over all documents; nll[i] scores token i + 1, in nats"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Setting:
    """One row of a results file: a strategy with its cache or window, and what was changed about model and text.

    column: whether a softmax column was left out.
    initial: the id that stands in place of the text's tokens among the first x.
    """

    strategy: str
    cache: Cache | None = None
    window: int | None = None
    column: Literal["kept", "dropped"] | None = None
    initial: int | None = None

    @property
    def name(self) -> str:
        """Key in the results and name of the folder with the losses."""
        if self.strategy == "recompute":
            return f"recompute-{self.window}"
        if self.cache is None:
            return self.strategy
        name = str(self.cache) + ("-nocolumn" if self.column == "dropped" else "")
        name += f"-initial-{self.initial}" if self.initial is not None else ""
        return f"{name}-token-loop" if self.strategy == "token-loop" else name

    @property
    def beyond(self) -> int:
        """Tokens after which nothing can be held any more: the losses from there on are "beyond the cache"."""
        return self.window or (self.cache.size if self.cache else 0)

    def run(self, model: LanguageModel, ids: Ids, block: int, batch: int, advance: Callable[[int], None]) -> Losses:
        """The per-token losses, float32 [tokens - 1]."""
        dropped = self.column == "dropped"
        if self.strategy == "dense":
            return dense_nll(model, ids, block=block, advance=advance)
        if self.strategy == "recompute":
            assert self.window is not None
            return recompute_nll(model, ids, self.window, block=batch * self.window, advance=advance)
        assert self.cache is not None
        if self.initial is not None:
            ids = with_initial(ids, self.cache.start - len(model.prefix_ids), self.initial)
        if self.strategy == "token-loop":
            return token_loop_nll(model, ids, self.cache, drop_column=dropped, advance=advance)
        return stream_nll(model, ids, self.cache, block=block, drop_column=dropped, advance=advance)


def with_initial(ids: Ids, count: int, by: int) -> Ids:
    """The text with another token in place of each of its first ``count``."""
    replaced = np.array(ids)
    replaced[:count] = by
    return replaced


def settings_for(
    model: LanguageModel, caches: str, strategies: str, window: int | None, initial: int | None = None
) -> list[Setting]:
    """The settings that the command line asks for, in order; raises UserError.

    With ``initial``, each cache that keeps tokens of the text's beginning is evaluated a second time, with that id in
    their place (table 1 of StreamingLLM, arXiv 2309.17453: is it their meaning or their position that matters?).
    Without an initial position in the cache, a mechanism with a softmax column can be read in two ways: with its
    column, as trained, or without ("drop the +1 at test time"). Both are evaluated and labelled.
    """
    wanted = [s.strip() for s in strategies.split(",") if s.strip()]
    unknown = [s for s in wanted if s not in STRATEGIES]
    if unknown or not wanted:
        raise UserError(
            f"unknown strategy {unknown[0]!r}; known: {', '.join(STRATEGIES)}." if unknown else "no strategy."
        )
    parsed = list(dict.fromkeys(Cache.parse(c) for c in caches.split(",") if c.strip()))
    size = window or (max(c.size for c in parsed) if parsed else model.config.context)
    has_column = model.adds_column
    found: list[Setting] = []
    for strategy in wanted:
        if strategy == "dense":
            found.append(Setting("dense"))
        elif strategy == "recompute":
            found.append(Setting("recompute", window=size))
        else:
            if strategy != "window" and not parsed:
                raise UserError("no cache given; say for example --cache 0+1024,4+1020.")
            for cache in [Cache(0, size)] if strategy == "window" else parsed:
                found.append(Setting(strategy, cache, column="kept" if has_column else None))
                if has_column and cache.start == 0:
                    found.append(Setting(strategy, cache, column="dropped"))
                if initial is not None and cache.start > len(model.prefix_ids):
                    found.append(replace(found[-1], initial=initial))
    if initial is not None and not any(s.initial is not None for s in found):
        raise UserError("--replace-initial needs a cache x+y that keeps tokens of the text: x above the sink tokens.")
    return list({s.name: s for s in found}.values())


def stream(
    model: str,
    tokens: str = "",
    text: str = "",
    cache: str = "0+1024,1+1023,2+1022,4+1020",
    strategy: str = "streaming",
    out: str = "",
    split: str = "",
    window: int = 0,
    max_tokens: int = 0,
    replace_initial: str = "",
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    block: int = 1024,
    batch: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Streaming perplexity of a model over a long text.

    Settings that the results file in --out already holds for the same model and tokens are not computed again.

    Args:
        model: run directory, checkpoint or weights file, or Hugging Face GPT-NeoX folder.
        tokens: a .npy file of token ids, or a folder written by ``sinkpretrain prepare``.
        text: text to tokenize with the model's tokenizer instead: a file or folder, as ``prepare`` takes.
        cache: cache settings x+y, separated by commas: x initial positions (sink tokens included), y recent ones.
        strategy: streaming, window (0+y), dense, recompute, token-loop; several separated by commas.
        out: folder for results.json and one folder with nll.npy per setting.
        split: split of a prepared folder; by default validation if there is one, else train.
        window: tokens per window of the strategies window and recompute; by default the largest cache.
        max_tokens: use only so many tokens from the start; 0 means all.
        replace_initial: a token id, or a text of one token ("\\n"): evaluate each cache with initial positions a second
            time with this token in place of the text's first x.
        dtype: of weights and activations; losses are computed in float32 in any case.
        device: where to compute.
        block: tokens per forward; changes speed and memory, not the numbers.
        batch: windows per forward of the strategy recompute.
        progress: show a progress bar.

    Returns:
        The content of results.json.

    Raises:
        UserError: model or text cannot be read, do not fit each other, or the text is too short for a cache.
    """
    if not out:
        raise UserError("--out is missing; name a folder for the results.")
    loaded = load_model(model)
    ids, about_tokens = read_ids(tokens, text, split, max_tokens, loaded)
    initial = one_token(replace_initial, loaded) if replace_initial else None
    settings = settings_for(loaded.model, cache, strategy, window or None, initial)
    check_ids(ids, settings, loaded)
    where = choose_device(device)
    if block < 1 or batch < 1:
        raise UserError("--block and --batch must be at least 1.")
    # float32 means float32: no tf32 products, whatever ran in this process before.
    torch.set_float32_matmul_precision("highest")
    net = loaded.model.to(where, DTYPES[dtype])
    folder = Path(out)
    results = open_results(folder, loaded, about_tokens)
    results |= {"convention": CONVENTION, "positions": "in-cache", "dtype": dtype, **provenance(where)}
    for setting in settings:
        if setting.name in results["settings"] and results["settings"][setting.name]["dtype"] == dtype:
            continue
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        started = time.perf_counter()
        with ProgressBar(f"{loaded.name} {setting.name}", len(ids) - 1, "tokens", progress) as bar:
            nll = setting.run(net, ids, block, batch, bar.update)
            bar.update(len(ids) - 1, f"perplexity {perplexity(nll):.2f}")
        seconds = time.perf_counter() - started
        results["settings"][setting.name] = summary(setting, nll, seconds, where) | {"dtype": dtype}
        path = folder / setting.name / "nll.npy"
        write_atomically(path, lambda p, nll=nll: _save_npy(p, nll))  # type: ignore[misc]
        write_json(folder / RESULTS, results)
    return results


def summary(setting: Setting, nll: Losses, seconds: float, device: torch.device) -> dict[str, Any]:
    """The numbers of one setting, perplexities with a 95 % interval from a bootstrap over blocks of the text."""
    late = nll[setting.beyond :]
    low, high = block_bootstrap(nll)
    return {
        "strategy": setting.strategy,
        "start": setting.cache.start if setting.cache else None,
        "recent": setting.cache.recent if setting.cache else None,
        "window": setting.window,
        "column": setting.column,
        "initial": setting.initial,
        "ppl": perplexity(nll),
        "nll": float(nll.mean(dtype=np.float64)),
        "ppl_beyond_cache": perplexity(late) if len(late) and setting.beyond else None,
        "interval": [exponential(low), exponential(high)],
        "scored": len(nll),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(len(nll) / seconds, 1),
        "peak_memory_bytes": peak_memory(device),
        "file": f"{setting.name}/nll.npy",
    }


def perplexity(nll: Losses) -> float:
    """exp of the mean loss, the mean taken in fp64."""
    return exponential(float(nll.mean(dtype=np.float64)))


def exponential(nats: float) -> float:
    """exp, held below the largest double: losses beyond 700 nats are as bad as can be said."""
    return math.exp(min(700.0, nats))


def _save_npy(path: Path, values: Losses) -> None:
    with path.open("wb") as file:
        np.save(file, values.astype(np.float32))


# --- what is read -------------------------------------------------------------------------------------------------


def read_ids(tokens: str, text: str, split: str, max_tokens: int, loaded: LoadedModel) -> tuple[Ids, dict[str, Any]]:
    """Token ids [tokens] and what a result must say about them; raises UserError."""
    if bool(tokens) == bool(text):
        raise UserError("give either --tokens (a .npy file or prepared folder) or --text (files to tokenize).")
    ids = _ids_from_text(text, loaded) if text else _ids_from_file(Path(tokens), split, loaded)
    if max_tokens:
        ids = ids[:max_tokens]
    # Hash of the ids themselves, so that the same text is the same text whatever file it came from.
    digest = hashlib.sha256()
    for start in range(0, len(ids), 1 << 20):
        digest.update(np.ascontiguousarray(ids[start : start + (1 << 20)], dtype="<i8").tobytes())
    return ids, {"path": tokens or text, "sha256": digest.hexdigest(), "count": len(ids)}


def _ids_from_file(path: Path, split: str, loaded: LoadedModel) -> Ids:
    if path.is_dir():
        from sinkpretrain.tokens import Manifest, open_split

        manifest = Manifest.load(path)
        if loaded.tokenizer_sha256 not in (None, manifest.tokenizer_sha256):
            raise UserError(
                f"{path} was prepared with another tokenizer than {loaded.name} was trained with; "
                "prepare the text with the model's tokenizer."
            )
        return open_split(path, split or ("validation" if "validation" in manifest.splits else "train")).tokens
    try:
        ids: Ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read token ids from {path}: {error}") from error
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{path} holds {ids.dtype} of shape {ids.shape}, not a list of token ids.")
    return ids


def _ids_from_text(text: str, loaded: LoadedModel) -> Ids:
    """All documents of the files, an end-of-document token behind each, as in training."""
    from data_prep.sources import HubOptions, resolve
    from data_prep.tokenizer import load_tokenizer

    if loaded.tokenizer is None:
        raise UserError(f"{loaded.name} comes without a tokenizer; give its token ids with --tokens.")
    file = load_tokenizer(str(loaded.tokenizer))
    tokenizer, end = file.load(), file.eod_id()
    parts = [
        np.array([*tokenizer.encode("".join(document.blocks), add_special_tokens=False).ids, end], dtype=np.int64)
        for unit in resolve(text, "text", HubOptions()).units
        for document in unit.documents()
    ]
    if not parts:
        raise UserError(f"{text} holds no text.")
    return np.concatenate(parts)


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


def check_ids(ids: Ids, settings: list[Setting], loaded: LoadedModel) -> None:
    """Refuse ids that the model does not know and texts that no cache would have to evict from."""
    config = loaded.model.config
    highest, lowest = int(ids.max(initial=0)), int(ids.min(initial=0))
    if highest >= config.tokenizer_size or lowest < 0:
        wrong = highest if highest >= config.tokenizer_size else lowest
        raise UserError(
            f"the text holds the token id {wrong}, but {loaded.name} knows the ids 0 .. {config.tokenizer_size - 1}; "
            "tokenize it with the model's own tokenizer."
        )
    for setting in settings:
        if len(ids) <= max(1, setting.beyond):
            raise UserError(
                f"the text has {len(ids):,} tokens, too few for {setting.name}; give a longer text or a smaller cache."
            )


def open_results(folder: Path, loaded: LoadedModel, tokens: dict[str, Any]) -> dict[str, Any]:
    """The results so far, or empty ones; raises UserError if the folder holds another model's or text's."""
    model = loaded.provenance()
    path = folder / RESULTS
    if not path.is_file():
        return {"format": FORMAT, "model": model, "tokens": tokens, "settings": {}}
    old: dict[str, Any] = read_json(path)
    if old["model"]["sha256"] != model["sha256"] or old["tokens"]["sha256"] != tokens["sha256"]:
        raise UserError(f"{folder} holds results of another model or text; choose another --out.")
    return old
