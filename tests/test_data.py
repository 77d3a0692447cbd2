"""Data preparation: round trips, counts and splits, kills and restarts, and what every script says of bad input."""

import hashlib
import importlib
import itertools
import json
import lzma
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import corpus, hub
from data import series as data_series
from data.corpus import ALPHABET, CHARACTERS, CorpusWriter, codec, encode_symbols, load_corpus
from data.ett import COLUMNS
from data.series import DTYPE, load_series
from training.errors import BadInput

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"needs {name} in {SHARED}")
    return str(SHARED / name)


def script(name):
    return importlib.import_module(f"data.{name}.prepare")


def fails(name, *argv, capsys):
    """The message of a script that must end with status 2."""
    with pytest.raises(SystemExit) as stop:
        script(name).main([str(arg) for arg in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


def contents(folder):
    """Every file but what a killed owner of the folder left, which means nothing."""
    paths = [path for path in sorted(Path(folder).iterdir()) if path.name != "owner.json"]
    return {path.name: path.read_bytes() for path in paths}


def some_text(documents=60, seed=0):
    """Documents of a few lines over all 96 symbols, as (list of documents, the text file that holds them)."""
    draw = random.Random(seed)

    def line():
        return "".join(draw.choices(ALPHABET[1:], k=draw.randint(1, 120))) + "\n"

    each = ["".join(line() for _ in range(draw.randint(1, 30))) for _ in range(documents)]
    return each, "\n".join(each)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(some_text()[1])
    return path


# The alphabet and the writer


def test_the_alphabet_is_newline_and_printable_ascii():
    assert len(ALPHABET) == 96
    assert ALPHABET[0] == "\n"
    assert encode_symbols(ALPHABET).tolist() == list(range(96))
    encode, decode = codec({**CHARACTERS, "tokens": {"train": 1, "val": 1}})
    assert decode(np.array(encode(ALPHABET * 2))) == ALPHABET * 2


@pytest.mark.parametrize("foreign", ["\t", "\r", "\x7f", "\x00", "é", "’", "\ud800", "日本"])
def test_other_characters_are_refused(foreign):
    assert encode_symbols("plain" + foreign) is None
    encode, _ = codec({**CHARACTERS, "tokens": {"train": 1, "val": 1}})
    with pytest.raises(BadInput, match="not one of the 96"):
        encode("plain" + foreign)


def test_the_val_draw_depends_on_seed_and_key_alone():
    drawn = [corpus.drawn_for_val(2357, i, 0.1) for i in range(20_000)]
    assert drawn == [corpus.drawn_for_val(2357, i, 0.1) for i in range(20_000)]
    assert drawn != [corpus.drawn_for_val(2358, i, 0.1) for i in range(20_000)]
    assert abs(sum(drawn) - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5


# Shakespeare


def test_shakespeare_has_nanogpts_counts(tmp_path):
    path = shared("shakespeare.txt")
    script("shakespeare_char").main(["--input", path, "--out", str(tmp_path)])
    loaded = load_corpus(tmp_path, block_size=256)
    text = Path(path).read_text()
    assert (len(loaded.train), len(loaded.val), loaded.vocab_size) == (1_003_854, 111_540, 65)
    assert loaded.meta["alphabet"] == "".join(sorted(set(text)))
    assert loaded.decode(loaded.train) + loaded.decode(loaded.val) == text
    assert loaded.encode("First") == loaded.train[:5].tolist()
    for split in ("train", "val"):
        assert hashlib.sha256((tmp_path / f"{split}.bin").read_bytes()).hexdigest() == loaded.meta["sha256"][split]
    assert sorted(contents(tmp_path)) == ["meta.json", "train.bin", "val.bin", "verified.json"]


def test_shakespeare_in_gpt2_tokens_is_the_same_text(tmp_path, monkeypatch, text_file):
    monkeypatch.setattr(script("shakespeare"), "gpt2_encoding", byte_encoding)
    for name in ("shakespeare", "shakespeare_char"):
        script(name).main(["--input", str(text_file), "--out", str(tmp_path / name)])
    bpe, characters = (load_corpus(tmp_path / name, block_size=8) for name in ("shakespeare", "shakespeare_char"))
    assert (bpe.vocab_size, bpe.meta["name"], bpe.train.dtype) == (50257, "shakespeare", np.uint16)
    for split in ("train", "val"):
        text = bytes(getattr(bpe, split).tolist()).decode()
        assert text == characters.decode(getattr(characters, split))


def test_shakespeare_takes_any_characters(tmp_path):
    (tmp_path / "in.txt").write_text("Füße und Bäume, 日本\n" * 10)
    script("shakespeare_char").main(["--input", str(tmp_path / "in.txt"), "--out", str(tmp_path / "out")])
    loaded = load_corpus(tmp_path / "out", block_size=8)
    assert loaded.decode(loaded.train[:4]) == "Füße"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*in.txt: No such file"),
        (b"", "is empty"),
        (b"fine\nfine\nbad \xff\xfe", "line 3, byte 14 of the text: not UTF-8"),
        ("".join(map(chr, range(100, 400))).encode(), "300 different characters"),
        (b"x", "train split would be empty"),
    ],
)
def test_shakespeare_refuses(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "in.txt").write_bytes(content)
    out = tmp_path / "out"
    err = fails("shakespeare_char", "--input", tmp_path / "in.txt", "--out", out, capsys=capsys)
    assert re.search(message, err)
    assert not out.exists() or not contents(out)


@pytest.mark.parametrize("name", ["shakespeare_char", "ett"])
def test_a_failed_download_says_how_to_go_on(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(script(name), "URL", "http://localhost:9/{}nothing")
    err = fails(name, "--out", tmp_path / "out", capsys=capsys)
    assert "http://localhost:9/" in err
    assert "--input" in err
    assert not (tmp_path / "out").exists()


def test_a_failed_run_leaves_the_old_corpus(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("good text " * 10)
    argv = ["--input", str(tmp_path / "in.txt"), "--out", str(tmp_path / "out")]
    script("shakespeare_char").main(argv)
    before = contents(tmp_path / "out")
    (tmp_path / "in.txt").write_text("x")
    fails("shakespeare_char", *argv, capsys=capsys)
    assert contents(tmp_path / "out") == before


# OpenWebText in 96 symbols, from local text


def prepare_small(text, out, *flags):
    script("openwebtext_small").main(["--input", str(text), "--out", str(out), "--val_fraction", "0.2", *flags])


def test_small_drops_documents_with_other_characters_and_splits_whole_ones(tmp_path):
    documents, _ = some_text()
    for i in (3, 4, 40):
        documents[i] = documents[i][:-1] + "é\n"
    (tmp_path / "text.txt").write_text("\n".join(documents), encoding="utf-8")
    prepare_small(tmp_path / "text.txt", tmp_path / "out")

    want = {"train": "", "val": ""}
    for i, text in enumerate(documents):
        if "é" not in text:
            want["val" if corpus.drawn_for_val(2357, i, 0.2) else "train"] += text
    loaded = load_corpus(tmp_path / "out", block_size=64)
    assert loaded.decode(loaded.train) == want["train"]
    assert loaded.decode(loaded.val) == want["val"]
    assert loaded.meta["documents"]["dropped"] == 3
    assert sum(loaded.meta["documents"].values()) == 60


def test_small_with_a_val_file_of_its_own(tmp_path, text_file):
    documents, text = some_text(10, seed=1)
    (tmp_path / "val.txt.xz").write_bytes(lzma.compress(text.encode()))
    prepare_small(text_file, tmp_path / "out", "--val", str(tmp_path / "val.txt.xz"))
    loaded = load_corpus(tmp_path / "out", block_size=64)
    assert loaded.decode(loaded.train) == "".join(some_text()[0])
    assert loaded.decode(loaded.val) == "".join(documents)


def test_small_counts_on_real_text(tmp_path):
    prepare_small(shared("corpus_train_00.txt.xz"), tmp_path, "--val", shared("corpus_val.txt.xz"))
    loaded = load_corpus(tmp_path, block_size=1024)
    assert loaded.meta["tokens"] == {"train": 32_017_326, "val": 1_042_145}
    assert loaded.meta["documents"] == {"train": 2519, "val": 85, "dropped": 0}
    with lzma.open(shared("corpus_val.txt.xz"), "rt") as file:
        text = file.read()
    assert loaded.decode(loaded.val) == text.replace("\n\n", "\n")


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "cannot read .*text.txt: No such file"),
        (b"", [], "is empty"),
        (b"\n\n\n", [], "train split would be empty .documents: train 0, val 0, dropped 0"),
        (b"one\n\ntwo\n\nthree\n", ["--val_fraction", "0.000001"], "val split would be empty .documents: train 3"),
        ("é\n\nü\n".encode(), [], "dropped 2"),
        (b"good\n\nalso\nbad \xff", [], "line 4, byte 15 of the text: not UTF-8"),
        (b"good\n", ["--val_fraction", "1.5"], "between 0 and 1"),
        (b"good\n", ["--val", "absent.txt"], "cannot read absent.txt"),
    ],
)
def test_small_refuses(tmp_path, capsys, content, flags, message):
    path, out = tmp_path / "text.txt", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    err = fails("openwebtext_small", "--input", path, "--out", out, *flags, capsys=capsys)
    assert re.search(message, err)
    assert not out.exists() or not contents(out)


