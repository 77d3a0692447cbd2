"""The prompts of training, step by step, made for many steps at a time."""

import torch

from data.icl_regression.sampler import sample_prompts, training_examples

BLOCK_STEPS = 64
CACHE_BYTES, GPU_BYTES = 2**19, 2**23  # of x in a block: what a CPU caches; what is worth many small kernels


class PromptStream:
    """Prompts of consecutive steps. Making them takes some 400 small operations, on a GPU nearly as long for many steps
    as for one: those of up to BLOCK_STEPS steps of one size are made at once, and a step takes its slice.

    A block is a function of the steps it holds: there is nothing to save, and no prompt depends on which steps share a
    block. pool: seed, batch_size and pool_size, as `training_examples` takes them. task: the keywords of
    `sample_prompts`. n_steps: from this step on nothing is made in advance. rows: those of each batch to make.
    full_points: how many points every prompt has, whatever the curriculum says; None: as many as it says. predicted:
    the points of a prompt whose y are predicted. Making a block takes several times its bytes for a moment.
    """

    def __init__(
        self, curriculum, pool, task, n_steps, *,
        rows=slice(None), full_points=None, predicted=slice(None), device=None,
    ):  # fmt: skip
        self.curriculum, self.pool, self.task, self.n_steps = curriculum, pool, task, n_steps
        self.rows, self.full_points, self.predicted = rows, full_points, predicted
        self.device = torch.device(device or "cpu")
        self.steps, self.block = range(0), None

    def at(self, step):
        """x (B, points, n_dims), y (B, points) and the weight of every predicted point.

        The weight is 1/n for the n of them that the curriculum has reached, 0 for those after them.
        """
        if step not in self.steps:
            self.block = None  # before the next one takes its memory
            self.steps = range(step, step + self._count(step))
            self.block = self._make(self.steps)
        x, y, weight = self.block
        return x[step - self.steps.start], y[step - self.steps.start], weight

    def _count(self, step):
        """How many steps share the block that begins at `step`."""
        size = self.curriculum.at(step)
        points, n_rows = self.full_points or size[1], len(range(self.pool["batch_size"])[self.rows])
        fit = (CACHE_BYTES if self.device.type == "cpu" else GPU_BYTES) // (4 * n_rows * points * self.task["n_dims"])
        most = max(1, min(BLOCK_STEPS, fit, self.n_steps - step))
        return next((n for n in range(1, most) if self.curriculum.at(step + n) != size), most)

    def _make(self, steps):
        dims, points = self.curriculum.at(steps.start)
        made = self.full_points or points
        numbers = torch.arange(steps.start, steps.stop, device=self.device)
        examples = training_examples(step=numbers, device=self.device, **self.pool)[:, self.rows]
        prompts = dict(examples=examples.flatten(), n_points=made, dims=dims, seed=self.pool["seed"])
        x, y = sample_prompts(**prompts, **self.task)
        places = torch.arange(made, device=self.device)[self.predicted]
        weight = (places < points) / len(range(points)[self.predicted])
        return x.unflatten(0, examples.shape), y.unflatten(0, examples.shape), weight
