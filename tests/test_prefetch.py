"""data/windows.py: the same windows as the definition draws, whoever draws them, and when."""

import threading

import numpy as np
import pytest
import torch

from data import windows
from data.windows import IGNORED, WindowStream, draw_windows, text_windows

CPU = torch.device("cpu")


def definition(ids, T, seed, index, batch_size):
    """One batch, as the first version of train.py drew it."""
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, index]))
    starts = rng.integers(len(ids) - T, size=batch_size)
    return ids[starts[:, None] + np.arange(T + 1)]


@pytest.mark.parametrize("dtype", ["u1", "<u2"])
@pytest.mark.parametrize(("tokens", "T", "batch_size"), [(400, 16, 2), (70_001, 100, 7), (17, 16, 3)])
def test_windows_are_those_of_the_definition(tokens, T, batch_size, dtype, tmp_path):
    """An odd batch leaves half a random number behind, which no other batch may find."""
    np.random.default_rng(0).integers(250, size=tokens).astype(dtype).tofile(tmp_path / "train.bin")
    ids = np.memmap(tmp_path / "train.bin", dtype=dtype, mode="r")
    indices = [5, 0, 1, 2**20]
    got = draw_windows(ids, T + 1, seed=1337, indices=indices, batch_size=batch_size)
    want = np.stack([definition(ids, T, 1337, index, batch_size) for index in indices])
    assert got.dtype == ids.dtype
    assert type(got) is np.ndarray
    assert np.array_equal(got, want)
    half = dict(batch_size=batch_size, rows=slice(1, 2))
    assert np.array_equal(draw_windows(ids, T + 1, seed=1337, indices=indices, **half), want[:, 1:2])


def test_the_first_and_the_last_window_can_be_drawn():
    ids = np.arange(20, dtype="u1")
    drawn = draw_windows(ids, 18, seed=0, indices=range(50), batch_size=2)
    assert set(drawn[..., 0].flatten().tolist()) == {0, 1, 2}
    assert drawn.max() == 19


@pytest.mark.parametrize(("tokens", "length"), [(2, 1), (2, 5), (65, 16), (64, 16), (66, 16), (400, 7)])
def test_consecutive_windows_predict_every_id_once(tokens, length):
    """All but the first id, in order; what fills the last window up does not count."""
    ids = np.random.default_rng(0).integers(250, size=tokens).astype("u1")
    inputs, targets = text_windows(ids, length, most=1000)
    assert inputs.dtype == ids.dtype
    assert inputs.shape == targets.shape == (-(-(tokens - 1) // length), length)
    counted = targets != IGNORED
    assert np.array_equal(targets[counted], ids[1:])
    assert np.array_equal(inputs[counted], ids[:-1])
    assert not inputs[~counted].any()


@pytest.mark.parametrize("most", [1, 3, 7, 24])
def test_fewer_windows_are_spread_evenly(most):
    ids = np.arange(201, dtype="u1")
    (every, _), (some, targets) = text_windows(ids, 8, most=25), text_windows(ids, 8, most)
    rows = [np.flatnonzero((every == window).all(1)).item() for window in some]
    assert len(rows) == most
    assert rows[0] == 0
    assert set(np.diff(rows)) <= {25 // most, 25 // most + 1}
    assert np.array_equal(targets[:, :-1], some[:, 1:])


def test_blocks_are_drawn_ahead_by_a_thread(monkeypatch):
    """Each once, none beyond the last step, and no thread is left."""
    monkeypatch.setattr(windows, "BLOCK_STEPS", 4)
    asked, drawn = [], threading.Semaphore(0)

    def draw(steps):
        asked.append((steps, threading.current_thread()))
        drawn.release()
        return np.array(steps)

    stream = WindowStream(draw, 10, CPU)
    assert stream.at(0).item() == 0
    assert drawn.acquire(timeout=10)
    assert drawn.acquire(timeout=10), "the second block, while the first is in use"
    assert [stream.at(step).item() for step in range(1, 10)] == list(range(1, 10))
    assert [steps for steps, _ in asked] == [range(4), range(4, 8), range(8, 10)]
    assert threading.main_thread() not in [thread for _, thread in asked]
    for _, thread in asked:
        thread.join(10)
        assert not thread.is_alive()


def test_any_step_can_be_asked_for(monkeypatch):
    """A resume begins in the middle; one step may be taken twice, or beyond the last one."""
    monkeypatch.setattr(windows, "BLOCK_STEPS", 4)
    stream = WindowStream(np.array, 10, CPU)
    order = [6, 7, 6, 3, 10, 11, 0, 9]
    assert [stream.at(step).item() for step in order] == order


def test_an_error_of_the_thread_is_raised_at_its_step(monkeypatch):
    monkeypatch.setattr(windows, "BLOCK_STEPS", 2)

    def draw(steps):
        if 2 in steps:
            raise ValueError("no such page")
        return np.array(steps)

    stream = WindowStream(draw, 10, CPU)
    assert [stream.at(step).item() for step in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match="no such page"):
        stream.at(2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["u1", "<u2"])
def test_blocks_reach_the_gpu_unwaited_for(dtype):
    ids = np.arange(60_000).astype(dtype)
    draw = dict(seed=0, batch_size=4)
    stream = WindowStream(lambda steps: draw_windows(ids, 100, indices=steps, **draw), 100, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [stream.at(step).long() for step in range(40)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = draw_windows(ids, 100, indices=range(40), **draw).astype(np.int64)
    assert torch.equal(torch.stack(got).cpu(), torch.from_numpy(want))
