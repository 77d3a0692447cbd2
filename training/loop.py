"""The loop around a step: evaluations, checkpoints, progress lines, clean stops, exact resumes, how a run ends.

    loop = Loop(cfg, process, run, model, optimizer, meter, evaluate=.., headline=.., cost=..)
    with loop:
        for step in loop:
            ...

A step's learning rate and data are functions of its number, and so is dropout; everything else that a resume needs is
in the checkpoint. With several processes all of them run this loop, each on its share of a step; the first one writes.
"""

import contextlib
import functools
import math
import sys
import time
from collections import Counter
from signal import Signals

import torch

from training import devices
from training.checkpoint import load_weights
from training.distributed import held
from training.errors import BadInput, fail, reading
from training.signals import StopRequested, say

NEVER = torch.iinfo(torch.long).max  # the step at which nothing went wrong


class NonFinite(RuntimeError):
    """The loss, its gradient or an evaluation is NaN or infinite."""


class Loop:
    """Iterating gives the number of every step to take; before, between and after them it does what is due.

    evaluate()          metrics, a dict, the same in every process; called without gradients, the model in eval mode;
                        a stop of a run of one process does not wait for its end
    headline(metrics)   the evaluation's words in the progress output, and the number that "best" compares
    cost(step)          Counter of what a step adds to tokens, compute, non_emb_compute and paper_compute
    line(metrics)       the evaluation's line of the record, once it is whole; the metrics themselves
    summary(means)      metrics of a progress line from the means of the losses since the last one; they themselves
    state()             what a checkpoint also holds: plain types and tensors
    always_save         save after every evaluation, not only after the best and the last

    The `with` closes the record, whatever ends the steps. It ends the process with status 1 at a loss that is not
    finite and with 128 + n at signal n, after saving.
    """

    def __init__(
        self, cfg, process, run, model, optimizer, meter, *,
        evaluate, headline, cost, line=dict, summary=dict, state=dict, always_save=True,
    ):  # fmt: skip
        self.cfg, self.process, self.world, self.run = cfg, process, process.world, run
        self.model, self.optimizer, self.meter = model, optimizer, meter
        self.evaluate, self.headline, self.cost, self.line, self.summary = evaluate, headline, cost, line, summary
        self.own_state, self.always_save = state, always_save
        self.step, self.best, self.counters, self.clock = 0, math.inf, Counter(), Clock(process.device)
        self.status, self.evaluated = "finished", None  # the step of the last evaluation that came to its end
        if run.saved:
            self._restore(run.saved)
        self.world.require_one_step(self.step)

    def state(self):
        """What a checkpoint holds, for any number of processes."""
        return dict(
            step=self.step,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state(),
            scaler=self.optimizer.scaler.state_dict(),
            best=self.best,
            evaluated=self.evaluated,
            counters=dict(self.counters),
            seconds=self.clock.read(),
            meter=self.meter.state(),
            **self.own_state(),
        )

    def _restore(self, saved):
        path = self.run.folder / "ckpt.pt"
        saved = {"evaluated": saved.get("step"), **saved}  # which the checkpoints of earlier versions do not tell
        for name in self.state():
            if name not in saved:
                raise BadInput(f"{path} has no {name}, which a resume needs")
        with reading(path):
            own = self.model.state_dict()
            load_weights(self.model, {name: held(t, like=own.get(name)) for name, t in saved["model"].items()}, path)
            self.optimizer.restore(saved["optimizer"])
            self.optimizer.scaler.load_state_dict(saved["scaler"])
            self.step, self.best, self.counters = saved["step"], saved["best"], Counter(saved["counters"])
            self.clock.seconds, self.evaluated = saved["seconds"], saved["evaluated"]
            self.meter.restore(saved["meter"], self.process.device)
        say(f"resuming {self.run.folder} at step {self.step}")

    def __enter__(self):
        cfg, processes = self.cfg, self.world.size
        if self.step > cfg.max_iters:
            raise BadInput(
                f"{self.run.folder} is at step {self.step}, max_iters is {cfg.max_iters}; a run goes on to more "
                "steps, one of fewer starts in another --out_dir"
            )
        total, non_embedding = self.model.num_params()
        self.run.start(device=self.process.device, parameters=(total, non_embedding), per_token=self._per_token)
        tokens = self.cost(self.step)["tokens"]
        say(
            f"{total:,} parameters ({non_embedding:,} without embeddings), {tokens:,} tokens a step, "
            + (f"{processes} times " if processes > 1 else "") + devices.device_name(self.process.device)
        )
        if cfg.compile:
            say("compiling the model: the first steps take a minute or so")
        return self

    def __iter__(self):
        cfg = self.cfg
        self.mark = (self.step, self.counters["tokens"], self.clock.seconds)
        self.clock.resume()
        compiles = cfg.compile  # in the first step, for a minute or so
        while True:
            last = self.step >= cfg.max_iters
            if (self.step % cfg.eval_interval == 0 or last) and self.evaluated != self.step:
                with contextlib.suppress(StopRequested):
                    self._evaluate()
            if last and self.evaluated == self.step:
                return
            if stop := self.world.signal(self.run.stop_requested):
                self._save()
                self.status = f"stopped: {stop}"
                return
            with self.run.leaving() if compiles else contextlib.nullcontext():
                yield self.step
            compiles = False
            self.meter.count += 1
            self.counters += self.cost(self.step)
            self.step += 1
            if self.step % cfg.log_interval == 0 or self.step == cfg.max_iters:
                self._progress()

    def __exit__(self, kind, error, trace):
        if isinstance(error, NonFinite):
            self.status = f"failed: {error}"
        elif isinstance(error, StopRequested):  # in the first step, which nothing is kept of
            self.status = f"stopped: {self.run.stop_requested}"
        elif error is not None:
            self.status = f"failed: {kind.__name__}: {error}"
        self.run.finish(self.status)
        if error is None or isinstance(error, NonFinite | StopRequested):
            self._leave()

    def _leave(self):
        """The end that all processes have come to."""
        end, _, why = self.status.partition(": ")
        if end == "stopped":
            saved = (self.run.folder / "ckpt.pt").exists()
            how = "go on with --init_from=resume" if saved else "begin again with the same command"
            say(f"{self.status} at step {self.step}; {how}")
        self.world.leave()
        if end == "failed":
            fail(f"{why}; {self.run.last_good()}", 1)
        if end == "stopped":
            sys.exit(128 + Signals[why])

    def _progress(self):
        cfg, device = self.cfg, self.process.device
        means, now = self.meter.read(), self._counted()
        (step, tokens, seconds), self.mark = self.mark, (self.step, now["tokens"], now["seconds"])
        elapsed = now["seconds"] - seconds
        rate = (now["tokens"] - tokens) / elapsed
        peak = devices.peak_flops(device, cfg.dtype, cfg.tf32)
        mfu = 6 * self._per_token.macs * rate / (peak * self.world.size) if peak else None
        norm = self.meter.gradient_norm.item()
        metrics = dict(
            self.summary(means),
            lr=self.optimizer.rate,
            grad_norm=norm if math.isfinite(norm) else None,
            tokens_per_s=rate,
            mfu=mfu,
        )
        self.run.log(**now, **metrics)
        eta = (cfg.max_iters - self.step) * elapsed / (self.step - step)
        words = [f"loss {next(iter(means.values())):.4f}", f"lr {metrics['lr']:.2e}", f"{rate:,.0f} tokens/s"]
        words += [f"MFU {mfu:.1%}"] if mfu else []
        say(f"step {self.step}/{cfg.max_iters}: {', '.join(words)}, ETA {format_time(eta)}")

    def evaluation(self):
        """The metrics of `evaluate`."""
        self.model.eval()
        try:
            with torch.no_grad():
                return self.evaluate()
        finally:
            self.model.train()

    def _evaluate(self):
        self.meter.check()
        with self.clock.paused(), self.run.leaving():
            found = self.evaluation()
        metrics = self.line(found)
        words, value = self.headline(metrics)
        if not math.isfinite(value):
            raise NonFinite(f"the evaluation at step {self.step} is not finite")
        say(f"step {self.step}/{self.cfg.max_iters}: {words}")
        self.run.log(**self._counted(), **metrics)
        self.evaluated = self.step
        improved, self.best = value < self.best, min(value, self.best)
        if self.step > 0 and (improved or self.always_save or self.step == self.cfg.max_iters):
            self._save(best=improved)

    def _counted(self):
        names = ("tokens", "compute", "non_emb_compute", "paper_compute")
        return dict(step=self.step, seconds=self.clock.read(), **{name: self.counters[name] for name in names})

    def _save(self, best=False):
        self.meter.check()
        self.run.save(self.world.whole(self.state()), best)

    @functools.cached_property
    def _per_token(self):
        """Multiply-adds a token of a full-length sequence, as a `Compute`."""
        T = self.model.block_size
        cost = self.model.compute(T)
        return type(cost)(*(n / T for n in cost))


