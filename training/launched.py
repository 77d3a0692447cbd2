"""Which of several processes this is, as torchrun or SLURM started it: read from the environment, without PyTorch."""

import os
import re
from typing import NamedTuple


class Place(NamedTuple):
    """A process's rank among `size`, and its number among those of its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place(env=os.environ):
    """From the variables of torchrun, or those of srun where MASTER_ADDR says that its tasks belong together."""
    if "WORLD_SIZE" in env:
        return Place(*(int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    if "MASTER_ADDR" in env and "SLURM_STEP_NUM_TASKS" in env:
        rank, size, local_rank = (int(env[f"SLURM_{n}"]) for n in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
        on_first_node = re.match(r"\d+", env["SLURM_STEP_TASKS_PER_NODE"])[0]  # "4(x2)": 4 on each of 2
        return Place(rank, size, local_rank, int(on_first_node))
    return Place()
