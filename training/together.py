"""Several runs in one process: those of one shape are one batched model, and take every step together.

A small model leaves most of a GPU idle, and starting its kernels takes longer than running them. Runs that differ in
seed and learning rate alone are one program on different numbers: `Pack` stacks their parameters and maps the program
over them (torch.vmap), so that every product of matrices is a batched one. Each run keeps its own optimizer, record,
evaluations and checkpoints, and its curves are those it has alone, to rounding.
"""

import contextlib
import dataclasses
import functools
import gc
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.func import functional_call

from structured import build_scoring, kernels
from training import devices
from training.capture import StaticStep
from training.errors import BadInput
from training.run import STOP_SIGNALS

DIFFERENT = {"seed", "training_learning_rate", "init_lr"}  # what the runs of a pack may differ in, beside free settings
ANY_LENGTH = 2**20  # tokens; the width of a head does not depend on them
PROGRAM = {"device", "compile", "keep", "cuda_graph"}  # free settings that the runs of a pack agree in


class Plan(NamedTuple):
    """A run to make: its settings, the function that builds its experiment, and the command that makes it alone."""

    settings: object
    build: Callable
    argv: list | None = None


def fit_together(plans, jobs):
    """Train the experiments of the plans to their ends; at most `jobs` that fit in a pack at a time, else one.

    One that fails, or cannot begin, does not stop the others; a stop signal stops them all. Ends the process with
    status 128 + n at signal n, with 1 if a run failed.
    """
    statuses = []
    with stop_signals() as asked:
        for part in parts(plans, jobs):
            if not asked:
                statuses += train(part, asked)
                gc.collect()  # memory of a pack, whose parts refer to each other, before the next one takes its own
    if asked:
        sys.exit(128 + asked[0])
    if any(statuses):
        sys.exit(f"error: {sum(map(bool, statuses))} of {len(statuses)} runs failed")


def parts(plans, jobs):
    """The plans in lists that are trained one after the other: those of a shape in equal lists of at most `jobs`."""
    shapes = {}
    for plan in plans:
        shapes.setdefault(shape(plan.settings), []).append(plan)
    for alike in shapes.values():
        n = math.ceil(len(alike) / (jobs if packing_refusal(alike[0].settings) is None else 1))
        yield from (alike[i::n] for i in range(n))


def shape(settings):
    """What the settings of a pack's runs have in common, as a string."""
    kept = {f.name for f in dataclasses.fields(settings) if not f.metadata["free"]} - DIFFERENT | PROGRAM
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name in kept}
    return f"{type(settings).__module__} {sorted(values.items())}"


def packing_refusal(settings):
    """Why a run cannot be part of a pack, or None."""
    if settings.dropout:
        return "dropout draws for one run at a time"
    if settings.dtype == "float16":
        return "float16 scales the loss of each run"
    if "gswa" in settings.token_mixing_struct or "window" in settings.token_mixing_struct:
        return "FlexAttention, which windows use on a GPU, is not mapped over runs"
    try:
        with torch.device("meta"):
            width = build_scoring(settings.model_config(block_size=ANY_LENGTH).scoring).key_width
    except BadInput as error:  # which the run, alone, will end with
        return str(error)
    if width > kernels.WIDEST:
        return f"queries {width} wide take PyTorch's attention, whose backward pass fails mapped and compiled"
    return None


def train(plans, asked):
    """Train the runs of a list, as a pack if it has several; their statuses."""
    members, statuses = [], []
    for plan in plans:
        try:
            members.append(Member(plan.build(), plan.argv))
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            statuses.append(2)
    for member in members:
        member.run.together = len(members)
        print(f"{member.run.folder} started", flush=True)
    pack = Pack([member.experiment for member in members]) if len(members) > 1 else None
    error = None
    while going := [member for member in members if member.status is None]:
        for member in going:
            if asked:
                member.run.stop_requested = signal.Signals(asked[0]).name
            member.go_on(error)
        if pack and any(member.status is None for member in going):
            try:
                pack.step()
            except Exception as its_error:
                error = its_error
    return statuses + [member.status for member in members]


