"""``sinkpretrain generate``: text without end at constant memory, and conversations that keep the stream."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from sinkpretrain.cache import Cache
from sinkpretrain.decode import Engine, TokenStream
from sinkpretrain.device import choose_device, choose_dtype, peak_memory
from sinkpretrain.errors import UserError
from sinkpretrain.language import LanguageModel
from sinkpretrain.load import LoadedModel, load_model
from sinkpretrain.progress import ProgressBar
from sinkpretrain.sampling import Sampler, Sampling
from sinkpretrain.texts import StopStrings, TextCodec, chat_turns, plain_turns

LONG_PROMPT = 4096
"""Tokens from which reading a prompt shows a progress bar."""

BETWEEN_DOCUMENTS = "\n\n"


@dataclass
class Counts:
    """What was read and written, and how long it took."""

    read: int = 0
    read_seconds: float = 0.0
    written: int = 0
    write_seconds: float = 0.0


class Interrupt:
    """While entered, Ctrl-C is noted instead of raised, so that no token is left half read; a second one is raised."""

    def __init__(self) -> None:
        self.noted = False

    def __enter__(self) -> Interrupt:
        self.noted = False
        self._ours = threading.current_thread() is threading.main_thread()
        if self._ours:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True


@dataclass
class Session:
    """A stream of tokens seen as text."""

    engine: Engine
    tokens: TokenStream
    codec: TextCodec
    stop: Sequence[str] = ()
    max_tokens: int = 0
    ignore_eod: bool = False
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True)
    counts: Counts = field(default_factory=Counts)
    interrupt: Interrupt = field(default_factory=Interrupt)

    def read(self, ids: Sequence[int], progress: bool = False) -> None:
        """Put tokens into the stream; Ctrl-C is raised between two blocks of them, so that the stream can go on."""
        started = time.perf_counter()
        shown = ProgressBar("reading the prompt", len(ids), "tokens", progress and len(ids) >= LONG_PROMPT)

        def advance(done: int) -> None:
            shown.update(done)
            if self.interrupt.noted:
                raise KeyboardInterrupt

        with self.interrupt, shown:
            self.engine.read(ids, advance)
        self.counts.read += len(ids)
        self.counts.read_seconds += time.perf_counter() - started

    def answer(self) -> str:
        """Write until something ends it; returns what did: the ``end`` of a document, a ``stop`` string, the
        ``length``, or an ``interrupt``."""
        started = time.perf_counter()
        printer, stops = self.codec.printer(), StopStrings(self.stop)
        try:
            with self.interrupt:
                for number, token in enumerate(self.tokens, 1):
                    self.counts.written += 1
                    if token in self.codec.end_ids and not self.ignore_eod:
                        return "end"
                    self.write(stops.feed(BETWEEN_DOCUMENTS if token in self.codec.end_ids else printer.step(token)))
                    if stops.hit:
                        return "stop"
                    if number == self.max_tokens:
                        return "length"
                    if self.interrupt.noted:
                        return "interrupt"
            raise AssertionError("a stream of tokens has no end")
        finally:
            self.write(stops.rest())
            self.counts.write_seconds += time.perf_counter() - started


# --- the command --------------------------------------------------------------------------------------------------


def generate(
    model: str,
    cache: str = "",
    prompt: str = "",
    prompt_file: str = "",
    max_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: list[str] | None = None,
    ignore_eod: bool = False,
    interactive: bool = False,
    echo: bool = False,
    tokenizer: str = "",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compile: bool = False,
    quiet: bool = False,
) -> int:
    """Text from a model, without end and at constant memory. The prompt may also come from stdin, and be of any length.

    Args:
        model: run directory, checkpoint or weights file, or Hugging Face folder.
        cache: x+y, for example 4+1020: x initial positions (sink tokens included), y recent ones. By default that, or
            less for a model with a shorter context.
        prompt: text to go on from.
        prompt_file: file with that text.
        max_tokens: end after so many tokens (of each answer, with --interactive); 0 is endless.
        temperature: below 1 the likely tokens become likelier, 0 always takes the likeliest.
        top_k: draw among the k likeliest tokens; 0 is no limit.
        top_p: draw among the likeliest tokens that have this probability together; 1 is no limit.
        min_p: draw among tokens at least this times as probable as the likeliest; 0 is no limit.
        repetition_penalty: makes the tokens in the cache less likely; 1 is none.
        seed: the same seed draws the same text on the same machine; by default a new one each time.
        stop: end in front of this text (several may be given; \\n is a line break).
        ignore_eod: go on behind the end of a document.
        interactive: take turns: each line of yours is read, then answered; Ctrl-C ends an answer, Ctrl-D the program.
        echo: print the prompt too.
        tokenizer: file, folder or Hub name, if not the model's own.
        dtype: of weights and activations; auto is bfloat16 on a GPU and float32 elsewhere.
        device: where to compute.
        compile: let torch.compile fuse a step; takes up to a minute before the first token.
        quiet: no figures at the end.

    Returns:
        0, or 130 if Ctrl-C ended it.

    Raises:
        UserError: the model or an option is not what it must be.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    stops = stop or []
    StopStrings(stops)
    if max_tokens < 0:
        raise UserError(f"--max-tokens must be 0 (endless) or more, not {max_tokens}.")
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    loaded = load_model(model, kind)
    codec = TextCodec(_tokenizer_name(tokenizer, loaded), loaded.model.prefix_ids)
    chosen = choose_cache(cache, loaded)
    text = read_prompt(prompt, prompt_file, interactive)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    net = loaded.model.to(where, kind)
    sampler = Sampler(sampling, forbidden(net, codec), torch.Generator(where).manual_seed(seed))
    engine = Engine(net, chosen, tracks_ids=sampler.reads_cached)
    if compile:
        engine.compile()
    session = Session(engine, TokenStream(engine, sampler), codec, stops, max_tokens, ignore_eod)
    try:
        if interactive:
            return converse(session, text)
        if echo:
            session.write(text)
        session.read(first_ids(text, codec, loaded), progress=True)
        return 130 if session.answer() == "interrupt" else 0
    finally:
        if not quiet:
            print(f"\n{figures(session, where)}; seed {seed}", file=sys.stderr, flush=True)


