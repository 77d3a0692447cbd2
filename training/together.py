"""Several runs in one process that take their steps in turn, each on its own CUDA stream.

The step of a small model leaves most of a GPU idle, and two processes on a GPU take turns at it. Within one process the
recorded steps of several runs overlap: six runs of 6 layers, d_model 64, make 1.7 times the steps that one makes alone
on an H200 (dev/LOG.md). Each run is the one that its own command makes, to the last bit, whatever the others are.
"""

import contextlib
import gc
import io
import math
import sys
import traceback
from collections.abc import Callable
from signal import Signals
from typing import NamedTuple

import torch
import torch._dynamo

from training.devices import pick_device
from training.errors import BadInput, WriteError, fail
from training.signals import StopSignals, say

SHARED = ("tf32", "keep")  # settings that PyTorch keeps once for a process

# runs are compiled with the same code, and each is another program
many_programs = torch._dynamo.config.patch(recompile_limit=1_000, accumulated_recompile_limit=10_000)


class Plan(NamedTuple):
    """A run to make: the generator function that takes its steps, its settings, and the command that makes it alone."""

    training: Callable
    settings: object
    argv: list | None = None


def fit_together(plans, jobs):
    """Train the runs of the plans to their ends, in groups of at most `jobs`.

    One that fails, or cannot begin, does not stop the others; a stop signal stops them all. Ends the process with
    status 128 + n at signal n, with 1 if a run failed. BadInput where they differ in what a process has once.
    """
    for name in SHARED:
        if len(values := {getattr(plan.settings, name) for plan in plans}) > 1:
            raise BadInput(f"{name} is {' and '.join(map(str, sorted(values)))}; runs in one process have the same")
    groups, statuses = math.ceil(len(plans) / jobs), []
    stop = StopSignals("all runs will save and stop", patient=True)
    try:
        for i in range(groups):
            if not stop.asked:
                with many_programs:
                    statuses += train_group(plans[i::groups], stop)
                gc.collect()  # the memory of a group, whose parts refer to each other, before the next takes its own
    finally:
        stop.release()
    if stop.asked:
        sys.exit(128 + Signals[stop.asked])
    if any(statuses):
        fail(f"{sum(map(bool, statuses))} of {len(statuses)} runs failed", 1)


def train_group(plans, stop):
    """Train the runs of a list in turn, a step of each; their statuses."""
    members = [Member(plan, together=len(plans), stop=stop) for plan in plans]
    while going := [member for member in members if member.status is None]:
        for member in going:
            member.go_on()
    return [member.status for member in members]


class Member:
    """A run that shares its process. `status` is what its own process would have ended with, None while it goes on."""

    def __init__(self, plan, together, stop):
        self.folder, self.status, self.output = plan.settings.folder, None, None
        self.steps = plan.training(plan.settings, argv=plan.argv, together=together, stop=stop)
        self.stream = None
        with contextlib.suppress(BadInput):  # a device that is not there is refused by the run
            device = pick_device(plan.settings.device)
            self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        say(f"{self.folder} started")

    def go_on(self):
        """To the end of the next step; what the run prints is added to output.txt in its folder."""
        first, printed = self.output is None, io.StringIO()
        with contextlib.redirect_stdout(printed if first else self.output), torch.cuda.stream(self.stream):
            self.status, why = self._next()
        if first and self.folder.is_dir() and self.status != 2:  # a run that is refused leaves no folder
            self.output = open(self.folder / "output.txt", "a")  # noqa: SIM115, open until the run ends
            self.output.write(printed.getvalue())
        if self.status is not None:
            say(f"{self.folder} {why}")
            if self.output:
                self.output.close()

    def _next(self):
        """(status, words), the status None where the run goes on."""
        try:
            next(self.steps)
        except StopIteration:
            return 0, "finished"
        except SystemExit as end:
            return end.code, "failed" if end.code == 1 else "stopped"
        except BadInput as refused:
            print(f"error: {refused}", file=sys.stderr)
            return 2, "refused"
        except WriteError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1, "failed"
        except Exception:
            traceback.print_exc()
            return 1, "failed"
        return None, "goes on"