class LossMeter:
    """Mean losses between two progress lines, and the first step at which something was not finite, kept on the device.

    Adding waits for nothing and works in place, so a CUDA graph can hold it. `count` is how many steps were added.
    `read`, `check` and `state` wait for the device and speak for all processes, which call them together; the first two
    raise NonFinite, in all of them, with the step. With `overflows`, as in float16, a gradient may be infinite: that
    step is skipped.
    """

    def __init__(self, world, overflows=False):
        self.world, self.overflows = world, overflows
        self.totals, self.count, self.first_bad, self.gradient_norm = {}, 0, {}, None

    def add(self, losses, step, weight):
        """Losses of a micro-batch, `weight` of what this process computes of the step; `step` may be a tensor."""
        for i, (name, value) in enumerate(losses.items()):
            value = value.detach().float()
            if name not in self.totals:
                self.totals[name] = torch.zeros_like(value)
            self.totals[name] += value * weight
            if i == 0:
                self._watch(value, step, "loss")

    def add_gradient_norm(self, norm, step):
        self.gradient_norm = norm
        if not self.overflows:
            self._watch(norm, step, "gradient")

    def _watch(self, value, step, what):
        """Note the first step at which `value` is not finite."""
        first = torch.where(torch.isfinite(value), NEVER, step)
        earlier = self.first_bad.setdefault(what, first)
        torch.minimum(earlier, first, out=earlier)

    def check(self):
        bad = [(int(self.world.least(step)), what) for what, step in self.first_bad.items()]
        step, what = min(bad, key=lambda item: item[0], default=(NEVER, None))
        if step < NEVER:
            raise NonFinite(f"the {what} is not finite at step {step}")

    def read(self):
        """The means since the last reading."""
        self.check()
        means = {name: total.item() / self.count for name, total in self.state()["totals"].items()}
        for total in self.totals.values():
            total.zero_()
        self.count = 0
        return means

    def state(self):
        return dict(totals={name: self.world.mean(total) for name, total in self.totals.items()}, count=self.count)

    def restore(self, state, device):
        self.totals = {name: total.to(device) for name, total in state["totals"].items()}
        self.count = state["count"]


class Clock:
    """Training seconds, evaluation left out; the device is waited for before the time is read."""

    def __init__(self, device, seconds=0.0):
        self.device, self.seconds, self._since = device, seconds, None

    def read(self):
        devices.synchronise(self.device)
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
            self._since = now
        return self.seconds

    def resume(self):
        devices.synchronise(self.device)
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        self.read()
        self._since = None
        try:
            yield
        finally:
            self.resume()


def counted(cost, sequences, length):
    """The Counter of a step of `sequences` of `length` tokens, each of them costing the `Compute` given."""
    return Counter(
        tokens=sequences * length,
        compute=6 * sequences * cost.macs,
        non_emb_compute=6 * sequences * cost.non_emb,
        paper_compute=sequences * cost.paper,
    )


def format_time(seconds):
    """12345 -> 3h25m; under an hour 25m45s."""
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{int(seconds) % 60:02d}s"
