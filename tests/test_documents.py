"""Text as people have it: every format from files, folders and pipes, damage with its place, characters dropped."""

import contextlib
import gzip
import importlib
import io
import itertools
import json
import lzma
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
from test_data import ett_lines

from data import corpus, documents, files
from data.corpus import encode_symbols, load_corpus, to_ascii
from training.errors import BadInput

ROOT = Path(__file__).parents[1]
DOCUMENTS = [f"document {i}\nhas {'many ' * i}lines,\n" + "  and spaces\n" * (i % 3) for i in range(40)]


def zst(content):
    return pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True)


def plain(texts):
    return "\n".join(texts).encode()


def jsonl(texts, key="text"):
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def parquet(texts, key="text"):
    arrow, out = pytest.importorskip("pyarrow.parquet"), io.BytesIO()
    table = sys.modules["pyarrow"].table({"id": range(len(texts)), key: texts})
    arrow.write_table(table, out, row_group_size=7, use_dictionary=False, write_page_checksum=True)
    return out.getvalue()


FORMATS = {
    "txt": plain,
    "txt.gz": lambda texts: gzip.compress(plain(texts)),
    "txt.xz": lambda texts: lzma.compress(plain(texts)),
    "txt.zst": lambda texts: zst(plain(texts)),
    "gz": lambda texts: gzip.compress(plain(texts)),
    "jsonl": jsonl,
    "jsonl.gz": lambda texts: gzip.compress(jsonl(texts)),
    "jsonl.zst": lambda texts: zst(jsonl(texts)),
    "zst": lambda texts: zst(jsonl(texts)),
    "parquet": parquet,
    "crlf.txt": lambda texts: plain(texts).replace(b"\n", b"\r\n"),
    "crlf.jsonl": lambda texts: jsonl([text.replace("\n", "\r\n") for text in texts]).replace(b"\n", b"\r\n"),
    "mark.txt": lambda texts: b"\xef\xbb\xbf" + plain(texts),
    "mark.jsonl": lambda texts: b"\xef\xbb\xbf" + jsonl(texts),
    "utf16.txt": lambda texts: plain(texts).decode().encode("utf-16"),
    "utf16be.txt.gz": lambda texts: gzip.compress(b"\xfe\xff" + plain(texts).decode().encode("utf-16-be")),
    "no_suffix": plain,
}


def as_file(folder, suffix):
    path = folder / f"text.{suffix}"
    path.write_bytes(FORMATS[suffix](DOCUMENTS))
    return path


def as_files_of_a_folder(folder, suffix):
    suffix = "txt" if suffix == "no_suffix" else suffix
    (folder / "in/deeper").mkdir(parents=True)
    (folder / f"in/a.{suffix}").write_bytes(FORMATS[suffix](DOCUMENTS[:15]))
    (folder / f"in/deeper/b.{suffix}").write_bytes(FORMATS[suffix](DOCUMENTS[15:]))
    (folder / "in/README.md").write_text("not a document")
    (folder / "in/.hidden.txt").write_text("not a document")
    return folder / "in"


def as_pipe(folder, suffix):
    path = folder / "pipe"
    os.mkfifo(path)
    content = FORMATS[suffix](DOCUMENTS)

    def write():
        with contextlib.suppress(BrokenPipeError):
            path.write_bytes(content)

    threading.Thread(target=write, daemon=True).start()
    return path


def read(*paths, scratch=".", key="text"):
    with documents.opened(paths, scratch) as sources:
        return list(documents.read_documents(sources, key))


