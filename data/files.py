"""What the prepare scripts share about files: reading what the user names, downloading, writing whole or not at all."""

import hashlib
import http.client
import json
import lzma
import urllib.request
from pathlib import Path

from training.errors import BadInput
from training.files import replacing


def read_bytes(path):
    """The bytes of a file the user named; BadInput if it cannot be read or is empty."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    if not content:
        raise BadInput(f"{path} is empty")
    return content


def decode_utf8(content, name):
    """Text of UTF-8 bytes, with "\\r\\n" as "\\n"; BadInput names the line that is something else."""
    try:
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{name}, line {line}: not UTF-8 text ({error.reason})") from error


def read_documents(paths):
    """Documents of text files (plain or .xz) in order, one at a time. An empty line separates two documents.

    Each document ends with a newline. Only one document is in memory. BadInput for a file that cannot be read, has no
    document, is a damaged .xz, or is not UTF-8.
    """
    for path in map(Path, paths):
        lines, number = [], 0
        try:
            with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line in (b"\n", b"\r\n"):
                        if lines:
                            yield _document(lines, path, number)
                            lines = []
                    else:
                        lines.append(line)
        except (lzma.LZMAError, EOFError) as error:
            raise BadInput(f"{path} is not a whole .xz file: {error}") from error
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror}") from error
        if lines:
            yield _document(lines, path, number + 1)
        elif number == 0:
            raise BadInput(f"{path} is empty")


def _document(lines, path, end):
    text = decode_utf8(b"".join(lines), f"{path}, in the document of lines {end - len(lines)} to {end - 1}")
    return text if text.endswith("\n") else text + "\n"


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path):
    """What meta.json says of a local source: enough to tell two inputs apart, nothing about the machine."""
    path = Path(path)
    try:
        return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error


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


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {path}: {error.strerror}") from error


def write_whole(path, content):
    """Bytes into a file; an interruption leaves the old file or the new one, never half of one."""
    with replacing(path) as file:
        file.write(content)


def write_json(path, record):
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())
