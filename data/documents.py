"""Documents of text as people have it: plain, compressed, JSON lines or parquet; files, folders of them and pipes."""

import contextlib
import io
import itertools
import json
import lzma
import os
import shutil
import tempfile
import zlib
from gzip import GzipFile
from pathlib import Path
from typing import NamedTuple

from data.files import make_folder, sha256, writing
from training.errors import BadInput

MAGIC = {"gz": b"\x1f\x8b\x08", "xz": b"\xfd7zXZ\x00", "zst": b"\x28\xb5\x2f\xfd", "parquet": b"PAR1\x15"}
COMPRESSIONS = ("gz", "xz", "zst")
FORMATS = {"txt": "text", "jsonl": "JSON lines", "ndjson": "JSON lines", "json": "JSON lines", "parquet": "parquet"}
IN_FOLDERS = sorted(f".{suffix}" for suffix in {*COMPRESSIONS, *FORMATS} - {"json"})  # .json there is often about text
ROWS = 64  # of a parquet file at a time
LINES = 1024  # of a text whose documents are not told apart


class Input(NamedTuple):
    name: str  # as the user gave it
    path: str  # where it can be read as often as needed
    packed: str  # one of COMPRESSIONS, or "plain"
    form: str  # "text", "JSON lines" or "parquet"


def add_arguments(parser):
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="text of yours: .txt with empty lines between documents, .jsonl, .parquet, also .gz, .xz or .zst; "
        "files, folders, pipes, - for standard input",
    )
    parser.add_argument("--text_key", default="text", help="the key of .jsonl, or column of .parquet, that is the text")


@contextlib.contextmanager
def opened(paths, scratch, folders=True):
    """The Inputs that the user named: files, pipes and, if they are asked for, all text files of a folder by name.

    A pipe can be read only once: it is copied into the folder `scratch` until the block ends. BadInput for what cannot
    be read, is empty, or is by its content something else than its name says.
    """
    if not folders and (inside := [path for path in paths if os.path.isdir(path)]):
        raise BadInput(f"{inside[0]} is a folder; name one file")
    with contextlib.ExitStack() as stack:
        yield [source for path in paths for source in _find(str(path), scratch, stack)]


def _find(path, scratch, stack):
    if path == "-":
        return [_identify("standard input", _copy(_open("standard input", 0, closefd=False), scratch, stack))]
    if os.path.isdir(path):
        return [_identify(str(file), str(file)) for file in _in_folder(Path(path))]
    if os.path.isfile(path) or not os.path.exists(path):
        return [_identify(path, path)]
    return [_identify(path, _copy(_open(path, path), scratch, stack))]


def _open(name, path, **how):
    try:
        return open(path, "rb", **how)
    except OSError as error:
        raise BadInput(f"cannot read {name}: {error.strerror}") from error


def _in_folder(folder):
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IN_FOLDERS]
    paths = [folder / name for name in sorted(names) if not any(part.startswith(".") for part in name.parts)]
    if not any(path.is_file() for path in paths):
        raise BadInput(f"the folder {folder} has no file that ends in {', '.join(IN_FOLDERS)}")
    return filter(Path.is_file, paths)


def _copy(pipe, scratch, stack):
    make_folder(scratch)
    with pipe, writing(scratch):
        copy = tempfile.NamedTemporaryFile(dir=scratch, prefix="input-", suffix=".partial")  # noqa: SIM115, see stack
        stack.enter_context(copy)
        shutil.copyfileobj(pipe, copy, 1 << 20)
        copy.flush()
    return copy.name


