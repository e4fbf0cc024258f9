"""Prepared folders of packed tokens, made in a moment: text whose next token a small model can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sinkpretrain.files import sha256_file
from sinkpretrain.tokens import Manifest, SplitRecord, TokenFile, TokenWriter

TOKENIZER_SIZE = 96


def make_data(folder: Path, documents: int = 120, seed: int = 0, tokenizer: str = "") -> Path:
    """A folder as ``prepare`` writes it, with ids 0 .. 95 (0 ends a document) and this tokenizer or its own."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer or f'{{"made": {seed}}}')
    generator = np.random.default_rng(seed)
    splits = {}
    for split, count in (("train", documents), ("validation", 20)):
        with TokenWriter(folder / split, TOKENIZER_SIZE) as writer:
            for _ in range(count):
                steps = generator.integers(0, 4, 300)
                writer.add_document(np.append(np.cumsum(steps) % (TOKENIZER_SIZE - 1) + 1, 0))
        file = TokenFile.open(folder / split)
        splits[split] = SplitRecord(
            documents=file.n_documents,
            tokens=file.n_tokens,
            end_of_document=file.n_documents,
            skipped_documents=0,
            max_token_id=TOKENIZER_SIZE - 1,
            sha256_bin=sha256_file(folder / f"{split}.bin"),
            sha256_idx=sha256_file(folder / f"{split}.idx"),
        )
    Manifest(
        tokenizer_sha256=sha256_file(folder / "tokenizer.json"),
        tokenizer_size=TOKENIZER_SIZE,
        eod_id=0,
        source=[],
        splits=splits,
    ).save(folder)
    return folder
