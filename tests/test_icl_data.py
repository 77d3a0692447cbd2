"""Prompts for in-context regression: random numbers, tasks, pool, curriculum, baselines."""

import math

import pytest
import torch

from data.icl_regression import stream
from data.icl_regression.baselines import baseline_errors
from data.icl_regression.curriculum import Curriculum, adaptive_increment
from data.icl_regression.philox import bits, normal, philox4x32, uniform
from data.icl_regression.sampler import (
    EVALUATION_SEED,
    evaluation_prompts,
    interleave,
    sample_prompts,
    training_examples,
)
from data.icl_regression.stream import BLOCK_STEPS, PromptStream
from data.icl_regression.tasks import TASKS, Purpose
from training.errors import BadInput

SEED = 7
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def philox_reference(counter, key):
    """Philox4x32-10 in Python integers, as the paper's figure reads."""
    c, k = list(counter), list(key)
    for _ in range(10):
        (hi0, lo0), (hi1, lo1) = divmod(0xD2511F53 * c[0], 2**32), divmod(0xCD9E8D57 * c[2], 2**32)
        c = [hi1 ^ c[1] ^ k[0], lo1, hi0 ^ c[3] ^ k[1], lo0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


ONES = 2**32 - 1
KNOWN_ANSWERS = [  # counter, key, words: Random123's kat_vectors, philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter, key, words):
    assert tuple(philox_reference(counter, key)) == words
    assert tuple(w.item() for w in philox4x32([torch.tensor(c) for c in counter], key)) == words


@pytest.mark.parametrize("seed", [0, 5, 2**32 + 3, 2**63 - 1, 2**64 - 1])
def test_bits_layout(seed):
    """The documented places of seed, example, purpose and index in key and counter."""
    examples = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1])
    got = bits(seed, examples, 3, 11)
    for row, e in zip(got.tolist(), examples.tolist(), strict=True):
        words = []
        for block in range(3):
            words += philox_reference((block, 3, e % 2**32, e >> 32), (seed % 2**32, seed >> 32))
        assert row == words[:11]


