"""Encoding in parallel: batches in, results out in the order of the batches, with few of them in flight.

Processes, not the threads inside `encode_batch`: those wait for the longest document of each batch, and they
cannot overlap with reading and writing in Python.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from data_prep.batches import Batch
from data_prep.tokenizer import EncodedBatch, Encoder, TokenizerFile
from sinkpretrain.errors import UserError

_PARALLELISM = "TOKENIZERS_PARALLELISM"
_EncoderArguments = tuple[TokenizerFile, int, int]


def available_cores() -> int:
    """Cores that this process may use, which on a cluster are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode_batches(
    batches: Iterable[Batch], tokenizer: TokenizerFile, eod_id: int, seed: int, workers: int
) -> Generator[tuple[Batch, EncodedBatch], None, None]:
    """Encode every batch, in order; with one worker in this process.

    Closing the generator, also by an exception or Ctrl-C, ends the workers.

    Raises:
        UserError: a worker was killed from outside, which usually means that memory ran out.
    """
    arguments = (tokenizer, eod_id, seed)
    with _single_threaded():
        if workers == 1:
            encoder = Encoder(*arguments)
            for batch in batches:
                yield batch, _encode(encoder, *_task(batch))
        else:
            yield from _encode_in_pool(batches, arguments, workers)


def _encode_in_pool(
    batches: Iterable[Batch], arguments: _EncoderArguments, workers: int
) -> Generator[tuple[Batch, EncodedBatch], None, None]:
    # Spawned, not forked: the tokenizers library has threads that a fork would not carry over.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=arguments)
    waiting: deque[tuple[Batch, Future[EncodedBatch]]] = deque()
    try:
        for batch in batches:
            with _workers_born_deaf():
                waiting.append((batch, executor.submit(_encode_here, *_task(batch))))
            if len(waiting) > 2 * workers + 2:  # bounds the memory, and keeps every worker busy
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely because memory ran out: "
            "run the same command again with fewer --workers."
        ) from error
    finally:
        with _undisturbed():
            executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _workers_born_deaf() -> Iterator[None]:
    """Processes that are started within never see Ctrl-C, which is the parent's business: it ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without Ctrl-C: a pool whose shutdown is cut short by a second one is waited for at exit, for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _task(batch: Batch) -> tuple[list[str], bool, bool]:
    return [part.text for part in batch], batch[0].is_whole, batch[-1].is_last


def _encode(encoder: Encoder, texts: list[str], is_whole: bool, is_last: bool) -> EncodedBatch:
    return encoder.documents(texts) if is_whole else encoder.part(texts[0], is_last)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(tokenizer: TokenizerFile, eod_id: int, seed: int) -> None:
    global _encoder
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encoder = Encoder(tokenizer, eod_id, seed)


def _encode_here(texts: list[str], is_whole: bool, is_last: bool) -> EncodedBatch:
    assert _encoder is not None
    return _encode(_encoder, texts, is_whole, is_last)


def _die_with_parent() -> None:
    """End this worker when the parent is killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """One thread per encoder, in this process and in those it starts."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before
