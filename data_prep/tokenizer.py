"""Tokenizers: loaded or trained, and an encoder that is fast on long documents and exact all the same."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.hub import ask, out_of_reach
from sinkpretrain.errors import UserError, first_line
from sinkpretrain.files import read_json
from sinkpretrain.tokens import MANIFEST_NAME

END_OF_TEXT = "<|endoftext|>"

# `encode` gets slower per character on long texts: on English books with Pythia's tokenizer, 250,000 tokens/s
# on whole books, 530,000 in parts of 50,000 characters and 690,000 in parts of 5,000 (one core).
FRAGMENT_CHARACTERS = 4096

_PROBES = (
    "The quick brown fox jumps over 12 lazy dogs",
    "It's 3 o'clock, isn't it? (yes) e.g. so 1 2 3 a b c",
    "Ein naïver Übergang été 中文 字 слово и дело",
    "def f(x): return x if x else None of the in to",
)


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer as it travels: the bytes of its tokenizer.json.

    Attributes:
        content: bytes of tokenizer.json, exactly as found
        eos: end-of-sequence token named by the tokenizer's configuration, if any
        eod: id that documents were prepared with, where what lies beside the file says so
    """

    content: bytes
    eos: str | None = None
    eod: int | None = None

    @property
    def sha256(self) -> str:
        return sha256(self.content).hexdigest()

    def size(self) -> int:
        """Number of ids, added tokens included."""
        return 1 + max(int(id_) for id_ in self.load().get_vocab(with_added_tokens=True).values())

    def load(self, reads_special: bool = False) -> Any:
        """A `tokenizers.Tokenizer`, without truncation and padding.

        Args:
            reads_special: whether "<|endoftext|>" in a text is that token. In text that is prepared it is text: it
                must not forge a document boundary.
        """
        tokenizer = Tokenizer.from_str(self.content.decode("utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = not reads_special
        return tokenizer

    def eod_id(self, eod_token: str | None = None) -> int:
        """Id of the end-of-document token: asked for, known of its data, `<|endoftext|>`, or the tokenizer's own eos.

        Raises:
            UserError: the tokenizer has none of them.
        """
        if self.eod is not None and not eod_token:
            return self.eod
        tokenizer = self.load()
        candidates = [eod_token] if eod_token else [END_OF_TEXT, self.eos]
        for token in candidates:
            id_ = tokenizer.token_to_id(token) if token else None
            if id_ is not None:
                return int(id_)
        if eod_token:
            raise UserError(f"the tokenizer has no token {eod_token!r}: name one of its tokens with --eod-token.")
        raise UserError(
            f"the tokenizer has no end-of-document token (neither {END_OF_TEXT} nor an eos token): "
            "name one of its tokens with --eod-token."
        )


def load_tokenizer(name: str) -> TokenizerFile:
    """Read a tokenizer from a tokenizer.json, a folder that holds one, or the Hugging Face Hub.

    Raises:
        UserError: there is none under that name, or it is unreadable.
    """
    path = Path(name)
    if path.is_file():
        # What lies beside a file of that name belongs to it; another name may be anybody's neighbour.
        loaded = _of_folder(path.parent) if path.name == "tokenizer.json" else TokenizerFile(path.read_bytes())
    elif (path / "tokenizer.json").is_file():
        loaded = _of_folder(path)
    elif (path.suffix == ".json" or path.is_absolute()) and not path.is_dir():
        raise UserError(f"tokenizer {name} does not exist: give a tokenizer.json, its folder, or a name on the Hub.")
    else:
        loaded = _hub_tokenizer(name)
    try:
        loaded.load()
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"tokenizer {name} cannot be read ({error}): give a tokenizer.json file.") from error
    return loaded


def train_tokenizer(spec: str, texts: Iterable[str]) -> TokenizerFile:
    """Train a byte-level BPE tokenizer in which `<|endoftext|>` is id 0.

    Args:
        spec: "bpe:<number of ids>", for example bpe:4096
        texts: the sample to learn from

    Raises:
        UserError: the spec is not of that form, or too small to hold the 256 bytes.
    """
    size = training_size(spec)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return TokenizerFile(tokenizer.to_str(pretty=True).encode())


def training_size(spec: str) -> int:
    """Vocabulary size that a "bpe:<number>" asks for; UserError where it is something else."""
    kind, _, number = spec.partition(":")
    if kind != "bpe" or not number.isdecimal() or int(number) < 257:
        raise UserError(f"--train-tokenizer {spec!r} is not bpe:<number of ids, 257 or more>: use say bpe:4096.")
    return int(number)


@dataclass(frozen=True)
class EncodedBatch:
    """Token ids of some documents laid end to end.

    Attributes:
        ids: uint16 or int32 [sum(sizes)]
        sizes: int64 [documents]
        keys: uint64 [documents], seeded hash of each document's text
        skipped: documents left out because they were empty or one token long
    """

    ids: NDArray[Any]
    sizes: NDArray[np.int64]
    keys: NDArray[np.uint64]
    skipped: int


class Encoder:
    """Turns texts into ids; one per process.

    Args:
        file: the tokenizer
        eod_id: id put after each document
        seed: of the documents' hashes
    """

    def __init__(self, file: TokenizerFile, eod_id: int, seed: int = 0) -> None:
        self._tokenizer = file.load()
        self._eod_id = eod_id
        self._seed = seed
        self._dtype = np.dtype(np.uint16 if file.size() < 65_500 else np.int32)
        self._fragment = FRAGMENT_CHARACTERS if splits_at_words(self._tokenizer) else None

    def documents(self, texts: list[str]) -> EncodedBatch:
        """Encode whole documents, each closed by the end-of-document token."""
        encoded = self._encode(texts)
        kept = [np.array([*ids, self._eod_id], dtype=self._dtype) for ids in encoded if len(ids) > 1]
        kept_texts = [text for text, ids in zip(texts, encoded, strict=True) if len(ids) > 1]
        return EncodedBatch(
            ids=np.concatenate(kept) if kept else np.empty(0, dtype=self._dtype),
            sizes=np.array([len(ids) for ids in kept], dtype=np.int64),
            keys=np.array([self._key(text) for text in kept_texts], dtype=np.uint64),
            skipped=len(encoded) - len(kept),
        )

    def part(self, text: str, last: bool) -> EncodedBatch:
        """Encode a part of a document too long to travel whole; the last part closes it."""
        ids = np.array(self._encode([text])[0] + [self._eod_id] * last, dtype=self._dtype)
        return EncodedBatch(ids, np.array([len(ids)]), np.array([self._key(text)], dtype=np.uint64), skipped=0)

    def _key(self, text: str) -> int:
        """Of the text, not of its ids: the same documents are held out whatever the tokenizer."""
        salt = self._seed.to_bytes(16, "little", signed=True)
        content = text.encode("utf-8", "surrogatepass")
        return int.from_bytes(blake2b(content, digest_size=8, salt=salt).digest(), "little")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids per text. Fragments are encoded and joined again, which `splits_at_words` makes exact."""
        fragments: list[str] = []
        counts = []
        for text in texts:
            before = len(fragments)
            fragments.extend(cut(text, self._fragment) if self._fragment else [text])
            counts.append(len(fragments) - before)
        try:
            encodings = self._tokenizer.encode_batch_fast(fragments, add_special_tokens=False)
        except (
            TypeError,
            UnicodeEncodeError,
        ):  # half a surrogate pair
            fragments = [without_surrogates(fragment) for fragment in fragments]
            encodings = self._tokenizer.encode_batch_fast(fragments, add_special_tokens=False)
        remaining = iter(encodings)
        result = []
        for count in counts:
            ids: list[int] = []
            for _ in range(count):
                ids.extend(next(remaining).ids)
            result.append(ids)
        return result


def cut(text: str, limit: int) -> Iterator[str]:
    """Cut a text into parts of at most about `limit` characters, each cut before a space between two words.

    Where there is no such space the part gets longer, so that joining the parts' tokens is always exact
    (given `splits_at_words`).
    """
    begin = 0
    while len(text) - begin > limit:
        at = last_cut(text, begin + limit // 2, begin + limit) or _first_cut(text, begin + limit)
        if at is None:
            break
        yield text[begin:at]
        begin = at
    yield text[begin:]


def cut_blocks(blocks: Iterable[str], limit: int, longest: int) -> Iterator[str]:
    """The same for a text that arrives in blocks; holds little more than `limit` characters.

    A text without any space between words is cut anyway where it reaches `longest` characters.
    """
    buffer = ""
    for block in blocks:
        buffer += block
        if len(buffer) > 2 * limit:
            *parts, buffer = cut(buffer, limit)
            yield from parts
        if len(buffer) > longest:
            yield buffer
            buffer = ""
    yield from cut(buffer, limit)


def last_cut(text: str, low: int, high: int) -> int | None:
    """Position of the last single space between letters or digits with low < position < high."""
    at = high
    while (at := text.rfind(" ", low + 1, at)) != -1:
        if _between_words(text, at):
            return at
    return None


def splits_at_words(tokenizer: Any) -> bool:
    """Whether this tokenizer never forms a token across a space between two words.

    True for byte-level BPE as of GPT-2, GPT-NeoX and Llama 3. False where a prefix is put before every text
    (the parts would get one each) or where nothing splits words.
    """
    if tokenizer.pre_tokenizer is None:
        return False
    for text in _PROBES:
        cuts = [at for at in range(1, len(text) - 1) if text[at] == " " and _between_words(text, at)]
        parts = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        joined = [id_ for part in parts for id_ in tokenizer.encode(part, add_special_tokens=False).ids]
        if joined != tokenizer.encode(text, add_special_tokens=False).ids:
            return False
        normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        starts = {span[0] for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(normal)}
        # A pre-tokenizer may keep the space with the word that follows or drop it.
        if len(normal) != len(text) or not all({at, at + 1} & starts for at in cuts):
            return False
    return True


def _between_words(text: str, at: int) -> bool:
    return 0 < at < len(text) - 1 and text[at - 1].isalnum() and text[at + 1].isalnum()


def _first_cut(text: str, low: int) -> int | None:
    at = low - 1
    while (at := text.find(" ", at + 1)) != -1:
        if _between_words(text, at):
            return at
    return None


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which JSON can express and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def require_same_ids(ours: Path | None, theirs: Path, otherwise: str, advice: str) -> None:
    """That every token of theirs has the same id in ours: files may differ and their ids mean the same. (Ours may have
    more, as an exported model's has its sink tokens.)

    Raises:
        UserError: it has not, or that cannot be told; ``otherwise`` begins the sentence and ``advice`` ends it.
    """
    if ours is None:
        raise UserError(f"{otherwise}; {advice}.")
    try:
        known, other = (load_tokenizer(str(path)).load().get_vocab() for path in (ours, theirs))
    except UserError as error:
        raise UserError(f"{otherwise}, as far as can be told ({error}); {advice}.") from error
    strange = [(number, token) for token, number in other.items() if known.get(token) != number]
    if strange:
        raise UserError(f"{otherwise} ({min(strange)[1]!r} is not the same id in both); {advice}.")


def _of_folder(folder: Path) -> TokenizerFile:
    file = TokenizerFile((folder / "tokenizer.json").read_bytes(), _folder_eos(folder))
    return replace(file, eod=_folder_eod(folder, file.sha256))


def _folder_eod(folder: Path, sha256: str) -> int | None:
    """The end-of-document id that packed tokens, a run on them or its exported folder were made with.

    No tokenizer.json says this: it may be named only in the tokenizer_config.json that was beside it when the text was
    prepared, or by --eod-token.
    """
    manifest, run, config = (_about(folder / name) for name in (MANIFEST_NAME, "run.json", "config.json"))
    ends = (
        manifest.get("eod_id") if manifest.get("tokenizer_sha256") == sha256 else None,
        run.get("end_of_document") if run.get("tokenizer_sha256") == sha256 else None,
        (config.get("sinkpretrain") or {}).get("end_of_document"),  # its tokenizer has the sink tokens in addition
    )
    return next((end for end in ends if isinstance(end, int)), None)


def _about(path: Path) -> dict[str, Any]:
    """A JSON object; nothing where it is something else, which is for those to say that cannot do without."""
    with contextlib.suppress(UserError):
        about = read_json(path) if path.is_file() else None
        return about if isinstance(about, dict) else {}
    return {}


def _folder_eos(folder: Path) -> str | None:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): repair or remove it.") from error
    return token.get("content") if isinstance(token, dict) else token


def _hub_tokenizer(name: str) -> TokenizerFile:
    """Of a folder that transformers can make sense of, or of the Hub, which transformers would ask for a minute."""
    from transformers import AutoTokenizer  # takes seconds to import, and most users have a file

    fault = None if Path(name).is_dir() else ask("tokenizer", "model", name).fault
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=fault is not None)
        content = tokenizer.backend_tokenizer.to_str(pretty=True).encode()
    except (OSError, ValueError, AttributeError) as error:
        if fault is not None:
            raise out_of_reach("tokenizer", "model", name, fault) from error
        advice = "give a file, a folder or a Hub name"
        if Path(name).is_dir():
            advice = "it has no tokenizer.json; give a folder that has one, a file or a Hub name"
        raise UserError(f"tokenizer {name} cannot be loaded ({first_line(error)}): {advice}.") from error
    return TokenizerFile(content, tokenizer.eos_token)