def test_uniform_and_normal_read_the_bits():
    examples = torch.arange(50)
    words = bits(SEED, examples, 1, 36)
    assert torch.equal(uniform(SEED, examples, 1, (5, 7)), ((words[:, :35] // 256) / 2**24).float().view(50, 5, 7))
    radius = (-2 * ((words[:, 0::2].double() + 1) / 2**32).log()).sqrt()
    angle = 2 * math.pi * words[:, 1::2].double() / 2**32
    want = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)[:, :35].view(50, 5, 7)
    torch.testing.assert_close(normal(SEED, examples, 1, (5, 7)).double(), want, rtol=1e-4, atol=2e-6)


def test_moments():
    n = 2**20
    u = uniform(SEED, torch.arange(1024), 0, (1024,)).double().flatten()
    assert u.min() >= 0
    assert u.max() < 1
    for power in (1, 2, 3):
        assert abs(u.pow(power).mean() - 1 / (power + 1)) < 5 / math.sqrt(n) * 0.3
    z = normal(SEED, torch.arange(1024), 0, (1024,)).double().flatten()
    for power, moment, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]:
        assert abs(z.pow(power).mean() - moment) < 4 * math.sqrt(spread / n), power
    for x in (0.5, 1, 2, 3, 4):
        p = math.erfc(x / math.sqrt(2))
        assert abs((z.abs() > x).double().mean() - p) < 4 * math.sqrt(p / n), x
    assert z.isfinite().all()


def test_streams_are_independent():
    """Any two of seed, example, purpose and neighbouring index give uncorrelated values and squares."""
    e, n = torch.arange(512), 512
    base = normal(SEED, e, 0, (n,)).double()
    others = {
        "seed": normal(SEED + 1, e, 0, (n,)),
        "high half of the seed": normal(SEED + 2**32, e, 0, (n,)),
        "example": normal(SEED, e + 1, 0, (n,)),
        "high half of the example": normal(SEED, e + 2**32, 0, (n,)),
        "purpose": normal(SEED, e, 1, (n,)),
    }
    others |= {f"index + {lag}": base.roll(-lag, 1) for lag in (1, 2, 3, 4)}
    for name, other in others.items():
        for f in (lambda t: t, lambda t: t.square() - 1):
            correlation = (f(base) * f(other.double())).mean() / f(base).square().mean()
            assert abs(correlation) < 4.5 / 512, name


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_bits_refuses_a_seed(seed):
    with pytest.raises(BadInput, match=str(seed)):
        bits(seed, torch.arange(2), 0, 1)


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_depends_on_its_number_alone(task):
    def prompts(examples, n_points=21):
        noise_std = 0.0 if task == "linear_classification" else 0.3
        return sample_prompts(task, SEED, torch.tensor(examples), 10, n_points, noise_std=noise_std)

    numbers = [3, 2**40 + 1, 0, 17, 2**62, 99, 4]
    x, y = prompts(numbers)
    for order in ([6, 5, 4, 3, 2, 1, 0], [2], [4, 0], [1, 1, 3]):
        x_some, y_some = prompts([numbers[i] for i in order])
        assert torch.equal(x_some, x[order])
        assert torch.equal(y_some, y[order])
    for n_points in (1, 8, 20):
        x_fewer, y_fewer = prompts(numbers, n_points)
        assert torch.equal(x_fewer, x[:, :n_points])
        assert torch.equal(y_fewer, y[:, :n_points])
    assert x.flatten(1).unique(dim=0).shape[0] == len(numbers)


def test_curriculum_dims_rescale_the_same_draws():
    x, _ = sample_prompts("linear_regression", SEED, torch.arange(4), 12, 9)
    few, _ = sample_prompts("linear_regression", SEED, torch.arange(4), 12, 9, dims=5)
    torch.testing.assert_close(few[..., :5], x[..., :5] * math.sqrt(12 / 5))
    assert (few[..., 5:] == 0).all()


@pytest.mark.parametrize("dims", [8, 5, 1])
@pytest.mark.parametrize("task", TASKS)
def test_predicting_zero_costs_one(task, dims):
    x, y = sample_prompts(task, SEED, torch.arange(6000), 8, 6, dims=dims)
    assert x.dtype == y.dtype == torch.float32
    assert abs(x[..., :dims].square().mean() * dims - 1) < 0.03
    assert abs(y.square().mean() - 1) < 0.08
    assert abs(y.mean()) < 0.05
    assert torch.equal(y.abs(), torch.ones_like(y)) == (task == "linear_classification")


def draw(f, example, purpose, shape):
    """One example's raw parameters, float64 or int64."""
    out = f(SEED, torch.tensor([example]), purpose, shape)[0]
    return out.double() if out.is_floating_point() else out.tolist()


def linear_twin(x, example, dims):
    w = draw(normal, example, Purpose.WEIGHTS, (len(x[0]),))
    return [sum(w[j] * x_i[j] for j in range(dims)) for x_i in x]


def sparse_twin(x, example, dims, sparsity):
    w = draw(normal, example, Purpose.WEIGHTS, (len(x[0]),))
    words = draw(bits, example, Purpose.COORDINATES, dims)
    chosen = sorted(range(dims), key=lambda j: words[j])[:sparsity]
    return [math.sqrt(dims / len(chosen)) * sum(w[j] * x_i[j] for j in chosen) for x_i in x]


def classification_twin(x, example, dims):
    return [math.copysign(1, score) for score in linear_twin(x, example, dims)]


def relu_twin(x, example, dims, hidden):
    w = draw(normal, example, Purpose.WEIGHTS, (hidden, len(x[0])))
    a = draw(normal, example, Purpose.VALUES, (hidden,))
    units = [[max(0.0, float(w[h] @ x_i)) for h in range(hidden)] for x_i in x]
    return [sum(a[h] * unit[h] for h in range(hidden)) * math.sqrt(2 / hidden) for unit in units]


def tree_twin(x, example, dims, depth):
    coordinate = draw(bits, example, Purpose.COORDINATES, 2**depth - 1)
    leaves = draw(normal, example, Purpose.VALUES, (2**depth,))
    y = []
    for x_i in x:
        path = ""
        for level in range(depth):  # nodes level by level, those of a level from left to right
            node = 2**level - 1 + int("0" + path, 2)
            path += "1" if x_i[coordinate[node] * dims // 2**32] > 0 else "0"
        y.append(leaves[int(path, 2)])
    return y


TWINS = [  # task, twin, options
    ("linear_regression", linear_twin, {}),
    ("sparse_linear_regression", sparse_twin, {"sparsity": 3}),
    ("sparse_linear_regression", sparse_twin, {"sparsity": 20}),  # more than there are
    ("linear_classification", classification_twin, {}),
    ("relu_2nn_regression", relu_twin, {"hidden": 13}),
    ("decision_tree", tree_twin, {"depth": 1}),
    ("decision_tree", tree_twin, {"depth": 4}),
]


@pytest.mark.parametrize("dims", [7, 5, 2])
@pytest.mark.parametrize(("task", "twin", "options"), TWINS)
def test_tasks_read_like_their_definitions(task, twin, options, dims):
    x, y = sample_prompts(task, SEED, torch.arange(5), 7, 15, dims=dims, **options)
    want = torch.tensor([twin(x[e].double(), e, dims, **options) for e in range(5)], dtype=torch.float64)
    assert relative_error(y, want) < 1e-6


def test_default_options():
    for task, options in [
        ("sparse_linear_regression", {"sparsity": 3}),
        ("relu_2nn_regression", {"hidden": 100}),
        ("decision_tree", {"depth": 4}),
    ]:
        default, stated = (sample_prompts(task, SEED, torch.arange(3), 8, 6, **o)[1] for o in ({}, options))
        assert torch.equal(default, stated)


def test_every_coordinate_is_looked_at():
    words = bits(SEED, torch.arange(4000), Purpose.COORDINATES, 15)
    share = torch.bincount((words * 5 >> 32).flatten(), minlength=5) / words.numel()
    assert (share - 1 / 5).abs().max() < 0.01
    _, y = sample_prompts("sparse_linear_regression", SEED, torch.arange(4000), 5, 1, sparsity=1)
    assert y.unique().numel() == 4000


def test_noise_is_a_stream_of_its_own():
    args = ("linear_regression", SEED, torch.arange(3000), 6, 12)
    (x, y), (x_noisy, y_noisy) = sample_prompts(*args), sample_prompts(*args, noise_std=0.5)
    noise = (y_noisy - y).double()
    assert torch.equal(x, x_noisy)
    assert abs(noise.std() - 0.5) < 0.01
    for other in (y, x[..., 0], x[..., 5]):
        assert abs((noise * other).mean()) < 4 * 0.5 / math.sqrt(noise.numel())


def test_targets_do_not_feel_autocast():
    args = ("relu_2nn_regression", SEED, torch.arange(4), 9, 11)
    x, y = sample_prompts(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_cast, y_cast = sample_prompts(*args)
    assert torch.equal(x, x_cast)
    assert torch.equal(y, y_cast)


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_read_back_to_the_host(task):
    """On the meta device there is nothing to read: any .item() or shape that depends on data raises."""
    examples = training_examples(SEED, torch.zeros((), dtype=torch.int64, device="meta"), 64, 1000, device="meta")
    x, y = sample_prompts(task, SEED, examples, 16, 32, dims=7)
    assert x.shape == (64, 32, 16)
    assert y.shape == (64, 32)


def test_evaluation_set():
    x, y = evaluation_prompts("decision_tree", 0, 10, 6, 12)
    parts = [evaluation_prompts("decision_tree", first, count, 6, 12) for first, count in ((0, 3), (3, 6), (9, 1))]
    assert torch.equal(x, torch.cat([p[0] for p in parts]))
    assert torch.equal(y, torch.cat([p[1] for p in parts]))
    others = [evaluation_prompts("decision_tree", 0, 10, 6, 12, seed=EVALUATION_SEED + 1)[0]]
    others += [sample_prompts("decision_tree", s, torch.arange(1000), 6, 12)[0] for s in (0, SEED, EVALUATION_SEED)]
    values = torch.cat([x, *others])[:, 0]
    assert values.unique(dim=0).shape[0] == len(values)


def test_interleave():
    x, y = torch.arange(1.0, 13).view(2, 3, 2), torch.arange(20.0, 26).view(2, 3)
    tokens = interleave(x, y)
    assert tokens[0].tolist() == [[1, 2], [20, 0], [3, 4], [21, 0], [5, 6], [22, 0]]
    assert tokens[1].tolist() == [[7, 8], [23, 0], [9, 10], [24, 0], [11, 12], [25, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "linear_regresion"}, "did you mean 'linear_regression'"),
        ({"task": "sorting"}, "choose from"),
        ({"seed": -1}, "got -1"),
        ({"seed": 2**63}, "got 9223372036854775808"),
        ({"dims": 0}, "n_dims = 4, got 0"),
        ({"dims": 5}, "n_dims = 4, got 5"),
        ({"n_points": 0}, "got 0"),
        ({"noise_std": -0.5}, "got -0.5"),
        ({"task": "linear_classification", "noise_std": 0.5}, "labels -1 and 1"),
        ({"task": "sparse_linear_regression", "sparsity": 0}, "sparsity must be at least 1, got 0"),
    ],
)
def test_bad_prompts(change, message):
    right = {"task": "linear_regression", "seed": 0, "n_dims": 4, "n_points": 8}
    with pytest.raises(BadInput, match=message):
        sample_prompts(examples=torch.arange(2), **right | change)
    with pytest.raises(BadInput, match=message):
        evaluation_prompts(first=0, count=2, **right | change)


@pytest.mark.parametrize("pool_size", [1, 2, 3, 7, 64, 100, 1023, 1024, 1025])
def test_an_epoch_is_a_permutation(pool_size):
    epochs = torch.stack([training_examples(SEED, step, pool_size, pool_size) for step in range(3)])
    assert torch.equal(epochs.sort(1).values, torch.arange(pool_size).expand(3, -1))
    if pool_size >= 64:
        assert not torch.equal(epochs[0], epochs[1])
        assert not torch.equal(epochs[0], training_examples(SEED + 1, 0, pool_size, pool_size))


def test_batches_cut_an_epoch():
    """23 = 4 batches of 5 and 3 left out: no repetition within an epoch, every example seen over the epochs."""
    batches = training_examples(SEED, torch.arange(400), 5, 23)
    for epoch in batches.view(100, 20):
        assert epoch.unique().numel() == 20
    times = torch.bincount(batches.flatten(), minlength=23)
    assert times.shape == (23,)
    assert (times - 100 * 20 / 23).abs().max() < 5 * math.sqrt(100 * 20 / 23 * 3 / 23)
    for step in (0, 3, 4, 123, 399):
        assert torch.equal(training_examples(SEED, step, 5, 23), batches[step])
        assert torch.equal(training_examples(SEED, torch.tensor(step), 5, 23), batches[step])


def test_order_of_the_full_pool_looks_random():
    pool = 32_000_064
    ids = training_examples(SEED, torch.arange(500), 64, pool).flatten()
    assert ids.min() >= 0
    assert ids.max() < pool
    assert ids.unique().numel() == ids.numel()
    u = ids.double() / pool
    share = torch.histc(u, 32, 0, 1) / len(u)
    assert (share * 32 - 1).abs().max() < 4 * math.sqrt(32 / len(u))
    v = u.view(-1, 64) - 0.5
    for lag in (1, 2, 3, 32):
        assert abs((v[:, lag:] * v[:, :-lag]).mean() * 12) < 4 / math.sqrt(len(u)), lag
    assert abs((v[1:] * v[:-1]).mean() * 12) < 4 / math.sqrt(len(u))


@pytest.mark.parametrize(("batch_size", "pool_size"), [(65, 64), (0, 64), (1, 2**62 + 1)])
def test_bad_pools(batch_size, pool_size):
    with pytest.raises(BadInput, match=str(pool_size)):
        training_examples(SEED, 0, batch_size, pool_size)


def adaptive(n_dims, steps, dims_start=4):
    """The curriculum of the adaptive rule at the original's start values."""
    inc = adaptive_increment(dims_start, n_dims, steps)
    return Curriculum(dims_start, n_dims, inc, 2000, 8, 2 * n_dims, 2 * inc, 2000)


@pytest.mark.parametrize(
    ("n_dims", "steps", "sizes"),
    [  # step -> (dims, points), by hand
        (16, 500_000, {0: (4, 8), 1999: (4, 8), 2000: (5, 10), 23_999: (15, 30), 24_000: (16, 32), 499_999: (16, 32)}),
        (32, 500_000, {2000: (6, 12), 26_000: (30, 60), 28_000: (32, 64)}),
        (64, 500_001, {2000: (8, 16), 29_999: (60, 120), 30_000: (64, 128)}),
        (128, 500_000, {2000: (13, 26), 26_000: (121, 242), 28_000: (128, 256)}),
        (16, 50_000, {1999: (4, 8), 2000: (16, 32)}),  # 0.06 * 50,000 / 2,000 = 1.5: one raise, by 12
        (8, 33_334, {1999: (4, 8), 2000: (8, 16)}),  # the fewest steps that hold an interval
        (8, 10, {9: (4, 8), 2000: (8, 16)}),  # fewer still count as one
        (4, 10, {0: (4, 8), 9: (4, 8)}),
    ],
)
def test_adaptive_curriculum(n_dims, steps, sizes):
    curriculum = adaptive(n_dims, steps)
    assert {step: curriculum.at(step) for step in sizes} == sizes
    full = curriculum.full_from()
    assert full <= max(2000, 0.06 * steps)
    assert curriculum.at(full) == (n_dims, 2 * n_dims)
    assert full == 0 or curriculum.at(full - 1) < (n_dims, 2 * n_dims)


def test_adaptive_growth_from_other_starts():
    """From 10 of 64 dims in 15 raises by 4, where from 4 it is 4, too, and from 60 by 1."""
    assert [adaptive_increment(start, 64, 500_000) for start in (4, 10, 49, 60, 64)] == [4, 4, 1, 1, 1]
    assert adaptive(64, 500_000, dims_start=60).at(4000) == (62, 12)


def test_curriculum_by_hand():
    curriculum = Curriculum(5, 20, 1, 2000, 11, 41, 2, 1000)  # Garg et al.'s, points twice as often
    assert [curriculum.at(s) for s in (0, 999, 1000, 2000, 10**6)] == [(5, 11), (5, 11), (5, 13), (6, 15), (20, 41)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((21, 20, 1, 2000, 11, 41, 2, 2000), "training_curriculum_dims_end = 20, got 21"),
        ((0, 20, 1, 2000, 11, 41, 2, 2000), "got 0"),
        ((5, 20, 0, 2000, 11, 41, 2, 2000), "training_curriculum_dims_inc .* 5 to 20, got 0"),
        ((5, 20, 1, 0, 11, 41, 2, 2000), "training_curriculum_dims_interval"),
        ((5, 20, 1, 2000, 42, 41, 2, 2000), "training_curriculum_points_end = 41, got 42"),
        ((5, 20, 1, 2000, 11, 41, -1, 2000), "training_curriculum_points_inc"),
        ((5, 20, 1, 2000, 11, 41, 2, -1), "training_curriculum_points_interval"),
    ],
)
def test_bad_curriculum(values, message):
    with pytest.raises(BadInput, match=message):
        Curriculum(*values)


