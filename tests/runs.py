"""What the tests of training share: a tiny corpus, tiny commands, interrupted runs, and what makes two runs equal."""

import contextlib
import inspect
import itertools
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import structured
from data.corpus import CHARACTERS, CorpusWriter
from data.ett import COLUMNS
from data.series import DTYPE, SPLITS
from training.configurator import configure

EXAMPLES = {key: value for scoring in structured.STRUCTURES.values() for key, value in scoring.EXAMPLE.items()}
CACHED = [  # structures that generate with a cache; of a family of layers, all do
    name for name, scoring in structured.STRUCTURES.items() if getattr(scoring, "cache_type", "the layers'") is not None
]
FLAG_OF = {  # field of an example: the paper's name
    "ranks": "mlr_rank_list", "window": "sliding_block_size", "gswa_ranks": "gswa_rank_list",
    "layer_kinds": "sequential_GSWA_layer_list", "btt_rank": "btt_tt_rank",
}  # fmt: skip
MORE = {  # what the runs of some also have
    "multi_level_low_rank": dict(mlr_block_divide_by_num_levels=True),
    "bilinear_MLR": dict(bilinear_mlr_muP_attn_logits_scaling=True),
    "bilinear_BTT": dict(bilinear_btt_muP_attn_logits_scaling=True),
    "bilinear_MLBTC": dict(mlbtc_levels="4:4:8:stride|1:1:2"),
}
STRUCTURES = {  # token_mixing_struct: what it needs at head width 8 and block_size 16, as on the command line
    name: {
        FLAG_OF.get(key, key): "|".join(map(str, value)) if isinstance(value, tuple) else value
        for key, value in scoring.EXAMPLE.items()
    }
    | MORE.get(name, {})
    for name, scoring in structured.STRUCTURES.items()
}
TINY = dict(n_layer=2, n_head=2, d_model=16, device="cpu", warmup_iters=2, log_interval=2, eval_interval=4, max_iters=6)
TINY_LM = dict(
    TINY, dataset="text", block_size=16, batch_size=2, gradient_accumulation_steps=2, eval_iters=2, init_lr=3e-4,
    dropout=0.2,
)  # fmt: skip
TINY_ICL = dict(  # 4 dims, 8 pairs, 16 tokens; dims and points grow at steps 2 and 4
    TINY, n_dims=4, batch_size=4, training_num_training_examples=64, eval_prompts=8, training_learning_rate=3e-4,
    dropout=0.2, mlr_rank_list="4|2|2", training_curriculum_adaptive_inc=False, training_curriculum_dims_start=2,
    training_curriculum_dims_interval=2, training_curriculum_points_start=4, training_curriculum_points_interval=2,
)  # fmt: skip


@contextlib.contextmanager
def one_thread():
    """One thread inside, as tasks and grids give it, and as many as before after it: a sum in two is another sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def flags(*settings, **more):
    """Dicts of settings, the later one winning, as --key=value."""
    merged = dict(itertools.chain.from_iterable(s.items() for s in (*settings, more)))
    return [f"--{key}={value}" for key, value in merged.items()]


def write_corpus(folder, tokens=400):
    """A corpus in which each of the 96 symbols says which one comes next."""
    with CorpusWriter(folder, dict(CHARACTERS)) as writer:
        for split in ("train", "val"):
            writer.add(split, np.arange(tokens) * 5 % 96)
        writer.finish()


def write_series(folder, values, rows):
    """values (sum(rows), 7) as prepare.py leaves a series: its parts, and the mean and the deviation of the first."""
    folder.mkdir(parents=True)
    for split, part in zip(SPLITS, np.split(values, np.cumsum(rows)[:-1]), strict=True):
        part.astype(DTYPE).tofile(folder / f"{split}.bin")
    train = values[: rows[0]]
    counts = dict(zip(SPLITS, rows, strict=True))
    meta = dict(columns=COLUMNS, start="2016-07-01 00:00:00", minutes=60, rows=counts)
    meta |= dict(mean=train.mean(0).tolist(), std=train.std(0).tolist())
    (folder / "meta.json").write_text(json.dumps(meta))


def waves(rows, noise=0.1):
    """Seven noisy waves of period 12, each with its own phase, level and size: the next hours follow from the last."""
    rng, t = np.random.default_rng(0), np.arange(rows)[:, None]
    channel = np.arange(len(COLUMNS))
    return channel + (1 + channel) * (np.sin(2 * np.pi * t / 12 + channel) + noise * rng.standard_normal((rows, 7)))


def metrics(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def record(out_dir):
    return json.loads((Path(out_dir) / "run.json").read_text())


def checkpoint(out_dir):
    return torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)


def timeless(lines):
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]


def assert_equal(got, want, where):
    """Equal types, numbers and tensors, bit for bit, all the way down; the difference's place in the failure."""
    assert type(got) is type(want), where
    if isinstance(want, dict):
        assert list(got) == list(want), where
        for key in want:
            assert_equal(got[key], want[key], f"{where}.{key}")
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), where
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_equal(g, w, f"{where}[{i}]")
    elif isinstance(want, torch.Tensor):
        assert torch.equal(got, want), where
    else:
        assert got == want, where


