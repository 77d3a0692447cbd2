"""Corpora for language modelling: how the prepare scripts write them, how train.py and sample.py read them.

A corpus is a folder with train.bin and val.bin (token ids, one after the other, little endian) and meta.json, which
says what the ids mean and how many there are. A folder with a meta.json is complete: it is written last.
"""

import collections
import contextlib
import difflib
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.files import at_home, make_folder, sha256, write_json, writing
from training.errors import BadInput
from training.files import here
from training.owner import Owner

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # 96 symbols; the index of a symbol is its token id
DTYPES = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2")}
GPT2_VOCAB = 50257
SPLITS = ("train", "val")
CHECKPOINT_BYTES = 1 << 22  # a kill loses at most about this much of the work
SCAN = 1 << 24  # token ids looked at at a time
FOREIGN_NAMED = 10  # of the characters for which documents were dropped, the most frequent

FOREIGN = 255
TABLE = np.full(256, FOREIGN, np.uint8)  # byte -> token id
TABLE[np.frombuffer(ALPHABET.encode(), np.uint8)] = np.arange(len(ALPHABET))

FOREIGN_CHARACTER = re.compile(r"[^\n -~]")
TYPOGRAPHY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "..."})

CHARACTERS = {"tokenizer": "characters", "alphabet": ALPHABET, "vocab_size": len(ALPHABET), "dtype": "uint8"}
GPT2 = {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB, "dtype": "uint16"}


def encode_symbols(text):
    """Token ids (uint8) of a text in the 96 symbols, or None if it has any other character."""
    if not text.isascii():
        return None
    ids = TABLE[np.frombuffer(text.encode("ascii"), np.uint8)]
    return None if (ids == FOREIGN).any() else ids


def to_ascii(text):
    """Typographic quotes, dashes and dots as ASCII, accents left off, tabs as spaces; other characters stay."""
    decomposed = unicodedata.normalize("NFKD", text.translate(TYPOGRAPHY).expandtabs())
    return "".join(character for character in decomposed if not unicodedata.combining(character))


def drawn_for_val(seed, key, fraction):
    """Whether a document belongs to the val split; a function of its arguments, so that a restart draws the same."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def gpt2_encoding():
    """tiktoken's GPT-2 byte-pair encoding; it downloads its two files once."""
    try:
        import tiktoken
    except ImportError as error:
        raise BadInput("GPT-2 tokens need the package tiktoken: pip install tiktoken") from error
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise BadInput(
            f"tiktoken could not download GPT-2's vocabulary ({type(error).__name__}); on a machine without a network, "
            "set TIKTOKEN_CACHE_DIR to a copy of another machine's tiktoken cache"
        ) from error