def test_the_adaptive_rule_needs_an_interval():
    with pytest.raises(BadInput, match="training_curriculum_dims_interval must be at least 1 step, got 0"):
        adaptive_increment(4, 16, 1000, interval=0)


def test_fresh_prompts_never_come_twice():
    """Without a pool every step has examples of its own, far beyond any pool."""
    steps = torch.tensor([0, 1, 7, 10**12])
    ids = training_examples(SEED, steps, 64)
    assert ids.flatten().unique().numel() == 4 * 64
    assert torch.equal(training_examples(SEED, 7, 64), ids[2])
    assert ids[3, 0] == 64 * 10**12


GROWING = Curriculum(2, 6, 2, 5, 3, 12, 3, 7)  # dims every 5 steps, points every 7
POOL = dict(seed=SEED, batch_size=6, pool_size=100)


@pytest.mark.parametrize("full_points", [None, 12])
@pytest.mark.parametrize("task", TASKS)
def test_a_stream_gives_the_prompts_of_every_step(task, full_points):
    """Bit for bit those made step by step, wherever the run begins, and whichever rows a process has."""
    noise_std = 0.0 if task == "linear_classification" else 0.3
    keywords = dict(task=task, n_dims=6, noise_std=noise_std)
    for first, rows in [(0, slice(None)), (3, slice(0, 3)), (3, slice(3, 6))]:
        prompts = PromptStream(GROWING, POOL, keywords, 100, rows=rows, full_points=full_points)
        for step in [*range(first, 40), 2]:
            dims, points = GROWING.at(step)
            examples = training_examples(step=step, **POOL)[rows]
            want = sample_prompts(seed=SEED, examples=examples, n_points=full_points or points, dims=dims, **keywords)
            x, y, weight = prompts.at(step)
            assert torch.equal(x, want[0])
            assert torch.equal(y, want[1])
            assert weight.tolist() == [float(torch.tensor(1) / points)] * points + [0] * (y.shape[1] - points)