def test_small_val_needs_input(capsys):
    assert "--val goes with --input" in fails("openwebtext_small", "--val", "some.txt", capsys=capsys)


# Kills and restarts


def run_and_die(steps, text, out):
    """In a child process: kill -9 before the given number of calls that make something durable."""
    left = [steps]

    def dying(call):
        def counted(*args):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*args)

        return counted

    os.fsync, os.replace = dying(os.fsync), dying(os.replace)
    prepare_small(text, out)


def killed(target, *args):
    """Whether the child was killed; anything but a kill or a success fails the test."""
    child = multiprocessing.get_context("fork").Process(target=target, args=args)
    child.start()
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.fixture
def often(monkeypatch):
    """Checkpoints often enough for a small text."""
    monkeypatch.setattr(corpus, "CHECKPOINT_BYTES", 8_000)


@pytest.mark.usefixtures("often")
def test_a_kill_before_any_durable_step_changes_nothing(tmp_path, text_file, capsys):
    prepare_small(text_file, tmp_path / "want")
    want, steps = contents(tmp_path / "want"), 0
    while killed(run_and_die, steps, text_file, tmp_path / f"out{steps}"):
        out = tmp_path / f"out{steps}"
        if (out / "meta.json").exists():
            assert contents(out) == want
        capsys.readouterr()
        prepare_small(text_file, out)
        assert contents(out) == want, f"killed before step {steps}"
        if steps >= 4:  # a checkpoint takes 4 steps
            assert re.search("going on after|complete already", capsys.readouterr().out), f"killed before step {steps}"
        steps += 1
    assert steps > 20