class Member:
    """A run that shares its process. `status` is what its own process would have ended with, None while it goes on."""

    def __init__(self, experiment, argv):
        self.experiment, self.run, self.status = experiment, experiment.run, None
        self.loop, self.output = experiment.training(), None
        self.run.takes_signals, self.run.argv = False, argv

    def go_on(self, error=None):
        """To the next step, or to the end that `error` is; what the run prints is added to output.txt in its folder."""
        if self.output is None:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            self.output = open(self.run.folder / "output.txt", "a")  # noqa: SIM115, open until the run ends
        with contextlib.redirect_stdout(self.output):
            self.status = self._next(error)
        if self.status is not None:
            self.output.close()
            print(f"{self.run.folder} {self.run.record.get('status', 'failed')}", flush=True)

    def _next(self, error):
        try:
            self.loop.throw(error) if error else next(self.loop)
        except StopIteration:
            return 0
        except SystemExit as end:
            return end.code
        except BadInput as refused:
            print(f"error: {refused}", file=sys.stderr)
            return 2
        except Exception:
            traceback.print_exc()
            return 1
        return None


class Pack:
    """The step of several experiments of one shape, all at once.

    An experiment of a pack hands over the inputs of its step where it would have made the step; `step` makes it for
    all. One that has ended is computed along with its last inputs, or another's where it had no step to make, which
    changes nothing for the others.
    """

    def __init__(self, experiments):
        first = self.first = experiments[0]
        self.experiments, self.inputs = experiments, [None] * len(experiments)
        self.parameters = [list(e.model.parameters()) for e in experiments]
        self.stacked = [torch.stack(same).detach().requires_grad_() for same in zip(*self.parameters, strict=True)]
        self.names = [name for name, _ in first.model.named_parameters()]
        torch.compiler.reset()  # another pack's program is another program
        self.losses = devices.compiler(first.cfg)(self._losses)
        self.update = StaticStep(self._update, first.device) if first.static_step else self._update
        for k, e in enumerate(experiments):
            for p, stacked in zip(self.parameters[k], self.stacked, strict=True):
                p.data = stacked.detach()[k]
            e.network, e.fixed_shapes = e.model, True
            e.static_step = functools.partial(self._take, k)

    def _take(self, k, *inputs):
        self.inputs[k] = inputs

    def step(self):
        """One step of all."""
        some = next(filter(None, self.inputs))
        self.update(*(torch.stack(same) for same in zip(*(own or some for own in self.inputs), strict=True)))

    def _update(self, steps, *inputs):
        """As `Experiment._static_update`; every tensor has the runs as its first dimension."""
        micro_batches = self.first.by_micro_batch(inputs)
        weight = 1 / len(micro_batches)
        for micro_batch in micro_batches:
            with self.first.context():
                losses = self.losses(self.stacked, *micro_batch)
            (next(iter(losses.values())).sum() * weight).backward()
            for k, e in enumerate(self.experiments):
                e.meter.add({name: loss[k] for name, loss in losses.items()}, steps[k], weight)
        for k, e in enumerate(self.experiments):
            for p, stacked in zip(self.parameters[k], self.stacked, strict=True):
                p.grad = stacked.grad[k]
            e.descend(steps[k])
        for stacked in self.stacked:
            stacked.grad = None

    def _losses(self, stacked, *inputs):
        """{name: (runs,)}."""
        model = self.first.model

        def of_one(parameters, *inputs):
            network = functools.partial(functional_call, model, dict(zip(self.names, parameters, strict=True)))
            return self.first.losses(lambda *tensors: network(tensors), *inputs)

        return torch.vmap(of_one)(stacked, *inputs)


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