def test_which_steps_share_a_block(monkeypatch):
    """Steps of one size, as many as fit into the memory and are still to come."""
    keywords = dict(task="linear_regression", n_dims=6)

    def blocks(n_steps, curriculum=GROWING, **options):
        prompts, made = PromptStream(curriculum, POOL, keywords, n_steps, **options), []
        for step in range(n_steps):
            prompts.at(step)
            if prompts.steps not in made:
                made.append(prompts.steps)
        assert [step for block in made for step in block] == list(range(n_steps))
        return [len(block) for block in made]

    constant = Curriculum(6, 6, 0, 1, 12, 12, 0, 1)
    assert blocks(17) == [5, 2, 3, 4, 3]
    assert blocks(150, constant) == [BLOCK_STEPS, BLOCK_STEPS, 150 - 2 * BLOCK_STEPS]
    monkeypatch.setattr(stream, "CACHE_BYTES", 4 * 6 * 12 * 6 * 3)
    assert blocks(7, constant) == [3, 3, 1]
    assert blocks(7, constant, rows=slice(2, 4)) == [7]
    monkeypatch.setattr(stream, "CACHE_BYTES", 1)
    assert blocks(3, constant) == [1, 1, 1]


def prediction_twins(x, y, alpha):
    """Each baseline's prediction at x[-1] from the points before, as its definition reads."""
    X, seen, last = x[:-1], y[:-1], x[-1]
    i, d = X.shape
    nearest = sorted(range(i), key=lambda j: (X[j] - last).norm())[:3]
    return {
        "least_squares": last @ torch.linalg.pinv(X) @ seen,
        "ridge": last @ torch.linalg.inv(X.mT @ X + alpha * torch.eye(d, dtype=X.dtype)) @ X.mT @ seen,
        "averaging": last @ (d * (X * seen[:, None]).mean(0)) if i else 0.0,
        "nearest_neighbours": sum(seen[j] for j in nearest) / len(nearest) if i else 0.0,
        "zero": 0.0,
    }


@pytest.mark.parametrize("task", ["linear_regression", "linear_classification"])
@pytest.mark.parametrize(("n_dims", "n_points"), [(5, 13), (9, 7), (6, 6), (3, 1), (1, 4)])
def test_baselines_read_like_their_definitions(task, n_dims, n_points):
    B, alpha = 6, 0.3
    x, y = evaluation_prompts(task, 0, B, n_dims, n_points)
    x, y = x.double(), y.double()
    errors = baseline_errors(x, y, ridge_alpha=alpha)
    for i in range(n_points):
        twins = [prediction_twins(x[b, : i + 1], y[b, : i + 1], alpha) for b in range(B)]
        for name, got in errors.items():
            want = sum((twin[name] - y[b, i]) ** 2 for b, twin in enumerate(twins)) / B
            torch.testing.assert_close(got[i], want, rtol=1e-7, atol=1e-12, msg=lambda m, n=name, i=i: f"{n} {i}: {m}")


def test_baselines_do_not_depend_on_chunks_or_unused_dims(monkeypatch):
    x, y = sample_prompts("relu_2nn_regression", SEED, torch.arange(37), 11, 14, dims=6)
    whole = baseline_errors(x, y)
    monkeypatch.setattr("data.icl_regression.baselines.CHUNK_NUMBERS", 14 * (14 + 6) * 5)
    parts, few = baseline_errors(x, y), baseline_errors(x[..., :6], y)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])
        torch.testing.assert_close(few[name], whole[name])


