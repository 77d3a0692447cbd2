"""Fixtures of the suite. Tests run from the repository root, as the scripts do."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

for number, usual in [(signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)]:
    if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup, which runs and their children would keep
        signal.signal(number, usual)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels are tested in the interpreter; Triton reads this at import

from runs import TINY_LM, flags, one_thread, write_corpus  # noqa: E402


@pytest.fixture
def single_thread():
    """For tests of many tiny products, whose threads wait for each other where a machine has more to do."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with a small corpus of text."""
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "text")
    return folder


@pytest.fixture(scope="module")
def argv(data_dir):
    """The flags of a tiny language model; `argv(key=value, ..)` changes some."""
    return lambda *settings, **more: flags(TINY_LM, dict(data_dir=data_dir), *settings, more)


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    """A run of six steps that nothing interrupted, with dropout and two micro-batches in a step."""
    import train

    out_dir = tmp_path_factory.mktemp("whole") / "run"
    train.main(argv(out_dir=out_dir))
    return out_dir
