"""What a run computes with: this process among those that train together, its device, its precision, its share."""

import contextlib

import torch

from structured.functional import check_device
from training import capture, devices
from training.distributed import World
from training.mup import initialise


class Process:
    """This process's part of a run. Making one refuses what cannot be, before anything is written.

    cfg: settings with the fields of RunSettings, batch_size and dropout. micro_batches: how many a step has, of all
    processes together. cuda_graph: "auto", "True" or "False", whether `captured` records the step. attention_backend:
    the kernels of attention, which have to run on the device.

    share: the micro-batches of a step, and the rows of each, that are this process's. fixed_shapes: whether the inputs
    of a step need the same shapes at every step, since it is compiled or recorded.
    """

    def __init__(self, cfg, *, micro_batches=1, cuda_graph="False", attention_backend="auto"):
        self.cfg, self.world = cfg, World.from_environment()
        self.share = self.world.share(micro_batches, cfg.batch_size)
        self.device = self.world.device(cfg.device)
        self.autocast()  # which refuses a dtype that it does not know
        check_device(attention_backend, self.device)
        self.records = capture.wanted(cuda_graph, self.device, cfg.dtype, self.world.size)
        self.fixed_shapes = self.records or cfg.compile
        devices.allow_tf32(cfg.tf32)

    def join(self):
        """Meet the other processes; from here on only the first one prints."""
        self.world.join(self.device, self.cfg.backend, self.cfg.fsdp)

    def initialised(self, build, mup=True):
        """The model that `build` gives, on the device, its weights drawn from the run's seed (training/mup.py)."""
        torch.manual_seed(self.cfg.seed)
        model = build().to(self.device)
        initialise(model, mup)
        return model

    def network(self, model):
        """The model as a step calls it: compiled if that is asked for, with gradients that are means over processes.

        With fsdp the model's parameters are in shards from here on, so the optimizer is made after this.
        """
        compiled = devices.compiler(self.cfg)
        if self.cfg.fsdp:
            return self.world.shard(model, self.device, compiled)
        return self.world.wrap(compiled(model), self.device)

    def autocast(self):
        """The context of a forward pass in the run's dtype."""
        return devices.autocast(self.device, self.cfg.dtype)

    @contextlib.contextmanager
    def micro_batch(self, network, step, micro):
        """The context of the forward and backward passes of one of this process's micro-batches.

        What dropout draws is a function of (seed, step, micro-batch, first row); a recorded step, in which nothing can
        be seeded, draws on from its first micro-batch (`captured`). Gradients cross to the other processes in the last.
        """
        if not self.records:
            self._seed_dropout(step, micro)
        with self.world.accumulating(network, last=micro == self.share.micro_batches[-1]):
            yield

    def captured(self, train_step):
        """`train_step(step, *tensors)` as a run takes it: as one CUDA graph where that was wanted.

        A recorded step gets its number as a tensor, and every tensor in the same memory at every step.
        """
        if not self.records:
            return train_step
        static = capture.StaticStep(train_step, self.device)

        def replayed(step, *inputs):
            self._seed_dropout(step, 0)
            static(torch.full((), step, device=self.device), *inputs)

        return replayed

    def _seed_dropout(self, step, micro):
        if self.cfg.dropout:
            devices.seed_dropout(self.device, self.cfg.seed, step, micro, self.share.rows.start)
