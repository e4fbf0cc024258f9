"""Source code as training text: Python packages and a kernel tree, without anything of Python's standard library.

The models that come with the project were trained on such text and are streamed over the standard library, so none of
it, nor a copy of it, may be among their training text. Documents come out shuffled, so that any part of the file is a
fair sample of all of it.

    python -m data_prep.code_corpus --out code.jsonl --python SITE_PACKAGES... --c linux-source-6.1.tar.xz
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

COPY = 0.15
"""Share of a file's telling lines that also stand in the standard library, from which on it counts as a copy."""

TELLING = 30
"""Characters: shorter lines (``import os``, ``return None``) stand in every program and tell nothing."""

LARGEST = 1_000_000
"""Bytes; larger source files are generated tables."""

GENERATED = ("/drivers/gpu/drm/amd/include/",)
"""Folders of register tables: a third of the kernel's bytes, and hardly text."""


def telling_lines(text: str) -> set[int]:
    """Hashes of the lines that are long enough to recognise a copy by."""
    return {hash(line.strip()) for line in text.splitlines() if len(line.strip()) >= TELLING}


def standard_library_lines() -> set[int]:
    """The telling lines of every Python file of this interpreter's standard library, its tests included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    lines: set[int] = set()
    for path in root.rglob("*.py"):
        if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
            lines |= telling_lines(path.read_text(encoding="utf-8", errors="replace"))
    return lines


def is_copy(text: str, known: set[int]) -> bool:
    """Whether a file repeats the standard library: a vendored module, a backport, a fork."""
    lines = telling_lines(text)
    return bool(lines) and len(lines & known) / len(lines) >= COPY


def python_files(folders: list[Path]) -> Iterator[tuple[str, str]]:
    """(name, text) of the Python files below the folders."""
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if path.stat().st_size <= LARGEST:
                yield str(path.relative_to(folder)), path.read_text(encoding="utf-8", errors="replace")


def c_files(archive: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the .c and .h files of a tar archive."""
    with tarfile.open(archive) as tar:
        for member in tar:
            wanted = member.name.endswith((".c", ".h")) and not any(g in member.name for g in GENERATED)
            if member.isfile() and wanted and member.size <= LARGEST:
                content = tar.extractfile(member)
                assert content is not None
                yield member.name, content.read().decode("utf-8", errors="replace")


def unique(documents: Iterator[tuple[str, str]], known: set[int], seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """The documents that are neither empty, nor there already, nor a copy of the standard library."""
    for name, text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen and not is_copy(text, known):
            seen.add(digest)
            yield name, text


def main() -> None:
    parser = argparse.ArgumentParser(description="Source code as training text, without the standard library's.")
    parser.add_argument("--python", type=Path, nargs="*", default=[], help="folders of installed packages")
    parser.add_argument("--c", type=Path, help="tar archive of C sources")
    parser.add_argument("--c-bytes", type=int, default=0, help="use so many bytes of them, chosen at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    arguments = parser.parse_args()
    known, seen = standard_library_lines(), set[bytes]()
    documents = list(unique(python_files(arguments.python), known, seen))
    print(f"python: {len(documents):,} files, {sum(len(t) for _, t in documents) / 1e6:.1f}M characters", flush=True)
    shuffle = random.Random(arguments.seed).shuffle
    if arguments.c:
        chosen, size = [], 0
        c = list(unique(c_files(arguments.c), known, seen))
        shuffle(c)
        for name, text in c:
            if arguments.c_bytes and size >= arguments.c_bytes:
                break
            chosen.append((name, text))
            size += len(text)
        print(f"c: {len(chosen):,} of {len(c):,} files, {size / 1e6:.1f}M characters")
        documents += chosen
    shuffle(documents)
    with arguments.out.open("w", encoding="utf-8") as file:
        for name, text in documents:
            file.write(json.dumps({"source": name, "text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
