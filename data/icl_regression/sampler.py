"""Prompts from their numbers: the training pool, the fixed evaluation set, and the tokens of a prompt."""

import difflib

import torch

from data.icl_regression.philox import bits, normal
from data.icl_regression.tasks import QUERY_TASKS, TASKS, Purpose
from training.errors import BadInput

EVALUATION_SEED = 2022
EVALUATION_BIT = 2**63  # set in the Philox key of evaluation prompts, clear in that of training prompts
PERMUTATION_ROUNDS = 24
NO_NOISE = {  # task: why its y takes no noise
    "linear_classification": "has the labels -1 and 1",
    "noisy_recall": "has its noise in the query",
}
LEAST = {"query_noise": 0}  # of an option; of the others 1


def sample_prompts(task, seed, examples, n_dims, n_points, dims=None, noise_std=0.0, *, device=None, **options):
    """Prompts of the training pool: x float32 (B, n_points, n_dims) and y float32 (B, n_points).

    task: a name in TASKS or QUERY_TASKS. examples: int64 tensor (B,) of example numbers; a prompt is a function of
    (seed, example) alone, whatever else is in the batch, and fewer points are a prefix of more. x ~ N(0, I/dims) on the
    first `dims` coordinates (default all; the same draws for every `dims`, rescaled) and 0 on the rest. A task of
    QUERY_TASKS makes its x out of these and ends in the query. noise_std: standard deviation of Gaussian noise added to
    y from a stream of its own. options: keywords of the task (`sparsity`, `hidden`, `depth`, `query_noise`). device:
    where the prompts are made, by default where `examples` are.

    Raises BadInput for an unknown task, a seed outside [0, 2^63), dims outside 1 .. n_dims, n_points or an option
    below its least value, negative noise, noise on linear_classification, whose targets are the labels -1 and 1
    (Garg et al. flip none either), or on noisy_recall.
    """
    if not 0 <= seed < EVALUATION_BIT:
        raise BadInput(f"a seed is an integer from 0 to 2^63 - 1, got {seed}")
    return _prompts(task, seed, examples.to(device), n_dims, n_points, dims, noise_std, options)


def evaluation_prompts(
    task, first, count, n_dims, n_points, dims=None, noise_std=0.0, *, seed=EVALUATION_SEED, device=None, **options
):
    """Prompts first .. first + count - 1 of the evaluation set, which no training prompt shares, whatever its seed.

    Their Philox key has a bit that training keys never have. The set depends on neither the training seed nor the
    batch size it is read in. Everything else as for `sample_prompts`.
    """
    if not 0 <= seed < EVALUATION_BIT:
        raise BadInput(f"a seed is an integer from 0 to 2^63 - 1, got {seed}")
    examples = torch.arange(first, first + count, device=device)
    return _prompts(task, seed + EVALUATION_BIT, examples, n_dims, n_points, dims, noise_std, options)


def _prompts(task, seed, examples, n_dims, n_points, dims, noise_std, options):
    dims = n_dims if dims is None else dims
    tasks = TASKS | QUERY_TASKS
    if task not in tasks:
        near = difflib.get_close_matches(task, tasks, n=1)
        raise BadInput(f"no task '{task}'" + (f", did you mean '{near[0]}'?" if near else f"; choose from {[*tasks]}"))
    if not 1 <= dims <= n_dims:
        raise BadInput(f"dims must be from 1 to n_dims = {n_dims}, got {dims}")
    if n_points < 1:
        raise BadInput(f"a prompt has at least 1 point, got {n_points}")
    if noise_std < 0:
        raise BadInput(f"noise_std must not be negative, got {noise_std}")
    if noise_std > 0 and task in NO_NOISE:
        raise BadInput(f"{task} {NO_NOISE[task]}, noise_std must be 0, got {noise_std}")
    for name, value in options.items():
        if value < (least := LEAST.get(name, 1)):
            raise BadInput(f"{name} must be at least {least}, got {value}")
    x = normal(seed, examples, Purpose.X, (n_points, n_dims)) * dims**-0.5
    x[..., dims:] = 0
    if task in QUERY_TASKS:
        return QUERY_TASKS[task](x, dims, seed, examples, **options)
    y = TASKS[task](x, dims, seed, examples, **options)
    if noise_std > 0:
        y = y + noise_std * normal(seed, examples, Purpose.NOISE, (n_points,))
    return x, y