class CorpusWriter:
    """Writes a corpus so that a kill at any moment leaves the old one, or the new one, or a start to go on from.

    with CorpusWriter(folder, about) as writer:
        ... writer.add("train", ids) ...
        meta = writer.finish()

    Ids go to train.bin.partial and val.bin.partial; `checkpoint` makes them durable and notes in progress.partial how
    far the source was read. A later writer with an equal `about` (a JSON-able dict: what meta.json says of the corpus
    and of its source) goes on from there: it cuts the files back to the note, and `documents` and `position` say where
    to read on. `finish` renames the files, the last note becoming meta.json. BadInput inside the block throws the
    partial files away, and so does a full disk (WriteError) before the first note. Entering it while another process
    writes there is BadInput.
    """

    def __init__(self, folder, about):
        make_folder(folder)
        self.folder, self.about = Path(folder), about
        self.note = _note_path(folder)
        self.partial = {split: _partial_path(folder, split) for split in SPLITS}
        self.dtype = DTYPES[about["dtype"]]
        self.tokens = dict.fromkeys(SPLITS, 0)
        self.documents = {"train": 0, "val": 0, "dropped": 0}
        self.foreign = collections.Counter()  # character -> documents dropped that have it
        self.position = None
        self.since_checkpoint = 0

    def __enter__(self):
        self.owner = Owner(self.folder)
        note = self._start()
        if note:
            self.tokens, self.documents, self.position = note["tokens"], note["documents"], note["position"]
            self.foreign.update(note.get("foreign", {}))
        with writing(self.folder):
            if not note:
                self.note.unlink(missing_ok=True)  # before the files it speaks of change
            self.files = {}
            for split in SPLITS:
                self.partial[split].touch()
                self.files[split] = self.partial[split].open("r+b")
                self.files[split].truncate(self.tokens[split] * self.dtype.itemsize)
                self.files[split].seek(0, os.SEEK_END)
        return self

    def __exit__(self, kind, error, trace):
        for file in self.files.values():
            with contextlib.suppress(OSError):  # what was to be kept is flushed already
                file.close()
        if isinstance(error, BadInput) or (isinstance(error, OSError) and not self.note.exists()):
            for path in (self.note, *self.partial.values()):
                path.unlink(missing_ok=True)
        self.owner.release()

    def _start(self):
        """The note of a killed run over the same source, or None: then the work starts at the beginning."""
        note = _read_note(self.folder, self.about)
        if not note or "position" not in note or not all(path.exists() for path in self.partial.values()):
            return None
        sizes = {split: path.stat().st_size for split, path in self.partial.items()}
        whole = all(sizes[split] >= note["tokens"][split] * self.dtype.itemsize for split in SPLITS)
        return note if whole else None

    def add(self, split, ids, documents=1):
        ids = np.asarray(ids, self.dtype)
        with writing(self.partial[split]):
            self.files[split].write(ids.tobytes())
        self.tokens[split] += ids.size
        self.documents[split] += documents
        self.since_checkpoint += ids.nbytes

    def drop(self, text):
        """Count a document that is left out for characters outside the 96 symbols."""
        self.documents["dropped"] += 1
        self.foreign.update(set(FOREIGN_CHARACTER.findall(text)))

    @property
    def checkpoint_due(self):
        return self.since_checkpoint >= CHECKPOINT_BYTES

    def checkpoint(self, position=None):
        """Keep everything added so far; `position` is what the source needs to go on, if not the count of documents."""
        self._flush()
        counts = {"tokens": self.tokens, "documents": self.documents, "foreign": self.foreign}
        with writing(self.note):
            write_json(self.note, {**self.about, **counts, "position": position})
        self.since_checkpoint = 0

    def _flush(self):
        for split, file in self.files.items():
            with writing(self.partial[split]):
                file.flush()
                os.fsync(file.fileno())

    def finish(self):
        """Put the files in place and return meta.json's content; BadInput if a split is empty."""
        counts = {"tokens": self.tokens}
        if any(self.documents.values()):
            counts["documents"] = self.documents
        if self.foreign:
            often = sorted(self.foreign.items(), key=lambda pair: (-pair[1], pair[0]))[:FOREIGN_NAMED]
            counts["foreign"] = {f"U+{ord(character):04X}": count for character, count in often}
        for split in SPLITS:
            if not self.tokens[split]:
                each = ", ".join(f"{name} {count:,}" for name, count in self.documents.items())
                problem = f"the {split} split would be empty (documents: {each}); it takes more text"
                why = _dropped(counts) or "an empty line separates two documents of a text"
                raise BadInput(f"{problem}; {why}")
        self._flush()
        counts["sha256"] = {split: sha256(self.partial[split]) for split in SPLITS}
        meta = {**self.about, **counts}
        with writing(self.folder):
            write_json(self.note, meta)
            _put_in_place(self.folder)
        return meta


def _note_path(folder):
    return Path(folder) / "progress.partial"


def _partial_path(folder, split):
    return Path(folder) / f"{split}.bin.partial"


