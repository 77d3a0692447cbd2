"""Batches of a language model: random windows of a corpus, drawn for the next steps while the device is busy."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

IGNORED = -100  # a target that does not count: cross_entropy's default
BLOCK_STEPS = 16  # whose windows are drawn and copied together


def draw_windows(ids, length, *, seed, indices, batch_size, rows=slice(None)):
    """Random windows of `length` consecutive ids, (indices, rows, length) in the type of the corpus.

    A batch has batch_size of them and is a pure function of (seed, index); `rows` are those asked for.
    """
    bits = np.random.Philox(key=seed)
    rng, state, starts = np.random.Generator(bits), bits.state, []
    for index in indices:  # as Philox(key=seed, counter=[0, 0, 0, index]), which takes three times as long to make
        state["state"]["counter"] = np.array([0, 0, 0, index], np.uint64)
        bits.state = state
        starts.append(rng.integers(len(ids) - length + 1, size=batch_size)[rows])
    return sliding_window_view(ids, length)[np.stack(starts)]


def text_windows(ids, length, most):
    """The windows an evaluation reads: inputs (windows, length) in the type of the corpus, targets int64 of that shape.

    Consecutive windows predict every id but the first exactly once; where the last one is short, its inputs end in
    zeros and its targets in IGNORED. Of more than `most` windows those are taken that are spread evenly over the text.
    A function of the text alone, so all runs with one block size are compared on the same text.
    """
    starts = np.arange(0, len(ids) - 1, length)
    if len(starts) > most:
        starts = starts[np.arange(most) * len(starts) // most]
    inputs = np.zeros((len(starts), length), ids.dtype)
    targets = np.full((len(starts), length), IGNORED)
    for row, start in enumerate(starts):
        window = ids[start : start + length + 1]
        inputs[row, : len(window) - 1], targets[row, : len(window) - 1] = window[:-1], window[1:]
    return inputs, targets


def to_device(array, device):
    """A copy on the device; where that is a GPU, nobody waits for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class WindowStream:
    """What consecutive steps train on, a block of BLOCK_STEPS steps at a time: `draw(range of steps)`, one item a step.

    A thread draws the next block while the device works through this one. It lives as long as that takes, `at` raises
    what goes wrong in it, and it touches no GPU, which may be recording a graph. A block then travels in one copy from
    pinned memory, in the narrow type of the corpus. So no step waits for the disk, the draw or the copy, however large
    the corpus is, and one that would fit into the GPU's memory needs no path of its own. A block is a function of its
    steps: nothing of it is state. From n_steps on nothing is drawn in advance.
    """

    def __init__(self, draw, n_steps, device):
        self.draw, self.n_steps, self.device = draw, n_steps, device
        self.steps, self.asked = range(0), range(0)

    def at(self, step):
        if step not in self.steps:
            if step not in self.asked:
                self._ask(step)
            self.steps, self.block = self.asked, to_device(self.drawn.result(), self.device)
            if self.steps.stop < self.n_steps:
                self._ask(self.steps.stop)
        return self.block[step - self.steps.start]

    def _ask(self, first):
        self.asked = range(first, max(first + 1, min(first + BLOCK_STEPS, self.n_steps)))
        thread = ThreadPoolExecutor(1, thread_name_prefix="windows")
        self.drawn = thread.submit(self.draw, self.asked)
        thread.shutdown(wait=False)  # it ends when the block is drawn