@pytest.mark.usefixtures("often")
def test_repeated_kills_go_on_and_do_not_start_over(tmp_path, text_file):
    prepare_small(text_file, tmp_path / "want")
    out, noted = tmp_path / "out", [0]
    while killed(run_and_die, 6, text_file, out):  # a checkpoint takes 4 steps
        if (out / "progress.partial").exists():
            noted.append(sum(json.loads((out / "progress.partial").read_text())["tokens"].values()))
    assert len(noted) > 3
    assert noted == sorted(set(noted))
    assert contents(out) == contents(tmp_path / "want")


@pytest.mark.usefixtures("often")
def test_what_was_written_after_the_note_is_written_again(tmp_path, text_file):
    def die_after_flushing(text, out):
        add, calls = CorpusWriter.add, [0]

        def dying(writer, split, ids, documents=1):
            add(writer, split, ids, documents)
            calls[0] += 1
            if calls[0] == 45:
                for file in writer.files.values():
                    file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        CorpusWriter.add = dying
        prepare_small(text, out)

    out = tmp_path / "out"
    assert killed(die_after_flushing, text_file, out)
    note = json.loads((out / "progress.partial").read_text())
    sizes = {split: (out / f"{split}.bin.partial").stat().st_size for split in ("train", "val")}
    assert sum(sizes.values()) > sum(note["tokens"].values()) > 0
    prepare_small(text_file, out)
    prepare_small(text_file, tmp_path / "want")
    assert contents(out) == contents(tmp_path / "want")


@pytest.mark.usefixtures("often")
def test_another_source_does_not_go_on_from_the_note(tmp_path, text_file):
    def write_more_and_die(text, out):
        corpus.CHECKPOINT_BYTES = 40_000
        run_and_die(2, text, out)  # after the ids, before its first note

    other = tmp_path / "other.txt"
    other.write_text(some_text(seed=5)[1])
    out = tmp_path / "out"
    assert killed(run_and_die, 10, text_file, out)
    assert killed(write_more_and_die, other, out)  # the files have the length the first run's note asks for, or more
    prepare_small(text_file, out)
    prepare_small(text_file, tmp_path / "want")
    assert contents(out) == contents(tmp_path / "want")


def test_a_finished_corpus_is_left_alone_and_a_damaged_one_made_again(tmp_path, text_file, capsys):
    out = tmp_path / "out"
    prepare_small(text_file, out)
    want = contents(out)
    capsys.readouterr()
    prepare_small(text_file, out)
    assert "complete already" in capsys.readouterr().out
    (out / "val.bin").write_bytes(b"")
    prepare_small(text_file, out)
    assert contents(out) == want


