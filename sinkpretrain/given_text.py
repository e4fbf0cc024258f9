"""The text that a command is given, tokens or files to tokenize: its ids, their hash, and where its documents lie."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinkpretrain.errors import UserError
from sinkpretrain.load import LoadedModel

Ids = NDArray[np.integer]


@dataclass(frozen=True)
class Text:
    """Token ids [tokens].

    path: what the user named.
    bounds: document d is the tokens [bounds[d], bounds[d + 1]); None if no index says so.
    end: the id at the end of every document, if known.
    opens: how many tokens in front of each document the tokenizer put there (Llama's ``<s>``).
    """

    ids: Ids
    path: str
    bounds: NDArray[np.int64] | None = None
    end: int | None = None
    opens: int = 0

    def about(self) -> dict[str, Any]:
        """What a result must say about its text."""
        # Hash of the ids themselves, so that the same text is the same text whatever file it came from.
        digest = hashlib.sha256()
        for start in range(0, len(self.ids), 1 << 20):
            digest.update(np.ascontiguousarray(self.ids[start : start + (1 << 20)], dtype="<i8").tobytes())
        return {"path": self.path, "sha256": digest.hexdigest(), "count": len(self.ids)}

    def document_bounds(self) -> NDArray[np.int64] | None:
        """``bounds``, or where the token that ends documents puts them, for which all ids are read; None if neither."""
        if self.bounds is not None or self.end is None:
            return self.bounds
        return np.unique(np.concatenate(([0], np.flatnonzero(np.asarray(self.ids) == self.end) + 1, [len(self.ids)])))

    def first(self, count: int) -> Text:
        """Its first tokens."""
        bounds = self.bounds
        if bounds is not None:
            bounds = np.append(bounds[bounds < min(count, len(self.ids))], min(count, len(self.ids)))
        return Text(self.ids[:count], self.path, bounds, self.end, self.opens)


def read_text(tokens: str, text: str, split: str, max_tokens: int, loaded: LoadedModel) -> Text:
    """The text that flags name; raises UserError."""
    if bool(tokens) == bool(text):
        raise UserError("give either --tokens (a .npy file or prepared folder) or --text (files to tokenize).")
    if max_tokens < 0:
        raise UserError(f"--max-tokens {max_tokens} is negative; give a number of tokens, or 0 for all.")
    if text:
        found = _from_text(text, loaded)
    else:
        path = Path(tokens)
        found = _from_folder(path, split, loaded) if path.is_dir() else _from_npy(path, loaded)
    return found.first(max_tokens) if max_tokens else found


def check_ids(ids: Ids, loaded: LoadedModel) -> None:
    """Refuse ids that the model does not know; raises UserError."""
    known = loaded.model.config.tokenizer_size
    highest, lowest = int(ids.max(initial=0)), int(ids.min(initial=0))
    if highest >= known or lowest < 0:
        raise UserError(
            f"the text holds the token id {highest if highest >= known else lowest}, but {loaded.name} knows the ids "
            f"0 .. {known - 1}; tokenize it with the model's own tokenizer."
        )


def _from_folder(folder: Path, split: str, loaded: LoadedModel) -> Text:
    from sinkpretrain.tokens import Manifest, open_split

    manifest = Manifest.load(folder)
    if loaded.tokenizer_sha256 != manifest.tokenizer_sha256:
        _check_vocabularies(folder, loaded)
    file = open_split(folder, split or ("validation" if "validation" in manifest.splits else "train"))
    if file.row_length is not None:  # rows cut from a packed text: the index knows nothing of its documents
        return Text(file.tokens, str(folder), end=manifest.eod_id)
    return Text(file.tokens, str(folder), file.document_bounds(), manifest.eod_id)


def _check_vocabularies(folder: Path, loaded: LoadedModel) -> None:
    """Files may differ and their ids mean the same; raises UserError if they do not."""
    from data_prep.tokenizer import require_same_ids

    if loaded.tokenizer is None and loaded.tokenizer_sha256 is None:
        return
    other = f"{folder} was prepared with another tokenizer than {loaded.name} has"
    require_same_ids(loaded.tokenizer, folder / "tokenizer.json", other, "prepare the text with the model's tokenizer")


def _from_npy(path: Path, loaded: LoadedModel) -> Text:
    try:
        ids: Ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        # numpy takes what it does not know for a pickle, and says how to run it.
        why = getattr(error, "strerror", None) or "it is not a whole .npy file"
        advice = "give a .npy file or a prepared folder, or text with --text"
        raise UserError(f"cannot read token ids from {path}: {why}; {advice}.") from error
    if not isinstance(ids, np.ndarray):
        raise UserError(f"{path} is an archive of arrays; save the one with the token ids as a .npy file.")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{path} holds {ids.dtype} of shape {ids.shape}, not a list of token ids.")
    return Text(ids, str(path), end=None if loaded.tokenizer is None else end_of_document(loaded))


def end_of_document(loaded: LoadedModel) -> int | None:
    """The id that the model's tokenizer ends documents with, if it has one."""
    from data_prep.tokenizer import load_tokenizer

    try:
        return load_tokenizer(str(loaded.tokenizer)).eod_id()
    except UserError:
        return None


def _from_text(text: str, loaded: LoadedModel) -> Text:
    """All documents of the files, an end-of-document token behind each, as in training.

    In front of each is what the model's tokenizer puts there (Llama's ``<s>``), sink tokens left out: the evaluator
    prepends those.
    """
    from data_prep.sources import HubOptions, resolve
    from data_prep.tokenizer import load_tokenizer, without_surrogates

    if loaded.tokenizer is None:
        raise UserError(f"{loaded.name} comes without a tokenizer; give its token ids with --tokens.")
    tokenizer, end = load_tokenizer(str(loaded.tokenizer)).load(), end_of_document(loaded)
    if end is None:
        raise UserError(
            f"the tokenizer of {loaded.name} does not say which token ends a document; "
            "tokenize the text with prepare and give its folder with --tokens."
        )
    opening = [i for i in tokenizer.encode("").ids if i != end and i not in loaded.model.prefix_ids]
    parts = []
    for unit in resolve(text, "text", HubOptions()).units:
        for document in unit.documents():
            ids = tokenizer.encode(without_surrogates("".join(document.blocks)), add_special_tokens=False).ids
            if ids:
                parts.append(np.array([*opening, *ids, end], dtype=np.int64))
    if not parts:
        raise UserError(f"{text} holds no text.")
    known, highest = loaded.model.config.tokenizer_size, max(int(part.max()) for part in parts)
    if highest >= known:
        raise UserError(
            f"the tokenizer of {loaded.name} gives the id {highest}, but its weights know the ids 0 .. {known - 1}: "
            "the two do not belong together."
        )
    return Text(np.concatenate(parts), text, np.cumsum([0, *map(len, parts)]), end, len(opening))