@pytest.mark.parametrize("given", [as_file, as_files_of_a_folder, as_pipe])
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path, suffix, given):
    assert read(given(tmp_path, suffix), scratch=tmp_path / "out") == DOCUMENTS
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("suffix", ["txt", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("name", ["shakespeare_char", "openwebtext_small", "openwebtext"])
def test_every_script_reads_every_format(tmp_path, monkeypatch, name, suffix):
    script = importlib.import_module(f"data.{name}.prepare")
    flags = [] if name == "shakespeare_char" else ["--val_fraction=0.2"]
    if name == "openwebtext":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(script, "gpt2_encoding", Bytes)
        flags += ["--workers=1"]
    want = as_file(tmp_path, "txt")
    script.main(["--input", str(want), "--out", str(tmp_path / "want"), *flags])
    pipe = as_pipe(tmp_path, suffix)
    script.main(["--input", str(pipe), "--out", str(tmp_path / "out"), *flags])
    for split in ("train", "val"):
        assert (tmp_path / f"out/{split}.bin").read_bytes() == (tmp_path / f"want/{split}.bin").read_bytes()
    assert sorted(os.listdir(tmp_path / "out")) == ["meta.json", "train.bin", "val.bin"]
    source = json.loads((tmp_path / "out/meta.json").read_text())["source"]["files"]
    assert [file["file"] for file in source] == ["pipe"]


class Bytes:
    """The part of a tiktoken encoding that the recipe uses, with bytes for tokens."""

    eot_token = 50256

    def encode_ordinary(self, text):
        return text.encode()


def test_standard_input_is_read_once_and_given_again_is_complete(tmp_path):
    as_file(tmp_path, "jsonl.gz")
    command = [sys.executable, "data/openwebtext_small/prepare.py", "--val_fraction=0.2", "--out", str(tmp_path / "o")]

    def run(shell):
        script = shell.replace("PREPARE", shlex.join([*command, "--input"]))
        return subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)

    assert run(f"zcat {tmp_path}/text.jsonl.gz | PREPARE -").returncode == 0
    again = run(f"PREPARE <(zcat {tmp_path}/text.jsonl.gz)")
    assert "complete already" in again.stdout, again.stderr
    loaded = load_corpus(tmp_path / "o", block_size=8)
    assert sorted(loaded.decode([*loaded.train, *loaded.val])) == sorted("".join(DOCUMENTS))


def test_rows_and_several_files_keep_their_order_and_their_empty_lines(tmp_path):
    texts = ["a\n\nb", "", "c\r\n", "d\n\n"]
    (tmp_path / "z.jsonl").write_bytes(jsonl(texts) + b"\n \n")
    (tmp_path / "a.txt").write_bytes(b"\n\nfirst\n  \nstill\r\n\r\n\r\n\nsecond")
    assert read(tmp_path / "z.jsonl", tmp_path / "a.txt") == [
        "a\n\nb\n", "\n", "c\n", "d\n\n", "first\n  \nstill\n", "second\n"
    ]  # fmt: skip


@pytest.mark.parametrize(("suffix", "content"), [("jsonl", jsonl), ("parquet", parquet)])
def test_the_text_under_another_key(tmp_path, suffix, content):
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(content(DOCUMENTS, key="content"))
    assert read(path, key="content") == DOCUMENTS
    with pytest.raises(BadInput, match=r"text.*no 'text' among id, content; say with --text_key"):
        read(path)


@pytest.mark.parametrize("suffix", ["txt.gz", "txt.xz", "txt.zst", "jsonl.zst", "parquet"])
def test_one_document_is_in_memory_at_a_time(tmp_path, suffix):
    texts = [f"{i}" * 20_000 + "\n" for i in range(100, 600)]  # 30 MB
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(FORMATS[suffix](texts))
    with documents.opened([path], tmp_path) as sources:
        next(documents.read_documents(sources))  # imports
        tracemalloc.start()
        assert sum(map(len, documents.read_documents(sources))) == sum(map(len, texts))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 12e6  # the window of .xz is 8 MB


REFUSED = {  # name: (content, message)
    "absent.txt": (None, "cannot read .*absent.txt: No such file"),
    "empty.txt": (b"", "empty.txt is empty"),
    "empty.txt.gz": (gzip.compress(b""), "empty.txt.gz is empty"),
    "text.gz": (plain(DOCUMENTS), r"text.gz is plain by its first bytes \(64 6f 63 75\), gz by its name"),
    "text.zst": (gzip.compress(b"x"), r"text.zst is gz by its first bytes .*, zst by its name"),
    "text.txt": (gzip.compress(b"x"), r"text.txt is gz by its first bytes .*, plain by its name"),
    "json.txt": (jsonl(DOCUMENTS), "json.txt, line 1: a JSON object, where the name says plain text; call it .jsonl"),
    "text.jsonl": (plain(DOCUMENTS), "text.jsonl, line 1: broken JSON"),
    "list.json": (b'[\n{"text": "a"}\n]\n', "list.json, line 1: broken JSON"),
    "text.parquet": (plain(DOCUMENTS), "text.parquet is plain by its first bytes .*, parquet by its name"),
    "packed.parquet.gz": (gzip.compress(b"PAR1"), "packed.parquet.gz is gz by its first bytes .*, parquet by its name"),
    "broken.jsonl": (jsonl(DOCUMENTS[:3]) + b'{"text": \n', "broken.jsonl, line 4: broken JSON"),
    "array.jsonl": (jsonl(DOCUMENTS[:3]) + b"[1]\n", "array.jsonl, line 4: JSON, but no object"),
    "null.jsonl": (jsonl(DOCUMENTS[:3]) + b'{"text": null}\n', "null.jsonl, line 4: 'text' is null, not a string"),
    "half.jsonl": (b'{"text": "a\\ud800"}\n', "half.jsonl, line 1: 'text' has half of a surrogate pair"),
    "deep.jsonl": (jsonl(["a"]) + b"[" * 100_000, "deep.jsonl, line 2: JSON nested too deeply|broken JSON"),
    "latin.txt": (b"fine\nfine\nbad \xff\n", "latin.txt, line 3, byte 14 of the text: not UTF-8 text"),
    "latin.txt.gz": (gzip.compress(b"fine\nbad \xff\n"), "latin.txt.gz, line 2, byte 9 of the text: not UTF-8 text"),
    "odd16.txt": ("text\n".encode("utf-16") + b"a", "odd16.txt, line 1, .*: not UTF-16.* text"),
    "unmarked16.txt": ("text".encode("utf-16-le"), "unmarked16.txt, line 1: a zero byte, which a text has not"),
    "archive.tar.gz": (gzip.compress(b"a.txt" + bytes(507) + b"x"), "archive.tar.gz, line 1: a zero byte"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(tmp_path, name):
    content, message = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as refusal:
        read(tmp_path / name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("suffix", ["txt.gz", "txt.xz", "txt.zst", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("keep", [12, 0.5, -1, -9])
def test_a_file_cut_short_is_refused_with_its_place(tmp_path, suffix, keep):
    noise = [os.urandom(300).hex() + "\n" for _ in range(2000)]
    whole = FORMATS[suffix](noise)
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(whole[: int(len(whole) * keep) if keep == 0.5 else keep])
    place = "row 0" if suffix == "parquet" else r"line [\d,]+ of its text"
    with pytest.raises(BadInput, match=rf"text.{suffix}, after {place}: damaged or cut short \(") as refusal:
        read(path)
    assert "\n" not in str(refusal.value)
    if keep == 0.5 and suffix != "parquet":
        assert int(re.search(r"line ([\d,]+)", str(refusal.value))[1].replace(",", "")) > 500


def test_damage_inside_a_file_is_refused(tmp_path):
    for suffix in ("txt.gz", "txt.xz", "parquet"):
        whole = bytearray(FORMATS[suffix]([os.urandom(300).hex() + "\n" for _ in range(200)]))
        whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
        (tmp_path / f"text.{suffix}").write_bytes(whole)
        with pytest.raises(BadInput, match=f"text.{suffix}, after (line|row) "):
            read(tmp_path / f"text.{suffix}")


def test_a_parquet_column_that_is_no_text(tmp_path):
    path = tmp_path / "text.parquet"
    path.write_bytes(parquet(["a"] * 10))
    with pytest.raises(BadInput, match=r"text.parquet, row 1: 'id' is int, not a string"):
        read(path, key="id")
    path.write_bytes(parquet(["a"] * 10 + [None]))
    with pytest.raises(BadInput, match=r"text.parquet, row 11: 'text' is null, not a string"):
        read(path)


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/notes.md").write_text("text")
    with pytest.raises(BadInput, match=r"the folder .*in has no file that ends in .gz, .jsonl, .ndjson, .parquet, "):
        read(tmp_path / "in")


def test_without_pyarrow_the_package_is_named(tmp_path, monkeypatch):
    path = as_file(tmp_path, "txt.zst")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput, match=r"text.txt.zst: .zst and .parquet are read by pyarrow: pip install pyarrow"):
        read(path)


# Documents dropped


def small(*argv):
    importlib.import_module("data.openwebtext_small.prepare").main([str(arg) for arg in argv])


def refusal(capsys, script, *argv):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"data.{script}.prepare").main([str(arg) for arg in argv])
    return stop.value.code, capsys.readouterr().err


def test_dropped_documents_say_which_characters_and_what_keeps_them(tmp_path, capsys):
    texts = [*DOCUMENTS[:20], "“curly” and ”\n", "‘it’s”\n", "caf\u00e9\n", "tab\there\n", "日\n"]
    (tmp_path / "in.txt").write_text("\n".join(texts), encoding="utf-8")
    argv = ["--input", tmp_path / "in.txt", "--val_fraction=0.2", "--out", tmp_path / "out"]
    small(*argv)
    out = capsys.readouterr().out
    assert "5 of 25 documents dropped for characters outside the 96 symbols: U+201D ” in 2, U+0009 in 1, " in out
    assert "U+00E9 é in 1" in out
    assert "--ascii" in out
    small(*argv, "--ascii")
    out = capsys.readouterr().out
    assert "1 of 25 documents dropped for characters outside the 96 symbols: U+65E5 日 in 1;" in out
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["foreign"] == {"U+65E5": 1}
    assert meta["documents"]["dropped"] == 1


def test_where_every_document_is_dropped_the_error_says_why(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("“a”\n\n“b”\n", encoding="utf-8")
    status, err = refusal(capsys, "openwebtext_small", "--input", tmp_path / "in.txt", "--out", tmp_path / "out")
    assert status == 2
    assert "2 of 2 documents dropped for characters outside the 96 symbols: U+201C “ in 2, U+201D ” in 2" in err
    (tmp_path / "in.txt").write_text("a\nb\n")
    _, err = refusal(capsys, "openwebtext_small", "--input", tmp_path / "in.txt", "--out", tmp_path / "out")
    assert "an empty line separates two documents" in err


def test_dropped_characters_are_counted_across_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CHECKPOINT_BYTES", 100)
    texts = [text + "é" * (i % 2) + "\n" for i, text in enumerate(DOCUMENTS)]
    (tmp_path / "in.txt").write_text("\n".join(texts), encoding="utf-8")
    argv = ["--input", tmp_path / "in.txt", "--val_fraction=0.2", "--out"]
    small(*argv, tmp_path / "want")
    add, calls = corpus.CorpusWriter.add, itertools.count()

    def dying(*args):
        add(*args)
        if next(calls) == 15:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus.CorpusWriter, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            small(*argv, tmp_path / "out")
    assert json.loads((tmp_path / "out/progress.partial").read_text())["foreign"]["é"] > 5
    small(*argv, tmp_path / "out")
    assert (tmp_path / "out/meta.json").read_bytes() == (tmp_path / "want/meta.json").read_bytes()


def test_to_ascii_changes_what_has_a_form_in_ascii():
    assert to_ascii("“It’s” naïve – or — so… \tx\u00a0y, ½\n") == "\"It's\" naive - or -- so...      x y, 1⁄2\n"
    assert to_ascii(corpus.ALPHABET) == corpus.ALPHABET
    assert encode_symbols(to_ascii("日本")) is None


# Outputs that cannot be written

SCRIPTS = ["shakespeare_char", "openwebtext_small", "openwebtext", "pydocs", "ett"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_output_that_is_a_file_is_refused_before_the_work(tmp_path, capsys, monkeypatch, name):
    script = importlib.import_module(f"data.{name}.prepare")
    for late in ("download", "CorpusWriter"):
        if hasattr(script, late):
            monkeypatch.delattr(script, late)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/deeper/out"):
        status, err = refusal(capsys, name, "--out", out)
        assert (status, err) == (2, f"error: --out {out} cannot be written: Not a directory; choose another folder\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_on_a_full_disk_or_read_only_is_refused_before_the_work(tmp_path, monkeypatch):
    def refuses(**where):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuses)
    with pytest.raises(BadInput, match=f"--out {tmp_path}/new cannot be written: Read-only file system"):
        files.output_folder(tmp_path / "new")
    assert not any(tmp_path.iterdir())


def test_the_home_folder_may_be_meant():
    assert files.output_folder("~/new") == Path.home() / "new"


def small_files_only():
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


@pytest.mark.parametrize("name", ["shakespeare_char", "pydocs", "ett", "csv"])
def test_a_disk_that_fills_up_ends_in_one_line_and_leaves_nothing(tmp_path, name):
    flags = {"shakespeare_char": ["--input", "big.txt"], "pydocs": [], "ett": ["--input", "ETTh1.csv", "--changed"]}
    flags["csv"] = ["--input", "ETTh1.csv"]
    (tmp_path / "big.txt").write_text("words " * 20_000)
    (tmp_path / "ETTh1.csv").write_text("\n".join(ett_lines(17420)))
    command = [sys.executable, "-B", ROOT / f"data/{name}/prepare.py", *flags[name], "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=small_files_only)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"error: .*out.* cannot be written: File too large\n", done.stderr)
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_a_full_disk_keeps_what_a_later_run_goes_on_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "CHECKPOINT_BYTES", 100)
    as_file(tmp_path, "txt")
    argv = ["--input", tmp_path / "text.txt", "--val_fraction=0.2", "--out"]
    small(*argv, tmp_path / "want")
    fsync, calls = os.fsync, itertools.count()

    def full(descriptor):
        if next(calls) > 12:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, err = refusal(capsys, "openwebtext_small", *argv, tmp_path / "out")
    assert status == 1
    assert "cannot be written: No space left on device" in err
    small(*argv, tmp_path / "out")
    assert "going on after" in capsys.readouterr().out
    for split in ("train", "val"):
        assert (tmp_path / f"out/{split}.bin").read_bytes() == (tmp_path / f"want/{split}.bin").read_bytes()


def test_a_disk_too_small_for_a_pipe_is_named(tmp_path, monkeypatch):
    def full(source, target, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    pipe = as_pipe(tmp_path, "txt")
    with pytest.raises(OSError, match="out cannot be written: No space left on device"):
        read(pipe, scratch=tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