def training_examples(seed, step, batch_size, pool_size=None, device=None):
    """The examples of training steps: int64 (*step.shape, batch_size) in [0, pool_size), all different within a step.

    A pure function of (seed, step). Without a pool every step has examples of its own, numbered on and on, so that no
    prompt ever comes twice. Each epoch is a keyed permutation of the pool, cut into pool_size // batch_size
    batches; the remainder (other examples each epoch) is left out, so no batch straddles two epochs. Within an epoch no
    example comes twice. The original draws each batch afresh (distinct inside a batch, repeated between batches), which
    in 500,000 steps of 64 from 32,000,064 sees 63% of the pool; ours repeats none.

    step: int, or an int64 tensor on `device`, of one step (which a captured CUDA graph can read anew) or of many: a
    thousand steps take little longer than one. Raises BadInput unless 1 <= batch_size <= pool_size <= 2^62.
    """
    step = torch.zeros((), dtype=torch.int64, device=device) + step
    if pool_size is None:
        return step[..., None] * batch_size + torch.arange(batch_size, device=device)
    if not 1 <= batch_size <= pool_size <= 2**62:
        raise BadInput(
            f"a batch of {batch_size} different examples needs a pool of at least that many (and at most 2^62), "
            f"training_num_training_examples = {pool_size}"
        )
    steps_per_epoch = pool_size // batch_size
    keys = bits(seed, (step // steps_per_epoch).flatten(), Purpose.ORDER, 4 * PERMUTATION_ROUNDS)
    places = (step % steps_per_epoch * batch_size).view(-1, 1) + torch.arange(batch_size, device=device)
    return _permute(places, keys.unflatten(1, (PERMUTATION_ROUNDS, 4)), pool_size).view(*step.shape, batch_size)


def _permute(places, keys, size):
    """A keyed permutation of 0 .. size - 1 for each row, at `places` (n, batch); keys: 32-bit words (n, rounds, 4).

    A Feistel network permutes a power of two and has to walk until it lands below `size`, an unknown number of times.
    Here each round is a permutation for any size: the numbers below the largest power of two in `size`, more than half
    of all, are mixed among themselves (odd multiplier, offset, xor with a right shift), then all are rotated by a
    random amount. The work is fixed, and nothing is read back to the host. 8 rounds leave neighbours correlated where
    only half of the numbers are mixed in each; at 24 rounds nothing is left to see in 131,072 consecutive places.
    """
    n_bits = size.bit_length() - 1
    for round_keys in keys[..., None].unbind(1):
        multiplier, offset, high, low = round_keys.unbind(1)  # each (n, 1)
        mixed = (places * (multiplier | 1) + offset) & (2**n_bits - 1)
        mixed = mixed ^ (mixed >> (n_bits + 1) // 2)
        places = torch.where(places < 2**n_bits, mixed, places)
        places = (places + (high << 30) + low) % size
    return places


def interleave(x, y):
    """Prompts as tokens x_1, (y_1, 0, .., 0), x_2, ..: (B, points, n_dims), (B, points) -> (B, 2 points, n_dims)."""
    B, points, n_dims = x.shape
    tokens = x.new_zeros(B, 2 * points, n_dims)
    tokens[:, 0::2] = x
    tokens[:, 1::2, 0] = y
    return tokens


def pairs_and_query(x, y):
    """Prompts as tokens (x_1, y_1, 1), .., and the query (x_n, 0, 0): (B, n, n_dims), (B, n) -> (B, n, n_dims + 2)."""
    tokens = torch.cat((x, y[..., None], torch.ones_like(y)[..., None]), 2)
    tokens[:, -1, -2:] = 0
    return tokens
