"""From units to batches: the portions of text that are encoded at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_prep.sources import Unit
from data_prep.tokenizer import cut_blocks

BATCH_CHARACTERS = 1 << 19  # 0.2 s of work for a core, 20 MB of memory while encoding
_LONGEST_PART = 1 << 24


@dataclass(frozen=True)
class Position:
    """A place between two documents: number `document` of unit number `unit` comes next."""

    unit: int = 0
    document: int = 0


@dataclass(frozen=True)
class Part:
    """A document, or a part of one that is too long to be handled whole.

    Attributes:
        role: "train" or "validation", the kind of source it comes from
        text: of this part
        is_first: whether a document begins here
        is_last: whether it ends here
        after: where to continue once the document is done
        bytes_read: of all units up to here
    """

    role: str
    text: str
    is_first: bool
    is_last: bool
    after: Position
    bytes_read: int

    @property
    def is_whole(self) -> bool:
        return self.is_first and self.is_last


Batch = list[Part]  # whole documents of one role, or a single part


def read_parts(
    units: list[tuple[str, Unit]], start: Position, limits: dict[str, int], cut_long: bool
) -> Iterator[Part]:
    """Everything from `start` on, in order.

    Args:
        units: with their roles
        start: where to begin
        limits: most documents to read of a role; a role that is absent has no limit
        cut_long: whether long documents may be cut into parts; without it they are held in memory whole
    """
    bytes_before = sum(unit.n_bytes for _, unit in units[: start.unit])
    left = dict(limits)
    for number in range(start.unit, len(units)):
        role, unit = units[number]
        skip = start.document if number == start.unit else 0
        if left.get(role) != 0:
            for index, document in enumerate(unit.documents(skip), start=skip):
                after, bytes_read = Position(number, index + 1), bytes_before + document.bytes_read
                if cut_long:
                    texts = cut_blocks(document.blocks, BATCH_CHARACTERS, _LONGEST_PART)
                else:
                    texts = iter(("".join(document.blocks),))
                text, is_first = next(texts), True
                for following in texts:
                    yield Part(role, text, is_first, False, after, bytes_read)
                    text, is_first = following, False
                yield Part(role, text, is_first, True, after, bytes_read)
                if role in left:
                    left[role] -= 1
                    if not left[role]:
                        break
        bytes_before += unit.n_bytes


def group(parts: Iterable[Part]) -> Iterator[Batch]:
    """Gather whole documents up to BATCH_CHARACTERS; a part of a longer one is a batch of its own."""
    batch: Batch = []
    n_characters = 0
    for part in parts:
        fits = part.is_whole and n_characters + len(part.text) <= BATCH_CHARACTERS
        if batch and not (fits and part.role == batch[0].role):
            yield batch
            batch, n_characters = [], 0
        batch.append(part)
        n_characters += len(part.text)
        if not part.is_whole:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch
