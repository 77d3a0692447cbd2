"""Several runs in one process, a step of each in turn: on a GPU side by side, each on a stream of its own.

A small model leaves most of a GPU idle, and processes that share one take turns. Runs of one process whose steps are
CUDA graphs (training/capture.py) do not: the host hands out the steps faster than the card works them off.
"""

import contextlib
import os
import signal
import sys
import traceback

import torch

from training.errors import BadInput
from training.run import STOP_SIGNALS


class Turn:
    """A run that takes its turns; `status` is what its process would have ended with, None while it goes on."""

    def __init__(self, experiment, together):
        self.run, self.status, self.steps = experiment.run, None, experiment.training()
        self.run.together = together
        self.output = None
        on_gpu = experiment.device.type == "cuda"
        self.stream = torch.cuda.Stream(experiment.device) if on_gpu else None
        if on_gpu:
            self.stream.wait_stream(torch.cuda.current_stream(experiment.device))  # which drew the parameters

    def step(self):
        """One more step; what the run prints is added to output.txt in its folder."""
        if self.output is None:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            self.output = open(self.run.folder / "output.txt", "a")  # noqa: SIM115, open until the run ends
        with contextlib.redirect_stdout(self.output), torch.cuda.stream(self.stream):
            self.status = self._next()
        if self.status is not None:
            self.output.close()

    def _next(self):
        try:
            next(self.steps)
        except StopIteration:
            return 0
        except SystemExit as end:
            return end.code
        except Exception:
            traceback.print_exc()
            return 1
        return None


def fit_together(builders, jobs):
    """Train the experiments that the functions `builders` make to their ends, `jobs` of them at a time.

    What one computes does not depend on the others. One that fails, or cannot begin, does not stop the others; a stop
    signal stops them all. Ends the process with status 128 + n at signal n, with 1 if a run failed.
    """
    waiting, turns, statuses = list(builders), [], []
    with stop_signals() as asked:
        while turns or (waiting and not asked):
            while waiting and len(turns) < jobs and not asked:
                begin(waiting.pop(0), jobs, turns, statuses)
            for turn in list(turns):
                if asked:
                    turn.run.stop_requested = signal.Signals(asked[0]).name
                turn.step()
                if turn.status is not None:
                    turns.remove(turn)
                    statuses.append(turn.status)
                    print(f"{turn.run.folder} {turn.run.record.get('status', 'failed')}", flush=True)
    if asked:
        sys.exit(128 + asked[0])
    if any(statuses):
        sys.exit(f"error: {sum(map(bool, statuses))} of {len(statuses)} runs failed")


def begin(build, jobs, turns, statuses):
    """Give a run its turns, if it can be."""
    try:
        experiment = build()
        require_one_precision(experiment, turns)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        statuses.append(2)
    else:
        turns.append(Turn(experiment, jobs))
        print(f"{experiment.run.folder} started", flush=True)


def require_one_precision(experiment, turns):
    """Whether float32 products may be rounded is one switch of the process."""
    here = experiment.cfg.tf32
    for turn in turns:
        if turn.run.settings.tf32 != here:
            other = turn.run.folder
            raise BadInput(f"{experiment.run.folder} has tf32 = {here}, {other} beside it has not: run them apart")


@contextlib.contextmanager
def stop_signals():
    """A list to which the stop signals that arrive are added, each by its number."""
    asked = []

    def note(number, frame):
        asked.append(number)
        os.write(2, f"{signal.Signals(number).name}: all runs will save and stop\n".encode())

    earlier = {s: signal.signal(s, note) for s in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for s, handler in earlier.items():
            signal.signal(s, handler)
