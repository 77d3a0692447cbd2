"""What happens to runs that meet kills, signals, double starts, flipped bits, full disks and damaged records: counted.

    python tests/robustness.py          # the long form, a quarter of an hour, with bad_inputs.py: make robustness
    python tests/robustness.py 0.05     # a twentieth of it, as tests/test_robustness.py does

Every case is drawn from its number. A case is clean if nothing that was saved is lost, the run that resumes is the
uninterrupted one bit for bit, and what is refused is refused in one line with exit status 2.
"""

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bad_inputs
from runs import TINY_ICL, TINY_LM, assert_equal, assert_same_run, child, flags, one_thread, write_corpus

import train
import train_ICL
from plots import lm_table
from training.checkpoint import load_checkpoint
from training.errors import BadInput
from training.signals import STOP_SIGNALS

CASES = dict(kills=200, signals=90, double_starts=20, flipped_bits=40, full_disks=40, damaged_records=60)
LINE = "{:<16} {:>5} tried {:>5} clean"
STEPS, PATIENCE = 40, 120  # of a run; seconds that a process may take to end
OFTEN = dict(max_iters=STEPS, eval_interval=2, log_interval=1, init_from="auto")
SCRIPTS = {train: dict(TINY_LM, **OFTEN), train_ICL: dict(TINY_ICL, **OFTEN)}


class Bench:
    """Uninterrupted runs of two scripts to compare with, and a folder to work in."""

    def __init__(self, folder):
        self.folder, self.count, self.whole, self.seconds = folder, 0, {}, {}
        write_corpus(folder / "text")
        for script in SCRIPTS:
            self.whole[script] = folder / f"whole_{script.__name__}"
            began = time.perf_counter()
            process = child(quietly, script.__name__, self.command(script, self.whole[script]))
            process.join(PATIENCE)
            self.seconds[script] = time.perf_counter() - began

    def command(self, script, out_dir, **more):
        where = dict(data_dir=self.folder, out_dir=out_dir) if script is train else dict(out_dir=out_dir)
        return flags(SCRIPTS[script], where, more)

    def new_folder(self):
        self.count += 1
        return self.folder / f"run_{self.count}"

    def start(self, script, out_dir, limit=None):
        return child(quietly, script.__name__, self.command(script, out_dir), limit)

    def moment(self, draw, script):
        time.sleep(draw.uniform(0, self.seconds[script]))

    def ends_as_whole(self, script, out_dir):
        """Whether the run in a folder, taken to its end, is the uninterrupted one."""
        process = self.start(script, out_dir)
        process.join(PATIENCE)
        return process.exitcode == 0 and same_run(out_dir, self.whole[script])


def quietly(script, argv, limit=None):
    """Train without output, with files of at most `limit` bytes."""
    sys.stdout = sys.stderr = io.StringIO()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the words of the signals' handler
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    dict(train=train, train_ICL=train_ICL)[script].main(argv)


def same_run(got, want):
    try:
        assert_same_run(got, want)
    except AssertionError:
        return False
    return True


def interruptions(bench, draw, interrupt, chain=10):
    """One script's run, interrupted time after time until it has been `chain` times, and taken to its end.

    interrupt(process) gives the exit statuses that are right then. Yields whether each left what can go on.
    """
    script, out_dir, found = draw.choice(list(SCRIPTS)), bench.new_folder(), []
    for _ in range(chain):
        process = bench.start(script, out_dir)
        bench.moment(draw, script)
        right = interrupt(process)
        process.join(PATIENCE)
        path = out_dir / "ckpt.pt"
        found.append(process.exitcode in right and (not path.exists() or bool(load_checkpoint(path))))
        if process.exitcode == 0:  # it was faster: the next chain begins afresh
            break
    return [bench.ends_as_whole(script, out_dir) and good for good in found]


def kills(bench, draw):
    def kill(process):
        process.kill()
        return 0, -signal.SIGKILL

    return interruptions(bench, draw, kill)