def _identify(name, path):
    """The Input of a file by its first bytes and its first line; BadInput where its name contradicts them."""
    with _open(name, path) as file:
        head = file.read(8)
    if not head:
        raise BadInput(f"{name} is empty")
    found = next((kind for kind, magic in MAGIC.items() if head.startswith(magic)), "plain")
    suffixes = [suffix[1:] for suffix in Path(name.lower()).suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else None
    form = FORMATS.get(suffixes[-1]) if suffixes else None
    named = "parquet" if form == "parquet" else packed or (form and "plain")
    if named and named != found:
        raise BadInput(f"{name} is {found} by its first bytes ({head[:4].hex(' ')}), {named} by its name; rename it")
    if found == "parquet":
        return Input(name, path, "plain", "parquet")
    first = next(_lines(Input(name, path, found, form)), None)
    if first is None:
        raise BadInput(f"{name} is empty")
    if form == "text" and _is_object(first):
        raise BadInput(f"{name}, line 1: a JSON object, where the name says plain text; call it .jsonl")
    return Input(name, path, found, form or ("JSON lines" if _is_object(first) else "text"))


def _is_object(line):
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def describe(sources, key="text"):
    """What meta.json says of Inputs: enough to tell two lists apart, nothing about the machine."""
    return [
        {
            "file": Path(source.name).name if source.name == source.path else "pipe",
            "bytes": os.path.getsize(source.path),
            "sha256": sha256(source.path),
        }
        | ({"text_key": key} if source.form != "text" else {})
        for source in sources
    ]


def read_documents(sources, key="text"):
    """Documents of Inputs in order, one at a time in memory; each ends with a newline.

    An empty line separates two documents of text. A line of JSON lines or a row of a parquet file is a document: the
    string under `key`. BadInput names the file and the place of what is damaged, not UTF-8 or has no such string.
    """
    for source in sources:
        yield from _paragraphs(_lines(source)) if source.form == "text" else _rows(source, key)


def read_text(sources, key="text"):
    """The text of Inputs as pieces of some lines: of text all there is, of rows each, an empty line between two."""
    for source in sources:
        if source.form == "text":
            lines = _lines(source)
            while piece := "".join(itertools.islice(lines, LINES)):
                yield piece
        else:
            for number, document in enumerate(_rows(source, key)):
                yield "\n" + document if number else document


def _paragraphs(lines):
    document = []
    for line in itertools.chain(lines, "\n"):
        if line != "\n":
            document.append(line)
        elif document:
            yield _ended("".join(document))
            document = []


def _ended(text):
    return text if text.endswith("\n") else text + "\n"


def _rows(source, key):
    for where, row in _parquet(source, key) if source.form == "parquet" else _json_lines(source):
        if key not in row:
            names = ", ".join(row) or "no keys"
            raise BadInput(f"{where}: no '{key}' among {names}; say with --text_key which one is the text")
        text = row[key]
        if not isinstance(text, str):
            raise BadInput(f"{where}: '{key}' is {'null' if text is None else type(text).__name__}, not a string")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise BadInput(f"{where}: '{key}' has half of a surrogate pair, which no character is")
        yield _ended(text.replace("\r\n", "\n"))


def _json_lines(source):
    """(where, object) of each line that is not empty."""
    for number, line in enumerate(_lines(source), 1):
        if line.isspace():
            continue
        where = f"{source.name}, line {number}"
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise BadInput(f"{where}: JSON nested too deeply") from error
        except ValueError as error:
            raise BadInput(f"{where}: broken JSON, where one object is due ({error})") from error
        if not isinstance(row, dict):
            raise BadInput(f"{where}: JSON, but no object such as {{\"text\": \"..\"}}")
        yield where, row


def _parquet(source, key):
    """(where, {key: value}) of each row, or the names of all columns with the first row if key is not one of them."""
    arrow, number = _pyarrow(source.name), 0
    try:
        with arrow.parquet.ParquetFile(source.path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if key not in names:
                yield source.name, dict.fromkeys(names)
            for batch in file.iter_batches(ROWS, columns=[key]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{source.name}, row {number}", {key: value}
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{source.name}, after row {number:,}: damaged or cut short ({_one_line(error)})") from error


def _pyarrow(name):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise BadInput(f"{name}: .zst and .parquet are read by pyarrow: pip install pyarrow") from error
    return pyarrow


def _lines(source):
    """The lines of a text as strings, "\\r\\n" as "\\n", without a byte-order mark."""
    number, start = 0, 0
    try:
        with _open(source.name, source.path) as file:
            for number, line in enumerate(_utf8_lines(_unpacked(file, source)), 1):
                text = line.decode()
                if b"\0" in line:
                    raise BadInput(f"{source.name}, line {number}: a zero byte, which a text has not")
                start += len(line)
                if number == 1:
                    text = text.removeprefix("\ufeff")
                yield text[:-2] + "\n" if text.endswith("\r\n") else text
    except UnicodeDecodeError as error:
        at = f"{source.name}, line {number}, byte {start + error.start:,} of the text"
        raise BadInput(f"{at}: not {error.encoding.upper()} text ({error.reason})") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if getattr(error, "errno", None):
            raise BadInput(f"cannot read {source.name}: {error.strerror}") from error
        problem = f"damaged or cut short ({_one_line(error)})"
        raise BadInput(f"{source.name}, after line {number:,} of its text: {problem}") from error


def _unpacked(file, source):
    if source.packed == "gz":
        return io.BufferedReader(GzipFile(fileobj=file))
    if source.packed == "xz":
        return io.BufferedReader(lzma.LZMAFile(file))
    if source.packed == "zst":
        return io.BufferedReader(_pyarrow(source.name).CompressedInputStream(file, "zstd"))
    return file


def _utf8_lines(stream):
    """The lines in UTF-8 of a text in UTF-8, or in UTF-16 if its byte-order mark says so."""
    if stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return (line.encode() for line in io.TextIOWrapper(stream, "utf-16", newline="\n"))
    return stream


def _one_line(error):
    return str(error).partition("\n")[0].rstrip(".")
