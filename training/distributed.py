"""Several processes that train one model: who computes which part of a batch, and what they tell each other.

    torchrun --nproc_per_node=8 train.py config/struct_configs/train_struct_gpt2.py
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ..
    MASTER_ADDR=HOST MASTER_PORT=29500 srun --ntasks-per-node=8 --gpus-per-node=8 python train.py ..

Every process computes its share of each step; the settings' batch is that of all processes together. Each holds the
whole model (DistributedDataParallel) or, with --fsdp=True, its part of every parameter and of AdamW's moments (FSDP2).
Data and dropout are functions of (seed, step, place in that batch), evaluations are summed in one order, and a
checkpoint holds nothing of a single process: a resume may change their number, and fsdp. A process on its own has
nobody to ask, and each method gives back what it was given.
"""

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from signal import Signals

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from model import Block
from training.devices import pick_device
from training.errors import BadInput
from training.launched import place

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}  # device type: what "auto" takes


@dataclass(frozen=True)
class Share:
    """What a process computes of a step: these of its micro-batches, and of each of them these rows."""

    micro_batches: range
    rows: slice


@dataclass(frozen=True)
class World:
    """All processes, as one of them sees them: its rank among `size`, and its number among those of its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls, env=os.environ):
        """As torchrun or srun started this process."""
        return cls(*place(env))

    def share(self, micro_batches, rows):
        """This process's part of a step of `micro_batches` times `rows`. BadInput if neither can be divided."""
        if micro_batches % self.size == 0:
            n = micro_batches // self.size
            return Share(range(self.rank * n, (self.rank + 1) * n), slice(0, rows))
        if rows % self.size == 0:
            n = rows // self.size
            return Share(range(micro_batches), slice(self.rank * n, (self.rank + 1) * n))
        raise BadInput(
            f"{self.size} processes divide neither gradient_accumulation_steps {micro_batches} nor batch_size {rows}; "
            "the settings' batch is that of all processes together"
        )

    def part(self, count):
        """This process's numbers among 0 .. count - 1; the last one again where other processes have one more.

        A network in shards answers only when all processes ask, so all ask equally often.
        """
        return [min(number, count - 1) for number in range(self.rank, count + self.rank, self.size)]

    def collect(self, rows):
        """The rows of a tensor, each as the process computed it whose `part` its number is."""
        own = torch.zeros_like(rows)
        own[self.rank :: self.size] = rows[self.rank :: self.size]
        return self.reduce(own)

    def device(self, name):
        """The device of a setting; with several processes, "cuda" is the GPU of this one's number on its node."""
        if self.size == 1:
            return pick_device(name)
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name not in BACKENDS:
            raise BadInput(f"device is '{name}'; {self.size} processes take cpu, or cuda: each the GPU of its number")
        if name == "cuda" and self.local_size > (gpus := torch.cuda.device_count()):
            raise BadInput(
                f"{self.local_size} processes on a node and {gpus} GPUs to be seen there; start one process for each "
                "GPU (srun: with --gpus-per-node, not --gpus-per-task)"
            )
        device = pick_device(f"cuda:{self.local_rank}" if name == "cuda" else name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def join(self, device, backend, fsdp):
        """Meet the other processes. From here on only the first one speaks on stdout."""
        if backend not in ("auto", *BACKENDS.values()):
            raise BadInput(f"no backend '{backend}', there are auto, {', '.join(BACKENDS.values())}")
        if backend == "nccl" and device.type != "cuda":
            raise BadInput(f"backend nccl needs GPUs, the device is {device.type}; take gloo or auto")
        if self.size == 1:
            if fsdp:
                raise BadInput(
                    "fsdp divides a model among processes, and there is one; start several, one for each GPU: "
                    "torchrun --nproc_per_node=8 train.py .. --fsdp=True"
                )
            return
        chosen = BACKENDS[device.type] if backend == "auto" else backend
        # beside nccl, gloo for flags: they stay on the CPU, and asking for one does not wait for the GPU
        backends = "cpu:gloo,cuda:nccl" if chosen == "nccl" else chosen
        dist.init_process_group(backends, rank=self.rank, world_size=self.size)
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends

    def leave(self):
        """Wait for the others, so that nobody's end looks like a failure while the first still writes.

        The group is left to the end of the process: DDP holds it, too, and taking gloo's apart while one of its threads
        lets go of a tensor (`reduce`) can hang.
        """
        self.reduce(torch.zeros(1))

    def wrap(self, network, device):
        """The network whose gradients are means over all processes."""
        if self.size == 1:
            return network
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    def shard(self, model, device, compiled):
        """The model as such a network, each process holding its part of every parameter; blocks are `compiled`.

        Make the optimizer after this. A block's weights are put together while it computes and no longer.
        """
        from torch.distributed.device_mesh import init_device_mesh  # FSDP2 takes long to import: only where it is used
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        for block in [m for m in model.modules() if isinstance(m, Block)]:
            block.forward = compiled(block.forward)
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def whole(self, state):
        """A state as a checkpoint holds it: every tensor on the CPU, shards put together by all processes.

        The processes after the first, which write nothing, have None for them.
        """

        def on_cpu(tensor):
            if hasattr(tensor, "full_tensor"):  # a shard
                tensor = tensor.full_tensor().clone()  # it may be part of a larger one, which is left
            return None if self.rank else tensor.cpu()

        return tree_map_only(torch.Tensor, on_cpu, state)

    def accumulating(self, network, last):
        """The context of a micro-batch; gradients cross the network in the `last` one of a step only.

        Until then they are whole in every process, with shards too.
        """
        if hasattr(network, "set_requires_gradient_sync"):  # a network in shards
            network.set_requires_gradient_sync(last)
        elif self.size > 1 and not last:
            return network.no_sync()
        return contextlib.nullcontext()

    def reduce(self, tensor, op=dist.ReduceOp.SUM):
        """The sum, or another `op`, of every process's tensor.

        Gloo's thread lets go of the tensor after the sum is known, for which it takes Python's lock; a process that
        ends in that moment is aborted (pytorch/pytorch#190489), so the tensor is given out when it is ours alone.
        """
        if self.size > 1:
            tensor = tensor.clone()
            ours = sys.getrefcount(tensor)
            dist.all_reduce(tensor, op)
            while tensor.is_cpu and sys.getrefcount(tensor) > ours:
                time.sleep(0)  # Python's lock is free
        return tensor

    def mean(self, tensor):
        return self.reduce(tensor) / self.size

    def least(self, tensor):
        return self.reduce(tensor, dist.ReduceOp.MIN)

    def signal(self, name):
        """The name of a signal that any process was sent, or None; the same answer for all."""
        if self.size == 1:
            return name
        number = Signals[name].value if name else 0
        number = self.reduce(torch.tensor(number), dist.ReduceOp.MAX).item()
        return Signals(number).name if number else None

    def require_one_step(self, step):
        """BadInput where the processes would go on from different checkpoints."""
        steps = torch.zeros(self.size, dtype=torch.long)
        steps[self.rank] = step
        steps = self.reduce(steps).tolist()
        if len(set(steps)) > 1:
            raise BadInput(f"the processes start at steps {steps}; out_dir must be one folder that all of them see")


def held(tensor, like):
    """A whole tensor as this process holds `like`: its part, where that is in shards and of the same shape."""
    if not hasattr(like, "placements") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
