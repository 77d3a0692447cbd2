"""The training loop, once: steps, progress lines, evaluations, checkpoints, clean stops, exact resumes.

A script subclasses `Experiment` and says what a loss and an evaluation are. A step's learning rate and data are
functions of its number, and so is dropout; everything else that a resume needs is in the checkpoint. With several
processes (training/distributed.py) all of them run this loop, each on its share of the batch; the first one writes.
"""

import functools
import math
import sys
from collections import Counter
from signal import Signals

import torch
from torch.nn.utils import clip_grad_norm_

from structured.functional import check_device
from training import capture, devices
from training.distributed import World, held
from training.errors import BadInput, fail
from training.mup import adamw, initialise
from training.run import Clock, Follower, Run, load_weights

NEVER = torch.iinfo(torch.long).max  # the step at which nothing went wrong


class NonFinite(RuntimeError):
    """The loss, its gradient or an evaluation is NaN or infinite."""


class Experiment:
    """A model in training. Subclasses define

    loss(step, micro)   dict of scalar tensors for the rows self.share.rows of a micro-batch; the first is minimised
                        or, for steps that can be replayed as a CUDA graph (training/capture.py), its two halves:
                        inputs(step), tensors whose shapes are the same at every step where self.fixed_shapes is true,
                        as many for each of self.share.micro_batches, one micro-batch's after the other's, and
                        losses(network, *inputs of a micro-batch), the dict, by self.network or its like
    evaluate()          dict of metrics, the same in every process
    lr_factor(step)     share of the peak learning rate
    step_cost(step)     Counter of what a step adds to tokens, compute, non_emb_compute and paper_compute
    summary(means)      metrics of a progress line from the means of the losses since the last one
    headline(metrics)   the evaluation's words in the progress output, and the number that "best" compares

    cfg has max_iters, eval_interval, batch_size, perhaps gradient_accumulation_steps and cuda_graph, and the fields of
    RunSettings.
    """

    def __init__(self, cfg, command, build_model, peak_lr):
        self.cfg, self.peak_lr = cfg, peak_lr
        self.world = World.from_environment()
        self.micro_batches = getattr(cfg, "gradient_accumulation_steps", 1)
        self.share = self.world.share(self.micro_batches, cfg.batch_size)
        self.device = self.world.device(cfg.device)
        self.context = functools.partial(devices.autocast, self.device, cfg.dtype)
        self.context()  # an unknown dtype is refused before anything is written
        check_device(getattr(cfg, "attention_backend", "auto"), self.device)
        choice = getattr(cfg, "cuda_graph", "False")
        graph = capture.wanted(choice, self.device, cfg.dtype, self.world.size)
        devices.allow_tf32(cfg.tf32)
        self.run = (Follower if self.world.rank else Run)(cfg, command)
        self.world.join(self.device, cfg.backend, cfg.fsdp)
        torch.manual_seed(cfg.seed)
        self.model = build_model().to(self.device)
        initialise(self.model)
        compiled = devices.compiler(cfg)
        if cfg.fsdp:
            self.network = self.world.shard(self.model, self.device, compiled)
        else:
            self.network = self.world.wrap(compiled(self.model), self.device)
        betas = (cfg.beta1, cfg.beta2)
        self.optimizer = adamw(
            self.model, peak_lr, weight_decay=cfg.weight_decay, betas=betas, device_type=self.device.type
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.dtype == "float16")
        self.static_step = capture.StaticStep(self._static_update, self.device) if graph else None
        self.fixed_shapes = graph or cfg.compile
        self.cost = functools.cache(self.model.compute)  # of a sequence of T tokens: counted once, asked every step
        self.step, self.best, self.counters, self.clock = 0, math.inf, Counter(), Clock(self.device)
        self.meter, self.rate_factor = LossMeter(self.world), None  # the share of the peak rates that is set
        if self.run.saved:
            self._restore(self.run.saved)
        self.world.require_one_step(self.step)

    def state(self):
        """What a checkpoint holds, plain types and tensors, for any number of processes. Subclasses may add to it."""
        return dict(
            step=self.step,
            model=alone(self.model.state_dict()),
            optimizer=portable(self.optimizer.state_dict()),
            scaler=self.scaler.state_dict(),
            best=self.best,
            counters=dict(self.counters),
            seconds=self.clock.read(),
            meter=self.meter.state(),
        )

    def _restore(self, saved):
        path = self.run.folder / "ckpt.pt"
        for name in self.state():
            if name not in saved:
                raise BadInput(f"{path} has no {name}, which a resume needs")
        own = self.model.state_dict()
        load_weights(self.model, {name: held(t, like=own.get(name)) for name, t in saved["model"].items()}, path)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            i: {name: held(t, like=parameters[i]) for name, t in state.items()}
            for i, state in saved["optimizer"]["state"].items()
        }
        own = self.optimizer.state_dict()["param_groups"]  # functions of the settings, and of where this run computes
        self.optimizer.load_state_dict(dict(state=moments, param_groups=own))
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.best, self.counters = saved["step"], saved["best"], Counter(saved["counters"])
        self.clock.seconds = saved["seconds"]
        self.meter.restore(saved["meter"], self.device)
        print(f"resuming {self.run.folder} at step {self.step}", flush=True)

    def fit(self):
        """Train to max_iters. Ends the process with status 1 at a loss that is not finite, 128 + n at signal n."""
        for _ in self.training():
            pass

    def training(self):
        """`fit`, a step at a time: it does nothing until asked for the next one."""
        if self.step > self.cfg.max_iters:
            raise BadInput(
                f"{self.run.folder} is at step {self.step}, max_iters is {self.cfg.max_iters}; a run goes on to more "
                "steps, one of fewer starts in another --out_dir"
            )
        total, non_embedding = self.model.num_params()
        tokens = self.step_cost(self.step)["tokens"]
        per_token, processes = self.per_token(), self.world.size
        self.run.start(
            device=self.device, processes=processes, parameters=(total, non_embedding), per_token=per_token
        )
        print(
            f"{total:,} parameters ({non_embedding:,} without embeddings), {tokens:,} tokens a step, "
            + (f"{processes} times " if processes > 1 else "") + devices.device_name(self.device)
        )
        if self.cfg.compile:
            print("compiling the model: the first steps take a minute or so", flush=True)
        status = "failed"
        try:
            status = yield from self._loop()
        except NonFinite as error:
            status = f"failed: {error}"
        except BaseException as error:
            status = f"failed: {type(error).__name__}: {error}"
            raise
        finally:
            self.run.finish(status)
        self._exit(status)

    def _exit(self, status):
        """The end that all processes have come to."""
        end, _, why = status.partition(": ")
        if end == "stopped":
            print(f"{status} at step {self.step}; go on with --init_from=resume", flush=True)
        self.world.leave()
        if end == "failed":
            fail(f"{why}; {self.run.last_good()}", 1)
        if end == "stopped":
            sys.exit(128 + Signals[why])

    def _loop(self):
        cfg, first = self.cfg, self.step
        fresh = self.run.saved is None
        self.mark = (self.step, self.counters["tokens"], self.clock.seconds)
        self.clock.resume()
        while True:
            last = self.step >= cfg.max_iters
            if (self.step % cfg.eval_interval == 0 or last) and (fresh or self.step > first):
                self._evaluate()
            if last:
                return "finished"
            if stop := self.world.signal(self.run.stop_requested):
                self._save()
                return f"stopped: {stop}"
            self._train_step()
            yield  # where a pack (training/together.py) makes the step
            if self.step % cfg.log_interval == 0 or self.step == cfg.max_iters:
                self._progress()

    def _train_step(self):
        self._set_learning_rates()
        if self.static_step:
            self._seed_dropout(0)
            step = torch.full((), self.step, device=self.device)
            self.static_step(step, *self.inputs(self.step))
        else:
            self._update()
        self.meter.count += 1
        self.counters += self.step_cost(self.step)
        self.step += 1

    def _set_learning_rates(self):
        factor = self.lr_factor(self.step)
        if factor == self.rate_factor:
            return
        self.rate_factor = factor
        for group in self.optimizer.param_groups:
            rate = group["peak_lr"] * factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _seed_dropout(self, micro):
        if getattr(self.cfg, "dropout", 0):
            devices.seed_dropout(self.device, self.cfg.seed, self.step, micro, self.share.rows.start)

    def _update(self):
        """The ordinary step: this process's micro-batches, one after the other."""
        mine = self.share.micro_batches
        for micro in mine:
            self._seed_dropout(micro)
            with self.world.accumulating(self.network, last=micro == mine[-1]):
                with self.context():
                    losses = self.loss(self.step, micro)
                self._backward(losses, self.step, 1 / len(mine))
        self.descend(self.step)

    def _static_update(self, step, *inputs):
        """The same on tensors that keep their places, of which `step` is one.

        Dropout is seeded before the first micro-batch and goes on in the others: nothing is seeded inside a graph.
        """
        parts = self.by_micro_batch(inputs)
        for part in parts:
            with self.context():
                losses = self.losses(self.network, *part)
            self._backward(losses, step, 1 / len(parts))
        self.descend(step)

    def loss(self, step, micro):
        part = self.by_micro_batch(self.inputs(step))[micro - self.share.micro_batches.start]
        return self.losses(self.network, *part)

    def by_micro_batch(self, inputs):
        n = len(inputs) // len(self.share.micro_batches)
        return [inputs[i : i + n] for i in range(0, len(inputs), n)]

    def _backward(self, losses, step, weight):
        objective = next(iter(losses.values())) * weight
        self.scaler.scale(objective).backward()
        self.meter.add(losses, step, weight)

    def descend(self, step):
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip or math.inf)
        self.grad_norm = norm.full_tensor() if self.cfg.fsdp else norm
        if not self.scaler.is_enabled():  # which skips a step whose gradient overflows
            self.meter.watch(self.grad_norm, step, "gradient")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _progress(self):
        cfg = self.cfg
        means, now = self.meter.read(), self._counted()
        (step, tokens, seconds), self.mark = self.mark, (self.step, now["tokens"], now["seconds"])
        elapsed = now["seconds"] - seconds
        rate = (now["tokens"] - tokens) / elapsed
        peak = devices.peak_flops(self.device, cfg.dtype, cfg.tf32)
        mfu = 6 * self.per_token().macs * rate / (peak * self.world.size) if peak else None
        metrics = dict(
            self.summary(means),
            lr=self.peak_lr * self.lr_factor(self.step - 1),
            grad_norm=norm if math.isfinite(norm := self.grad_norm.item()) else None,
            tokens_per_s=rate,
            mfu=mfu,
        )
        self.run.log(**now, **metrics)
        eta = (cfg.max_iters - self.step) * elapsed / (self.step - step)
        words = [f"loss {next(iter(means.values())):.4f}", f"lr {metrics['lr']:.2e}", f"{rate:,.0f} tokens/s"]
        words += [f"MFU {mfu:.1%}"] if mfu else []
        print(f"step {self.step}/{cfg.max_iters}: {', '.join(words)}, ETA {format_time(eta)}", flush=True)

    def _evaluate(self):
        self.meter.check()
        with self.clock.paused():
            self.model.eval()
            with torch.no_grad():
                metrics = self.evaluate()
            self.model.train()
        words, value = self.headline(metrics)
        if not math.isfinite(value):
            raise NonFinite(f"the evaluation at step {self.step} is not finite")
        print(f"step {self.step}/{self.cfg.max_iters}: {words}", flush=True)
        self.run.log(**self._counted(), **metrics)
        improved, self.best = value < self.best, min(value, self.best)
        if self.step > 0 and (improved or getattr(self.cfg, "always_save_checkpoint", True)):
            self._save()

    def _counted(self):
        names = ("tokens", "compute", "non_emb_compute", "paper_compute")
        return dict(step=self.step, seconds=self.clock.read(), **{name: self.counters[name] for name in names})

    def _save(self):
        self.meter.check()
        self.run.save(self.world.whole(self.state()))

    def per_token(self):
        """Multiply-adds a token of a full-length sequence, as a `Compute`."""
        T = self.model.block_size
        cost = self.cost(T)
        return type(cost)(*(n / T for n in cost))