def test_baselines_on_linear_regression():
    """Least squares pays 1 - i/d while examples are missing and nothing afterwards; zero pays 1."""
    d = 8
    errors = baseline_errors(*evaluation_prompts("linear_regression", 0, 3200, d, 2 * d))
    missing = 1 - torch.arange(d, dtype=torch.float64) / d
    assert (errors["least_squares"][:d] - missing).abs().max() < 0.1
    assert errors["least_squares"][d:].max() < 1e-8
    assert (errors["zero"] - 1).abs().max() < 0.1
    assert all(e.shape == (2 * d,) and e.dtype == torch.float64 for e in errors.values())


def test_bad_baselines():
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5)
    with pytest.raises(BadInput, match="got 0"):
        baseline_errors(x, y, ridge_alpha=0)
    with pytest.raises(BadInput, match=r"\(2, 5, 3\) and \(2, 4\)"):
        baseline_errors(x, y[:, :4])


@cuda
def test_cuda_makes_the_same_prompts():
    examples = torch.tensor([0, 5, 2**33, 2**62])
    assert torch.equal(bits(2**63 - 1, examples.cuda(), 1, 1001).cpu(), bits(2**63 - 1, examples, 1, 1001))
    ids = training_examples(SEED, 77, 64, 1000, device="cuda")
    assert torch.equal(ids.cpu(), training_examples(SEED, 77, 64, 1000))
    for task in TASKS:
        want = sample_prompts(task, SEED, examples, 16, 32)
        got = sample_prompts(task, SEED, examples, 16, 32, device="cuda")
        for name, g, w in zip("xy", got, want, strict=True):
            assert relative_error(g.cpu(), w.double()) < 1e-5, (task, name)


@cuda
@pytest.mark.parametrize("task", TASKS)
def test_prompts_in_a_cuda_graph(task):
    step = torch.zeros((), dtype=torch.int64, device="cuda")

    def make():
        return sample_prompts(task, SEED, training_examples(SEED, step, 8, 100, device="cuda"), 16, 32, dims=9)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        make()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = make()
    for s in (3, 20):
        step.fill_(s)
        graph.replay()
        for got, want in zip(captured, make(), strict=True):
            assert torch.equal(got, want)