def _read_note(folder, about):
    """What a killed run over the same source noted last, or None. A note with sha256 is a whole meta.json."""
    try:
        note = json.loads(_note_path(folder).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return note if all(note.get(key) == value for key, value in about.items()) else None


def _put_in_place(folder):
    """Rename what is written; after a kill it can be done again, since the note goes last."""
    (Path(folder) / "meta.json").unlink(missing_ok=True)
    for split in SPLITS:
        if _partial_path(folder, split).exists():
            os.replace(_partial_path(folder, split), Path(folder) / f"{split}.bin")
    os.replace(_note_path(folder), Path(folder) / "meta.json")


def complete(folder, about):
    """Whether the folder holds the corpus that `about` asks for; first ends a renaming that a kill cut short."""
    if "sha256" in (_read_note(folder, about) or {}):
        _put_in_place(folder)
    try:
        meta = read_meta(folder)
        for split in SPLITS:
            _open_split(folder, split, meta)
    except BadInput:
        return False
    return all(meta.get(key) == value for key, value in about.items())


def report(folder, meta):
    """Say what was made, as the readmes list it."""
    documents = meta.get("documents", {})
    for split in SPLITS:
        count = f" in {documents[split]:,} documents" if documents else ""
        print(f"{Path(folder) / split}.bin: {meta['tokens'][split]:,} tokens{count}, sha256 {meta['sha256'][split]}")
    if documents.get("dropped"):
        print(_dropped(meta))


def _dropped(meta):
    """How many documents were dropped, for which characters and what keeps them; "" if none was."""
    if not meta.get("foreign"):
        return ""
    documents = meta["documents"]
    named = ", ".join(f"{_shown(code)} in {count:,}" for code, count in meta["foreign"].items())
    return (
        f"{documents['dropped']:,} of {sum(documents.values()):,} documents dropped for characters outside the "
        f"{len(ALPHABET)} symbols: {named}; openwebtext_small/prepare.py --ascii writes quotes, dashes and accents in "
        "ASCII, openwebtext/prepare.py takes every character"
    )


def _shown(code):
    character = chr(int(code[2:], 16))
    return f"{code} {character}" if character.isprintable() else code


@dataclass(frozen=True)
class Corpus:
    train: np.memmap  # token ids
    val: np.memmap
    vocab_size: int  # of the model to train: the one asked for, or else the corpus's own
    meta: dict
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def find_corpus(data_dir, dataset):
    """The folder of a dataset: that in data_dir, or data_dir itself, where it is the dataset's own."""
    folder = Path(data_dir) / dataset
    own = not folder.exists() and (Path(data_dir).name == dataset or (Path(data_dir) / "meta.json").exists())
    return Path(data_dir) if own else folder


def load_corpus(folder, block_size, vocab_size=None):
    """Open a prepared corpus, checked before training rather than hours into it.

    `vocab_size`: of the model, where it is not the corpus's own (GPT-2's 50257 is often padded to 50304). BadInput for
    files missing, empty or of another length or other contents than meta.json says; fewer than block_size + 1 tokens in
    a split; a token id outside either vocabulary; a meta.json that is damaged or names an unknown dtype or tokenizer.
    """
    meta = read_meta(folder)
    encode, decode = codec(meta)
    limit = min(meta["vocab_size"], vocab_size or meta["vocab_size"])
    splits = {split: _open_split(folder, split, meta) for split in SPLITS}
    for split, ids in splits.items():
        if len(ids) < block_size + 1:
            raise BadInput(
                f"{Path(folder) / split}.bin has {len(ids):,} tokens; block_size {block_size} needs at least "
                f"{block_size + 1}: choose a smaller block_size or a larger corpus"
            )
        if limit < meta["vocab_size"]:
            _check_ids(ids, limit, Path(folder) / f"{split}.bin")
    _verify(Path(folder), splits, meta)
    return Corpus(**splits, vocab_size=vocab_size or meta["vocab_size"], meta=meta, encode=encode, decode=decode)


def codec(meta):
    """(encode, decode) of the corpus that `meta` describes: text to token ids and back. BadInput if meta cannot say.

    encode raises BadInput for a character outside the alphabet. GPT-2's vocabulary is loaded at the first call.
    """
    _check_meta(meta, "the corpus's meta")
    if meta["tokenizer"] == "gpt2":
        return gpt2_codec()
    alphabet = meta["alphabet"]
    index = {symbol: i for i, symbol in enumerate(alphabet)}

    def encode(text):
        foreign = sorted(set(text) - set(index))
        if foreign:
            raise BadInput(f"{foreign[0]!r} is not one of the {len(alphabet)} characters of this corpus")
        return [index[symbol] for symbol in text]

    def decode(ids):
        return "".join(alphabet[i] for i in (ids.tolist() if hasattr(ids, "tolist") else ids))

    return encode, decode


def gpt2_codec():
    """(encode, decode) of GPT-2's tokens."""

    def encode(text):
        return gpt2_encoding().encode(text, allowed_special={"<|endoftext|>"})

    def decode(ids):
        return gpt2_encoding().decode([int(i) for i in ids])

    return encode, decode


def read_meta(folder):
    """meta.json of a corpus folder, checked; BadInput names the command that makes what is missing."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path} is missing; {_how_to_make(folder)}") from error
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}); {_how_to_make(folder)}") from error
    _check_meta(meta, path)
    return meta


def _check_meta(meta, where):
    def require(condition, problem):
        if not condition:
            raise BadInput(f"{where} {problem}")

    require(isinstance(meta, dict), "is not a JSON object")
    require(meta.get("tokenizer") in ("characters", "gpt2"), f"names the unknown tokenizer {meta.get('tokenizer')!r}")
    known = list(DTYPES)
    require(meta.get("dtype") in known, f"names the unknown dtype {meta.get('dtype')!r}; known: {', '.join(known)}")
    require(type(meta.get("vocab_size")) is int and meta["vocab_size"] > 0, "has no positive vocab_size")
    tokens = meta.get("tokens")
    require(isinstance(tokens, dict), "does not count its tokens")
    require(all(type(tokens.get(split)) is int for split in SPLITS), "does not count the tokens of both splits")
    if meta["tokenizer"] == "characters":
        alphabet = meta.get("alphabet")
        distinct = isinstance(alphabet, str) and len(set(alphabet)) == len(alphabet) == meta["vocab_size"]
        require(distinct, f"needs an alphabet of vocab_size ({meta['vocab_size']}) distinct characters")
    require(isinstance(meta.get("sha256", {}), dict), "has no hash for each split in its sha256")


def _how_to_make(folder):
    """The command that makes a corpus folder, or the nearest name among those that can be made."""
    folder = Path(folder)
    names = sorted(path.parent.name for path in Path(__file__).parent.glob("*/prepare.py") if path.parent.name != "ett")
    if folder.name in names:
        where = "" if at_home(folder, Path(__file__).parent) else f" --out {folder}"
        return f"make it with: python {here(f'data/{folder.name}/prepare.py')}{where}"
    near = difflib.get_close_matches(folder.name, names, n=1)
    guess = f"did you mean data/{near[0]}? " if near else ""
    return f"{guess}make one with: python {here('data/NAME/prepare.py')} --out {folder}, NAME one of {', '.join(names)}"


def _open_split(folder, split, meta):
    path, dtype = Path(folder) / f"{split}.bin", DTYPES[meta["dtype"]]
    if not path.is_file():
        raise BadInput(f"{path} is missing; {_how_to_make(folder)}")
    size, tokens = path.stat().st_size, meta["tokens"][split]
    if size != tokens * dtype.itemsize or size == 0:
        raise BadInput(
            f"{path} has {size:,} bytes; meta.json counts {tokens:,} tokens, that is {tokens * dtype.itemsize:,} "
            f"bytes; {_how_to_make(folder)}"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def _verify(folder, splits, meta):
    """BadInput if a split has an id outside the vocabulary or is not what its hash in meta.json was made of.

    Both read the whole file, a second or two a GB, so verified.json beside it notes what was found good: a later start
    reads a file again only if its size, its times or its hash in meta.json have changed.
    """
    note, hashes = folder / "verified.json", meta.get("sha256", {})
    try:
        known = json.loads(note.read_text())
    except (OSError, ValueError):
        known = None
    found = {}
    for split, ids in splits.items():
        path = folder / f"{split}.bin"
        about = path.stat()
        found[split] = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, hashes.get(split), meta["vocab_size"]]
        if isinstance(known, dict) and known.get(split) == found[split]:
            continue
        _check_ids(ids, meta["vocab_size"], path)
        if split in hashes and (got := sha256(path)) != hashes[split]:
            raise BadInput(f"{path} has other contents than meta.json describes (sha256 {got}); {_how_to_make(folder)}")
    if found != known:
        with contextlib.suppress(OSError):  # a folder that others own is read at every start
            write_json(note, found)


def _check_ids(ids, limit, path):
    """BadInput if any id is not below `limit`; reads a bounded piece at a time."""
    if limit > np.iinfo(ids.dtype).max:
        return
    for start in range(0, len(ids), SCAN):
        piece = ids[start : start + SCAN]
        if piece.max() >= limit:
            at = int((piece >= limit).argmax())
            raise BadInput(f"{path}: token {start + at:,} is {piece[at]}, outside the vocabulary of {limit:,}")