def assert_same_checkpoint(got_dir, want_dir):
    got, want = checkpoint(got_dir), checkpoint(want_dir)
    for state in (got, want):
        del state["seconds"], state["settings"]
    assert_equal(got, want, "checkpoint")


def assert_same_run(got_dir, want_dir):
    """The same end bit for bit, and the same lines on the way."""
    assert_same_checkpoint(got_dir, want_dir)
    assert_equal(timeless(metrics(got_dir)), timeless(metrics(want_dir)), "metrics.jsonl")
    assert record(got_dir)["status"] == record(want_dir)["status"] == "finished"


def stops(main, argv):
    """The exit status of a command that ends with one."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    return stop.value.code


def fit(script, *settings, **more):
    """Run a script by settings."""
    script.main(flags(*settings, more))


def begin(script, *settings, **more):
    """(steps, parts) of a run that stands before its first step: next(steps) takes one, parts.model is its model, ..

    The parts are the local names of `script.training`.
    """
    steps = script.training(configure(script.Settings, flags(*settings, more)))
    next(steps)
    return steps, SimpleNamespace(**inspect.getgeneratorlocals(steps))


def at_step(monkeypatch, script, step, action):
    """Before a step, counted from 0, do something."""
    rate_factor = script.rate_factor

    def patched(*given):
        if given[-1] == step:
            action()
        return rate_factor(*given)

    monkeypatch.setattr(script, "rate_factor", patched)


def change_losses(monkeypatch, script, change):
    """Have change(losses, number of the micro-batch in the run, network) in the place of a script's losses."""
    losses, calls = script.losses, itertools.count()
    monkeypatch.setattr(script, "losses", lambda network, *given: change(losses(network, *given), next(calls), network))


def signal_at(monkeypatch, script, step, number):
    at_step(monkeypatch, script, step, lambda: os.kill(os.getpid(), number))


def initial_weights(script, command):
    """The weights that a command starts from; nothing of it stays."""
    with tempfile.TemporaryDirectory() as folder:
        steps = script.training(configure(script.Settings, [*command, f"--out_dir={folder}", "--init_from=scratch"]))
        next(steps)
        state = inspect.getgeneratorlocals(steps)["model"].state_dict()
        state = {name: value.detach().cpu().clone() for name, value in state.items()}
        steps.close()
    return state


def child(target, *args):
    """A process forked from a clean one that has the scripts imported: it may be killed, and starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "train_ICL", "torch._dynamo"])  # which AdamW imports
    process = context.Process(target=target, args=args)
    process.start()
    return process


def assert_every_parameter_moves(script, command, out_dir):
    """Output weights start at zero, so it takes three steps to reach all."""
    before = initial_weights(script, command)
    script.main(command)
    after = checkpoint(out_dir)["model"]
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.isfinite().all(), name
        assert not torch.equal(tensor, before[name]), f"{name} did not move"
