"""How fast prepare is, against a bare loop over `encode_batch` on the same cores and documents.

python -m data_prep.benchmark --source 'books/train-*.jsonl.xz' --tokenizer 20B_tokenizer.json
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data_prep.pool import available_cores
from data_prep.prepare import PrepareConfig, prepare
from data_prep.sources import HubOptions, resolve
from data_prep.tokenizer import load_tokenizer
from sinkpretrain import __version__

_BATCH = 64  # documents per call of the bare loop


def benchmark(
    text_files: list[str],
    tokenizer: str,
    seconds: float = 20.0,
    rounds: int = 3,
    workers: int = 0,
    column: str = "text",
) -> dict[str, Any]:
    """Tokens per second of both, medians of alternated runs.

    The bare loop has its documents in memory and throws the ids away; prepare reads JSON lines, and its time
    includes the start of the workers, writing, merging and hashing.

    Args:
        text_files: any local source that prepare takes
        tokenizer: file, folder or name
        seconds: rough length of one run of the bare loop
        rounds: how often each is run
        workers: of prepare; 0 means one per core
        column: that holds the text

    Returns:
        rates, their ratio, and what was measured on what
    """
    encoder = load_tokenizer(tokenizer).load()
    units = [unit for name in text_files for unit in resolve(name, column, HubOptions()).units]
    texts = ("".join(document.blocks) for unit in units for document in unit.documents())
    documents: list[str] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds and (batch := list(itertools.islice(texts, _BATCH))):
        encoder.encode_batch(batch, add_special_tokens=False)
        documents += batch

    bare, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "documents.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        for number in range(rounds):
            start, tokens = time.perf_counter(), 0
            for begin in range(0, len(documents), _BATCH):
                encodings = encoder.encode_batch(documents[begin : begin + _BATCH], add_special_tokens=False)
                tokens += sum(len(encoding) for encoding in encodings)
            bare.append(tokens / (time.perf_counter() - start))

            out = Path(folder) / str(number)
            start = time.perf_counter()
            manifest = prepare(PrepareConfig([str(source)], out, tokenizer, workers=workers))
            n_tokens = sum(split.tokens for split in manifest.splits.values())
            ours.append(n_tokens / (time.perf_counter() - start))
    return {
        "prepare_tokens_per_second": round(statistics.median(ours)),
        "encode_batch_tokens_per_second": round(statistics.median(bare)),
        "ratio": round(statistics.median(ours) / statistics.median(bare), 3),
        "prepare_runs": [round(rate) for rate in ours],
        "encode_batch_runs": [round(rate) for rate in bare],
        "documents": len(documents),
        "characters": sum(map(len, documents)),
        "tokens": tokens,
        "workers": workers or available_cores(),
        "cores": available_cores(),
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
        "sinkpretrain": __version__,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--column", default="text")
    arguments = parser.parse_args()
    result = benchmark(
        arguments.source,
        arguments.tokenizer,
        arguments.seconds,
        arguments.rounds,
        arguments.workers,
        arguments.column,
    )
    print(json.dumps(result, indent=2))
