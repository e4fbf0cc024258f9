"""Between text and tokens while generating: what goes in, what comes out piece by piece, and where it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from data_prep.tokenizer import load_tokenizer
from sinkpretrain.errors import UserError
from sinkpretrain.files import read_json

MOST_PENDING = 16
"""Tokens after which bytes that do not become a character are given up; no character takes as many."""


class TextCodec:
    """A tokenizer, and what the files beside it say about ends of documents and conversations.

    Args:
        name: a tokenizer.json, a folder that holds one, or a name on the Hugging Face Hub.
        prefix_ids: what the model wants in front of a sequence and gets without the tokenizer.

    Raises:
        UserError: the tokenizer cannot be read.
    """

    def __init__(self, name: str, prefix_ids: Sequence[int] = ()) -> None:
        file = load_tokenizer(name)
        self.tokenizer = file.load(reads_special=True)
        self.size = file.size()
        self.folder = Path(name) if Path(name).is_dir() else Path(name).parent
        self._prefix = list(prefix_ids)
        self.end_ids = self._end_ids(file)

    def _end_ids(self, file: Any) -> tuple[int, ...]:
        """Ids that end a document or an answer: what the model's own files name, or the tokenizer's."""
        for config in ("generation_config.json", "config.json"):
            path = self.folder / config
            ids = read_json(path).get("eos_token_id") if path.is_file() else None
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
        try:
            return (file.eod_id(),)
        except UserError:
            return ()

    def first(self, text: str) -> list[int]:
        """Ids of the text that a stream begins with, and what the tokenizer puts in front (as Llama's does)."""
        ids: list[int] = self.tokenizer.encode(text).ids
        if self._prefix and ids[: len(self._prefix)] == self._prefix:
            ids = ids[len(self._prefix) :]
        return ids[:-1] if len(ids) > 1 and ids[-1] in self.end_ids else ids

    def opening(self) -> list[int]:
        """What the tokenizer puts in front of every text (as Llama's and OPT's do), the model's own prefix left out."""
        whole: list[int] = self.tokenizer.encode("a").ids
        plain = self.more("a")
        fronts = (whole[:n] for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
        front: list[int] = next(fronts, [])
        return front[len(self._prefix) :] if front[: len(self._prefix)] == self._prefix else front

    def more(self, text: str) -> list[int]:
        """Ids of text inside a stream."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def printer(self) -> Printer:
        return Printer(self.tokenizer)


class Printer:
    """Ids into text as they come, a character as soon as all of its bytes are there."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._restart()

    def _restart(self) -> None:
        self._stream, self._pending = DecodeStream(skip_special_tokens=True), 0

    def step(self, token: int) -> str:
        """The text that ``token`` completes, often none."""
        try:
            piece: str | None = self._stream.step(self.tokenizer, token)
        except Exception:  # the library's answer to bytes that no longer begin as they did
            piece = None
            self._pending = MOST_PENDING
        if piece is not None:
            self._pending = 0
            return piece
        self._pending += 1
        if self._pending <= MOST_PENDING:
            return ""
        # A model is free to write bytes that are no text. Without this they would pile up for ever.
        self._restart()
        return "\ufffd"


class StopStrings:
    """Ends a text in front of the first of some strings, holding back what might become one.

    Raises:
        UserError: an empty string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = [s.replace("\\n", "\n").replace("\\t", "\t") for s in strings]
        if "" in self.strings:
            raise UserError("--stop is empty; give a text that ends the answer.")
        self.held, self.hit = "", False

    def feed(self, piece: str) -> str:
        """What may be shown now; once ``hit``, nothing follows."""
        text = self.held + piece
        found = [at for at in (text.find(s) for s in self.strings) if at >= 0]
        if found:
            self.held, self.hit = "", True
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self.strings), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, at the end of the text."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# --- conversations ------------------------------------------------------------------------------------------------

Turn = Callable[[str], str]
"""What a user said -> the text that goes into the stream for it."""


def plain_turns(text: str) -> str:
    """A line of the user's as it is: for models that have learned text, not conversation."""
    return text + "\n"


def chat_turns(folder: Path, system: str) -> Turn | None:
    """The chat template beside a tokenizer, or None if it has none.

    A stream goes on without an end, so a turn is rendered by itself: what the template adds for it behind an earlier
    turn of fixed text.
    """
    config = folder / "tokenizer_config.json"
    named = (folder / "chat_template.jinja").is_file() or (config.is_file() and read_json(config).get("chat_template"))
    if not named:
        return None
    from transformers import AutoTokenizer  # takes seconds to import

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def render(messages: list[dict[str, str]], asks: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        except Exception as error:
            raise UserError(f"the chat template in {folder} cannot be used: {error}") from error
        return text

    earlier = [{"role": "system", "content": system}] if system else []
    seen = 0

    def turn(text: str) -> str:
        nonlocal seen
        seen += 1
        said = {"role": "user", "content": text}
        if seen == 1:
            return render([*earlier, said], True)
        answered = [*earlier, {"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
        before, after = render(answered, False), render([*answered, said], True)
        if not after.startswith(before):
            raise UserError(f"the chat template in {folder} rewrites earlier turns, which a stream cannot.")
        return _behind_the_answer(before, tokenizer.eos_token or "") + after[len(before) :]

    return turn


def _behind_the_answer(rendered: str, end: str) -> str:
    """What the template writes between the end of an answer, which the model wrote itself, and the next turn."""
    tail = rendered[rendered.rindex("B") + 1 :]
    return tail[tail.index(end) + len(end) :] if end and end in tail else tail