class LossMeter:
    """Mean losses between two progress lines, and the first step at which something was not finite, kept on the device.

    Adding waits for nothing and works in place, so a CUDA graph can hold it. `count` is how many steps were added.
    `read`, `check` and `state` wait for the device and speak for all processes, which call them together; the first two
    raise NonFinite, in all of them, with the step.
    """

    def __init__(self, world):
        self.world = world
        self.totals, self.count, self.first_bad = {}, 0, {}

    def add(self, losses, step, weight):
        """Losses of a micro-batch, `weight` of what this process computes of the step; `step` may be a tensor."""
        for i, (name, value) in enumerate(losses.items()):
            value = value.detach().float()
            if name not in self.totals:
                self.totals[name] = torch.zeros_like(value)
            self.totals[name] += value * weight
            if i == 0:
                self.watch(value, step, "loss")

    def watch(self, value, step, what):
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


def alone(state):
    """Tensors that are parts of larger ones as copies: saving a part writes the whole."""
    return {name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in state.items()}


def portable(optimizer_state):
    """An optimizer's state with learning rates as numbers, which on a GPU are tensors."""
    groups = [dict(group, lr=float(group["lr"])) for group in optimizer_state["param_groups"]]
    return dict(optimizer_state, param_groups=groups)


def format_time(seconds):
    """12345 -> 3h25m; under an hour 25m45s."""
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{int(seconds) % 60:02d}s"