def signals(bench, draw):
    def ask(process):
        number = draw.choice(STOP_SIGNALS)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        # before the run has taken its signals, Python's own handler of Ctrl-C ends it with 1 in a process of this kind
        return 0, 128 + number, -number, 1 if number == signal.SIGINT else 0

    return interruptions(bench, draw, ask)


def double_starts(bench, draw):
    script, out_dir = draw.choice(list(SCRIPTS)), bench.new_folder()
    processes = [bench.start(script, out_dir)]
    if draw.random() < 0.5:
        bench.moment(draw, script)
    processes.append(bench.start(script, out_dir))
    for process in processes:
        process.join(PATIENCE)
    statuses = sorted(process.exitcode for process in processes)
    return [statuses in ([0, 2], [0, 0]) and bench.ends_as_whole(script, out_dir)]


def flipped_bits(bench, draw):
    """Refused, or in a place that nobody reads."""
    script = draw.choice(list(SCRIPTS))
    path = bench.whole[script] / "ckpt.pt"
    content, copy = bytearray(path.read_bytes()), bench.folder / "flipped.pt"
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    copy.write_bytes(content)
    try:
        assert_equal(load_checkpoint(copy), load_checkpoint(path), "flipped")
    except BadInput:
        return [True]
    except AssertionError:
        return [False]
    return [True]


def full_disks(bench, draw):
    """No file may grow beyond some size, from none to that of a checkpoint: the run says so, and goes on from there."""
    script, out_dir = draw.choice(list(SCRIPTS)), bench.new_folder()
    size = (bench.whole[script] / "ckpt.pt").stat().st_size
    process = bench.start(script, out_dir, limit=draw.randrange(size))
    process.join(PATIENCE)
    return [process.exitcode in (1, 2) and bench.ends_as_whole(script, out_dir)]


def damaged(content, draw):
    """Bytes of a record with something done to them."""
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.randrange(1, 60))
    noise = bytes(draw.randrange(256) for _ in range(end - start))
    between = [b"", noise, b"null", b"[]", b"\n", b'"x"', b"1e999", b"-1"]
    whole = [b"", b"null", b"[]", b"{}", b"3", b'{"settings": 3}', b"\xff\xfe", content[:start]]
    if draw.random() < 0.3:
        return draw.choice(whole)
    return content[:start] + draw.choice(between) + content[end:]


def damaged_records(bench, draw):
    """A figure's table and a resume of it: they work, or say in one line what is damaged."""
    out_dir = bench.new_folder()
    shutil.copytree(bench.whole[train], out_dir)
    path = out_dir / draw.choice(["run.json", "metrics.jsonl"])
    path.write_bytes(damaged(path.read_bytes(), draw))
    resume = bench.command(train, out_dir, max_iters=STEPS + 2, init_from="resume")
    return [one_line(lm_table.main, [str(out_dir)]) and one_line(train.main, resume)]


def one_line(main, argv):
    """Whether a command does its work, or ends with status 2 and one line."""
    said, error = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
            main(argv)
    except SystemExit as end:
        lines = error.getvalue().splitlines()
        return end.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    except Exception as wrong:
        print(f"{type(wrong).__name__}: {wrong}", argv)
        return False
    return True


def table(share=1.0):
    """[(kind, tried, clean)], a share of the CASES of each."""
    rows = []
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for kind, wanted in CASES.items():
            found, number = [], 0
            while len(found) < share * wanted:
                found += globals()[kind](bench, random.Random(f"{kind} {number}"))
                number += 1
            rows.append((kind.replace("_", " "), len(found), sum(found)))
            print(LINE.format(*rows[-1]), flush=True)
        if share == 1:
            (Path(folder) / "inputs").mkdir()
            for kind, tried, wrong in bad_inputs.table(Path(folder) / "inputs"):
                rows.append((f"bad {kind}", tried, tried - len(wrong)))
                print(LINE.format(*rows[-1]), *map(": ".join, wrong[:5]), sep="\n", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(any(tried > clean for _, tried, clean in table(float(sys.argv[1]) if sys.argv[1:] else 1.0)))
