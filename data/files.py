"""What the prepare scripts share about files: reading what the user names, downloading, writing whole or not at all."""

import codecs
import contextlib
import hashlib
import http.client
import json
import urllib.request
from pathlib import Path

from training.errors import BadInput, WriteError
from training.files import check_folder, replacing


def read_bytes(path):
    """The bytes of a file the user named; BadInput if it cannot be read or is empty."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    if not content:
        raise BadInput(f"{path} is empty")
    return content


def decode(content, name):
    """Text of bytes in UTF-8, or in UTF-16 with its byte-order mark; no mark, and "\\r\\n" as "\\n".

    BadInput names the line that is something else.
    """
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        return content.decode(encoding).removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{name}, line {line}: not {encoding.upper()} text ({error.reason})") from error


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url):
    """The bytes at a public address; BadInput says what was tried and how to go on without the network."""
    print(f"downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise BadInput(
            f"downloading {url} failed ({error}); fetch that file by other means and name it with --input"
        ) from error
    if not content:
        raise BadInput(f"{url} gave an empty file; fetch it by other means and name it with --input")
    return content


def at_home(folder, home):
    """Whether a prepared folder is the one of its name in `home`, where prepare.py puts it if not told otherwise."""
    return Path(folder).resolve() == (Path(home) / Path(folder).name).resolve()


def output_folder(path):
    """The folder of `--out`, which need not exist yet; BadInput, before the work, where no file can be put into it."""
    folder = Path(path).expanduser()
    check_folder(folder, "--out")
    return folder


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {path}: {error.strerror}") from error


@contextlib.contextmanager
def writing(path):
    """What the system refuses inside is a WriteError of one line."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror or error}") from error


def json_bytes(record):
    return (json.dumps(record, indent=1) + "\n").encode()


def write_json(path, record):
    """A whole file or none: an interruption leaves the old one or the new one, never half of one."""
    with replacing(path) as file:
        file.write(json_bytes(record))