def converse(session: Session, system: str) -> int:
    """Turns until the end of the input (Ctrl-D)."""
    turn = chat_turns(session.codec.folder, system)
    if turn is None:
        turn = plain_turns
        if system:
            session.read(session.codec.first(system), progress=True)
    first = not system or turn is not plain_turns
    for line in lines():
        text = turn(line)
        # A template writes what stands in front of a conversation itself.
        ids = session.codec.first(text) if first and turn is plain_turns else session.codec.more(text)
        first = False
        try:
            session.read(ids)
            interrupted = session.answer() == "interrupt"
        except KeyboardInterrupt:
            interrupted = True
        if interrupted:
            session.write(" ...")
        session.write("\n")
    return 0


def lines() -> Iterator[str]:
    """What the user types, line by line; Ctrl-C throws a line away."""
    asks = sys.stdin.isatty()
    if asks:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its editing keys
        print("Ctrl-C ends an answer, Ctrl-D the program.", file=sys.stderr)
    while True:
        try:
            line = input("> " if asks else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\nCtrl-D ends the program.", file=sys.stderr)
            continue
        if line.strip():
            yield line


# --- what is given ------------------------------------------------------------------------------------------------


def choose_cache(text: str, loaded: LoadedModel) -> Cache:
    """The cache that was asked for, or the usual one; warns where it does not suit the model."""
    context, sinks = loaded.model.config.context, len(loaded.model.prefix_ids)
    if not text:
        start = max(4, sinks)
        return Cache(start, max(1, min(1024, context - 1) - start))
    cache = Cache.parse(text)
    learned = loaded.model.learned_positions
    if learned is not None and cache.size >= learned:
        raise UserError(
            f"{loaded.name} has learned {learned} positions, too few for the cache {cache} and the token being read; "
            f"x+y can be {learned - 1} at most."
        )
    if cache.size >= context:
        warnings.warn(
            f"the cache {cache} reaches beyond the {context} positions that {loaded.name} was made for.", stacklevel=2
        )
    if cache.start < sinks:
        warnings.warn(
            f"the cache {cache} does not keep the {sinks} sink tokens of {loaded.name}; x of at least {sinks} does.",
            stacklevel=2,
        )
    return cache


def read_prompt(prompt: str, prompt_file: str, interactive: bool) -> str:
    """The text from a flag, a file, or stdin if that is no terminal; raises UserError."""
    if prompt and prompt_file:
        raise UserError("give either --prompt or --prompt-file.")
    if prompt_file:
        try:
            return Path(prompt_file).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read the prompt {prompt_file}: {error.strerror}; check the path.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt {prompt_file} is not UTF-8 ({error.reason}); convert it (iconv).") from error
    if not prompt and not interactive and not sys.stdin.isatty():
        try:
            prompt = sys.stdin.read()
            prompt.encode()  # where Python reads what is not UTF-8 without a word
        except UnicodeError as error:
            raise UserError(f"the prompt on stdin is not UTF-8 ({error}); convert it (iconv).") from error
    return prompt


def first_ids(text: str, codec: TextCodec, loaded: LoadedModel) -> list[int]:
    """Ids that a stream begins with: the prompt's, or the end of a document where there is none."""
    ids = codec.first(text) or list(codec.end_ids[:1])
    if not ids:
        raise UserError(f"{loaded.name} has no token to begin a text with; give a --prompt.")
    return ids


def forbidden(model: LanguageModel, codec: TextCodec) -> torch.Tensor:
    """Ids that text cannot contain, bool [V]: spare rows of the vocabulary, sink tokens among them."""
    rows = model.head.weight.shape[0]
    if codec.size > rows:
        raise UserError(f"the tokenizer has {codec.size} ids, the model only {rows}; give the one it was trained with.")
    ids = torch.arange(rows, device=model.head.weight.device)
    return ids >= min(codec.size, model.config.tokenizer_size)


def _tokenizer_name(given: str, loaded: LoadedModel) -> str:
    if given:
        return given
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.name} comes without a tokenizer; name one with --tokenizer.")
    # With its folder, whose other files name the ends of texts and the chat template.
    return str(loaded.tokenizer.parent)


def figures(session: Session, device: torch.device) -> str:
    """How fast it was and what it took."""
    c = session.counts
    parts = []
    if c.written:
        parts.append(
            f"{c.written:,} tokens at {c.written / c.write_seconds:,.1f} tokens/s "
            f"({1000 * c.write_seconds / c.written:.2f} ms per token)"
        )
    if c.read:
        parts.append(f"{c.read:,} tokens read in {c.read_seconds:.2f} s")
    parts.append(f"cache {session.engine.cache}: {session.engine.rings.memory_bytes() / 2**20:,.1f} MiB")
    parts.append(f"peak memory {peak_memory(device) / 2**20:,.0f} MiB")
    return "; ".join(parts)