def test_kill_9_of_the_real_command(tmp_path):
    """The script as users start it, killed from outside as soon as it has noted some progress."""
    shard, out = shared("corpus_train_00.txt.xz"), tmp_path / "out"
    command = [sys.executable, "data/openwebtext_small/prepare.py", "--val_fraction", "0.01", "--input", shard, "--out"]

    def documents_noted():
        try:
            return sum(json.loads((out / "progress.partial").read_text())["documents"].values())
        except FileNotFoundError:
            return 0

    process = subprocess.Popen([*command, str(out)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not documents_noted() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (out / "meta.json").exists()
    assert documents_noted() > 0
    done = subprocess.run([*command, str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "going on after" in done.stdout
    script("openwebtext_small").main(["--val_fraction", "0.01", "--input", shard, "--out", str(tmp_path / "want")])
    assert contents(out) == contents(tmp_path / "want")


# The hub's stream, from local files that `datasets` reads in the same way


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """Opens a streamed dataset of three files with the column "text"."""
    datasets = pytest.importorskip("datasets")
    documents = [text.rstrip("\n") for text in some_text(90)[0]]
    for part in range(3):
        rows = [json.dumps({"text": text}) for text in documents[part * 30 : part * 30 + 30]]
        (tmp_path / f"part{part}.jsonl").write_text("\n".join(rows) + "\n")
    paths = [str(tmp_path / f"part{part}.jsonl") for part in range(3)]

    def open_stream(streaming):
        return datasets.load_dataset(
            "json", data_files=paths, split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
        )

    monkeypatch.setattr(hub, "open_openwebtext", open_stream)
    monkeypatch.setattr(hub, "DOCUMENTS", 90)
    return open_stream


@pytest.mark.usefixtures("often")
def test_a_broken_stream_goes_on_where_it_was(tmp_path, monkeypatch, capsys, stream):
    small = script("openwebtext_small")

    class Breaking:
        """A stream whose line dies after 46 documents."""

        def __init__(self, streaming):
            self.dataset = stream(streaming)
            self.state_dict = self.dataset.state_dict

        def __iter__(self):
            yield from itertools.islice(self.dataset, 46)
            raise ConnectionError("the line is dead")

    def run(out):
        small.main(["--out", str(out), "--val_fraction", "0.2"])

    run(tmp_path / "want")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "open_openwebtext", Breaking)
        with pytest.raises(SystemExit, match=r"broke off after 46 documents \(the line is dead"):
            run(tmp_path / "out")
    assert 0 < sum(json.loads((tmp_path / "out/progress.partial").read_text())["documents"].values()) <= 46
    run(tmp_path / "out")
    assert "going on after" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    loaded = load_corpus(tmp_path / "out", block_size=8)
    assert sum(loaded.meta["documents"].values()) == 90


@pytest.mark.usefixtures("stream")
def test_part_of_openwebtext_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "DOCUMENTS", 91)
    for name in ("openwebtext_small", "openwebtext"):
        if name == "openwebtext":
            monkeypatch.setattr(script(name), "gpt2_encoding", lambda: None)
        assert "only 90 of" in fails(name, "--out", tmp_path / name, capsys=capsys)
        assert not (tmp_path / name / "meta.json").exists()


def test_a_hub_out_of_reach_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    err = fails("openwebtext_small", "--out", tmp_path / "out", capsys=capsys)
    assert "Skylion007/openwebtext" in err
    assert "--input" in err
    assert not (tmp_path / "out").exists()


# OpenWebText in GPT-2 tokens


def prepare_gpt2(monkeypatch, tmp_path, encoding, *argv):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(script("openwebtext"), "gpt2_encoding", lambda: encoding)
    script("openwebtext").main([*map(str, argv), "--workers", "1", "--out", str(tmp_path / "out")])
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    return {split: np.fromfile(tmp_path / "out" / f"{split}.bin", "<u2") for split in ("train", "val")}, meta


def byte_encoding():
    """A tiktoken encoding whose tokens are bytes, and 50256 for the end of text: the recipe without the vocabulary."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r".|\n", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


def split_at_end_of_text(ids):
    *pieces, rest = np.split(ids, np.flatnonzero(ids == 50256) + 1)
    assert rest.size == 0
    return [bytes(piece[:-1].tolist()).decode() for piece in pieces]


def test_gpt2_recipe_keeps_every_document_once_and_ends_it(tmp_path, monkeypatch, text_file):
    ids, meta = prepare_gpt2(monkeypatch, tmp_path, byte_encoding(), "--input", text_file, "--val_fraction", "0.1")
    parts = {split: split_at_end_of_text(ids[split]) for split in ids}
    documents = some_text()[0]
    order = np.random.default_rng(2357).permutation(60)  # what train_test_split does with nanoGPT's seed
    assert parts["val"] == [documents[i] for i in order[:6]]
    assert parts["train"] == [documents[i] for i in order[6:]]
    assert meta["documents"] == {"train": 54, "val": 6, "dropped": 0}
    assert meta["tokens"] == {split: len(ids[split]) for split in ids}


def test_gpt2_text_changed_under_the_same_name_is_read_again(tmp_path, monkeypatch, text_file):
    before, _ = prepare_gpt2(monkeypatch, tmp_path, byte_encoding(), "--input", text_file, "--val_fraction", "0.1")
    text_file.write_text(some_text(seed=3)[1])
    after, _ = prepare_gpt2(monkeypatch, tmp_path, byte_encoding(), "--input", text_file, "--val_fraction", "0.1")
    texts = split_at_end_of_text(after["train"]) + split_at_end_of_text(after["val"])
    assert sorted(texts) == sorted(some_text(seed=3)[0])
    assert not np.array_equal(before["train"], after["train"])


def test_gpt2_from_a_dataset_is_the_same_path(tmp_path, monkeypatch, stream):
    ids, meta = prepare_gpt2(monkeypatch, tmp_path, byte_encoding(), "--val_fraction", "0.1")
    texts = split_at_end_of_text(ids["train"]) + split_at_end_of_text(ids["val"])
    assert sorted(texts) == sorted(text.rstrip("\n") for text in some_text(90)[0])
    assert meta["source"]["hub"] == hub.NAME


def test_gpt2_refuses(tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets")
    monkeypatch.setattr(script("openwebtext"), "gpt2_encoding", byte_encoding)
    path = tmp_path / "text.txt"

    def refused(*flags):
        return fails("openwebtext", "--input", path, "--out", tmp_path / "out", *flags, capsys=capsys)

    assert "No such file" in refused()
    path.write_bytes(b"one\n\ntwo \xff\n")
    assert "not UTF-8" in refused()
    path.write_bytes(b"only one\n")
    assert "too few documents (1)" in refused()
    path.write_bytes(b"")
    assert "is empty" in refused()
    assert "between 0 and 1" in refused("--val_fraction", "0")
    assert not (tmp_path / "out").exists()


def test_gpt2_with_the_real_vocabulary(tmp_path, monkeypatch, text_file):
    try:
        encoding = corpus.gpt2_encoding()
    except BadInput as error:
        pytest.skip(str(error))
    prepare_gpt2(monkeypatch, tmp_path, encoding, "--input", text_file, "--val_fraction", "0.1")
    loaded = load_corpus(tmp_path / "out", block_size=64, vocab_size=50304)
    texts = (loaded.decode(loaded.train) + loaded.decode(loaded.val)).split("<|endoftext|>")[:-1]
    assert sorted(texts) == sorted(some_text()[0])
    assert loaded.vocab_size == 50304
    assert loaded.encode("Hello world<|endoftext|>") == [15496, 995, 50256]


# Python's documentation and sources


def test_pydocs_is_the_same_each_time_and_large_enough(tmp_path, capsys):
    for name in ("a", "b"):
        script("pydocs").main(["--out", str(tmp_path / name)])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    loaded = load_corpus(tmp_path / "a", block_size=1024)
    assert len(loaded.train) > 3_000_000
    assert 0.03 < len(loaded.val) / len(loaded.train) < 0.3
    text = loaded.decode(loaded.train) + loaded.decode(loaded.val)
    assert text.count("class OrderedDict(dict):") == 1
    assert "Augmented assignment is the combination, in a single statement" in text
    assert str(Path.home()) not in text
    dropped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dropped, has other")]
    assert len(dropped) == 2 * loaded.meta["documents"]["dropped"]


# Reading a corpus


@pytest.fixture
def folder(tmp_path):
    about = {"name": "test", **CHARACTERS, "source": "made here"}
    with CorpusWriter(tmp_path / "corpus", about) as writer:
        writer.add("train", encode_symbols("to be or not to be " * 50))
        writer.add("val", encode_symbols("that is the question"))
        writer.finish()
    return tmp_path / "corpus"


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def test_a_block_may_be_as_long_as_the_shorter_split_less_one(folder):
    assert len(load_corpus(folder, block_size=19).val) == 20
    with pytest.raises(BadInput, match=r"val.bin has 20 tokens; block_size 20 needs at least 21"):
        load_corpus(folder, block_size=20)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "meta.json").unlink(), "meta.json is missing; make one with: python data/NAME/prepare"),
        (lambda f: (f / "meta.json").write_text('{"name": '), "meta.json is damaged"),
        (lambda f: (f / "meta.json").write_text("[1]"), "not a JSON object"),
        (lambda f: (f / "val.bin").unlink(), "val.bin is missing; make"),
        (lambda f: (f / "val.bin").write_bytes(b""), "val.bin has 0 bytes; meta.json counts 20 tokens"),
        (lambda f: (f / "train.bin").write_bytes(b"\x01" * 900), "train.bin has 900 bytes; meta.json counts 950"),
        (lambda f: change_meta(f, dtype="int32"), "unknown dtype 'int32'"),
        (lambda f: change_meta(f, dtype=["uint8"]), "unknown dtype"),
        (lambda f: change_meta(f, tokenizer="bpe"), "unknown tokenizer 'bpe'"),
        (lambda f: change_meta(f, vocab_size="96"), "vocab_size"),
        (lambda f: change_meta(f, alphabet="aab", vocab_size=3), "alphabet of vocab_size .3. distinct"),
        (lambda f: change_meta(f, tokens={"train": 950}), "tokens of both splits"),
        (lambda f: change_meta(f, tokens=None), "does not count its tokens"),
        (lambda f: (f / "val.bin").write_bytes(b"\x01" * 7 + b"\x60" + b"\x01" * 12), "token 7 is 96, outside .* 96"),
    ],
)
def test_a_damaged_corpus_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(BadInput, match=message):
        load_corpus(folder, block_size=8)


def test_ids_beyond_the_models_vocabulary_are_found_anywhere(folder, monkeypatch):
    monkeypatch.setattr(corpus, "SCAN", 64)
    assert load_corpus(folder, block_size=8, vocab_size=200).vocab_size == 200
    largest = ALPHABET.index("u")
    load_corpus(folder, block_size=8, vocab_size=largest + 1)
    with pytest.raises(BadInput, match=f"is {largest}, outside the vocabulary of {largest}"):
        load_corpus(folder, block_size=8, vocab_size=largest)
    ids = np.fromfile(folder / "train.bin", np.uint8)
    ids[901] = 99
    ids.tofile(folder / "train.bin")
    with pytest.raises(BadInput, match="token 901 is 99"):
        load_corpus(folder, block_size=8)


def other_bytes(path):
    """The same number of ids of the vocabulary, one of them another."""
    ids = np.fromfile(path, np.uint8)
    ids[5] = (ids[5] + 1) % 96
    ids.tofile(path)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("loaded", [False, True])
def test_other_bytes_of_the_same_length_are_noticed(folder, split, loaded):
    if loaded:
        load_corpus(folder, block_size=8)
    other_bytes(folder / f"{split}.bin")
    for _ in range(2):
        with pytest.raises(BadInput, match=f"{split}.bin has other contents than meta.json describes"):
            load_corpus(folder, block_size=8)


def test_a_corpus_is_read_once(folder, monkeypatch):
    """Until one of its files, or its hash, is another; also where the note is damaged, or cannot be written."""
    read, digest = [], corpus.sha256
    monkeypatch.setattr(corpus, "sha256", lambda path: read.append(path.stem) or digest(path))

    def reads():
        read.clear()
        load_corpus(folder, block_size=8)
        return read

    assert reads() == ["train", "val"]
    assert reads() == []
    (folder / "train.bin").touch()
    assert reads() == ["train"]
    (folder / "verified.json").write_text("[3")
    assert reads() == ["train", "val"]
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "write_json", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
        (folder / "val.bin").touch()
        assert reads() == reads() == ["val"]


@pytest.mark.parametrize("name", ["shakespeare_char", "pydocs", "openwebtext", "openwebtext_small"])
def test_a_missing_corpus_names_its_command(tmp_path, name):
    with pytest.raises(BadInput, match=rf"make it with: python data/{name}/prepare.py --out {tmp_path}/{name}"):
        load_corpus(tmp_path / name, block_size=8)
    with pytest.raises(BadInput, match=rf"did you mean data/{name}\?"):
        load_corpus(tmp_path / (name + "s"), block_size=8)


# ETT


@pytest.mark.parametrize("name", ["ETTh1", "ETTh2"])
def test_ett_counts_borders_and_standardisation(tmp_path, name):
    script("ett").main(["--input", shared(f"{name}.csv"), "--out", str(tmp_path)])
    series = load_series(tmp_path / name)
    values = series.values
    assert (series.minutes, series.season, series.end) == (60, 24, "2018-02-20 23:00:00")
    assert series.borders == (0, 8640, 11520, 14400)
    assert series.columns == COLUMNS
    assert values.shape == (14400, 7)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[:8640].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(values[:8640].std(0), 1, atol=1e-4)

    raw = np.genfromtxt(shared(f"{name}.csv"), delimiter=",", skip_header=1, usecols=range(1, 8))
    meta = json.loads((tmp_path / name / "meta.json").read_text())
    assert len(raw) == meta["source"]["rows"] == 17420
    np.testing.assert_allclose(values * meta["std"] + meta["mean"], raw[:14400], rtol=1e-4, atol=1e-4)
    test = np.fromfile(tmp_path / name / "test.bin", "<f4").reshape(-1, 7)
    assert np.array_equal(test, raw[11520:14400].astype(np.float32))
    assert meta["source"]["sha256"] == hashlib.sha256(Path(shared(f"{name}.csv")).read_bytes()).hexdigest()


def ett_lines(rows, minutes=60):
    """A file with invented values."""
    lines = [",".join(["date", *COLUMNS])]
    start = np.datetime64("2016-07-01T00:00:00")
    for hour in range(rows):
        date = str(start + np.timedelta64(hour * minutes, "m")).replace("T", " ")
        lines.append(",".join([date, *(f"{hour % 24 + column}.5" for column in range(7))]))
    return lines


def replaced(lines, number, old, new):
    return [*lines[: number - 1], lines[number - 1].replace(old, new, 1), *lines[number:]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: [x[0].replace("OT", "O\u200bT"), *x[1:]], r"O.u200bT'; it must be date,"),
        (lambda x: [x[0].replace("OT", "oil"), *x[1:]], "the header is 'date,.*,oil'; it must be date,"),
        (lambda x: x[1:], "the header is '2016-07-01"),
        (lambda x: x[:100] + x[101:], "line 101: a gap: 2016-07-05 04:00:00, where 2016-07-05 03:00:00 is due"),
        (lambda x: x[:100] + x[99:], "line 101: a row twice or out of order"),
        (lambda x: [*x[:49], x[49] + ",1", *x[50:]], "line 50: 9 columns instead of 8"),
        (lambda x: [*x[:49], x[49][:-6], *x[50:]], "line 50: 7 columns instead of 8"),
        (lambda x: replaced(x, 70, ".5", "e999"), "line 70: HUFL is .*e999'; a missing value"),
        (lambda x: [*x[:79], x[79].rsplit(",", 1)[0] + ",nan", *x[80:]], "line 80: OT is 'nan'; a missing value"),
        (lambda x: [*x[:79], x[79].rsplit(",", 1)[0] + ",", *x[80:]], "line 80: OT is '', not a number"),
        (lambda x: replaced(x, 90, "2016-07", "2016/07"), "line 90: '2016/07.*' is not a time"),
        (lambda x: x[:-1], "499 rows; the published file has 500"),
        (lambda x: x[:1], "0 rows; the published file has 500"),
        (lambda x: x[:0], "the header is ''; it must be date,"),
        (lambda x: x, "the values are not those of the published ETTh1 .*--changed"),
        (lambda x: [line.rsplit(",", 1)[0] + (",1.5" if i else ",OT") for i, line in enumerate(x)], "OT is 1.5 in all"),
    ],
)
def test_ett_refuses(tmp_path, capsys, monkeypatch, damage, message):
    monkeypatch.setitem(script("ett").SERIES, "ETTh1", (60, 500))
    path = tmp_path / "ETTh1.csv"
    path.write_text("\n".join(damage(ett_lines(500))) + "\n")
    err = fails("ett", "--input", path, "--out", tmp_path / "out", capsys=capsys)
    assert re.search(message, err)
    assert not (tmp_path / "out").exists()


def test_ett_of_every_fifteen_minutes(tmp_path):
    (tmp_path / "ETTm2.csv").write_text("\n".join(ett_lines(69680, minutes=15)))
    script("ett").main(["--input", str(tmp_path / "ETTm2.csv"), "--out", str(tmp_path)])
    series = load_series(tmp_path / "ETTm2")
    assert (series.borders, series.minutes) == ((0, 34560, 46080, 57600), 15)


def test_ett_takes_changed_values_and_other_line_ends_when_told(tmp_path, capsys):
    lines = "\r\n".join(ett_lines(17420))
    (tmp_path / "ETTh1.csv").write_text(lines, newline="")
    argv = ["--input", str(tmp_path / "ETTh1.csv"), "--out", str(tmp_path)]
    assert "the values are not those" in fails("ett", *argv, capsys=capsys)
    script("ett").main([*argv, "--changed"])
    assert load_series(tmp_path / "ETTh1").values.shape == (14400, 7)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_published_file_as_a_spreadsheet_saves_it(tmp_path, encoding):
    text = Path(shared("ETTh1.csv")).read_text()
    (tmp_path / "ETTh1.csv").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    script("ett").main(["--input", str(tmp_path / "ETTh1.csv"), "--out", str(tmp_path)])
    assert load_series(tmp_path / "ETTh1").borders == (0, 8640, 11520, 14400)


def test_ett_takes_a_header_of_a_spreadsheet(tmp_path):
    header, *rows = ett_lines(17420)
    (tmp_path / "ETTh1.csv").write_text("\n".join([header.replace("date", '"Date "'), *rows]), encoding="utf-8-sig")
    script("ett").main(["--input", str(tmp_path / "ETTh1.csv"), "--out", str(tmp_path), "--changed"])
    assert load_series(tmp_path / "ETTh1").values.shape == (14400, 7)


def test_ett_refuses_files_it_cannot_tell_or_read(tmp_path, capsys):
    out = tmp_path / "out"
    assert "which series it is" in fails("ett", "--input", tmp_path / "mine.csv", "--out", out, capsys=capsys)
    assert "cannot read" in fails("ett", "--input", tmp_path / "ETTh1.csv", "--out", out, capsys=capsys)
    (tmp_path / "ETTh1.csv").write_bytes(b"")
    assert "is empty" in fails("ett", "--input", tmp_path / "ETTh1.csv", "--out", out, capsys=capsys)
    (tmp_path / "ETTh1.csv").write_bytes(b"date\xff")
    assert "not UTF-8" in fails("ett", "--input", tmp_path / "ETTh1.csv", "--out", out, capsys=capsys)
    assert not out.exists()


def damage_value(path, index, value):
    values = np.fromfile(path, DTYPE)
    values[index] = value
    values.tofile(path)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ett")
    (folder / "ETTh1.csv").write_text("\n".join(ett_lines(17420)))
    script("ett").main(["--input", str(folder / "ETTh1.csv"), "--out", str(folder), "--changed"])
    return folder / "ETTh1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "meta.json").unlink(), "meta.json is missing; make it with: python data/ett/prepare.py"),
        (lambda f: (f / "test.bin").unlink(), "test.bin is missing; make it with"),
        (lambda f: (f / "val.bin").write_bytes(bytes(4 * 7 * 100)), r"val.bin has 700 values, not 2,880 rows of 7"),
        (lambda f: damage_value(f / "val.bin", 7 * 30 + 6, np.nan), r"val.bin, row 30: OT is no finite number"),
        (lambda f: damage_value(f / "train.bin", 0, np.inf), r"train.bin, row 0: HUFL is no finite number; make it"),
        (lambda f: change_meta(f, mean=[np.nan] * 7), "meta.json is damaged"),
        (lambda f: change_meta(f, std=[np.inf] * 7), "meta.json is damaged"),
        (lambda f: change_meta(f, rows={"train": 1}), "damaged"),
        (lambda f: change_meta(f, mean=[1, 2]), "damaged"),
        (lambda f: change_meta(f, std=[0, *[1] * 6]), r"damaged .*standard deviations \[0.0, 1.0"),
        (lambda f: (f / "meta.json").write_text("{"), "damaged"),
    ],
)
def test_a_damaged_series_is_refused(tmp_path, series, damage, message):
    shutil.copytree(series, tmp_path / "ETTh1")
    damage(tmp_path / "ETTh1")
    with pytest.raises(BadInput, match=message):
        load_series(tmp_path / "ETTh1")


def test_a_missing_series_names_its_command(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=rf"make it with: python data/ett/prepare.py --names ETTm1 --out {tmp_path}$"):
        load_series(tmp_path / "ETTm1")
    monkeypatch.setattr(data_series, "ROOT", tmp_path)
    with pytest.raises(BadInput, match=r"make it with: python data/ett/prepare.py --names ETTm1$"):
        load_series(tmp_path / "data/ett/ETTm1")
