"""`bench.py step`: training steps of train.py as users run them, for every scoring function, and a nanoGPT's beside."""

import contextlib
import importlib.util
import io
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import train
from benchmarks.measure import ModelBenchSettings, Started, afresh, matmul_tflops, parse_pairs, plain_step, time_step
from data.corpus import CHARACTERS, CorpusWriter
from training.capture import wanted
from training.configurator import parse_list, setting
from training.devices import allow_tf32, autocast, peak_flops, synchronise
from training.errors import BadInput

TOKENS = 2**20  # of each split of the corpus, random ones
COLUMNS = {  # key: format
    "d_model": "d", "batch": "9s", "token_mixing_struct": "29s", "ms": ".2f", "tokens_per_s": ",.0f",
    "TFLOP_per_s": ".3g", "mfu": ".1%", "of_matmul": ".1%", "outside_ms": ".2f", "kernel_ms": ".2f",
    "peak_MiB": ",.0f", "times_peer": ".2f",
}  # fmt: skip


@dataclass
class Settings(ModelBenchSettings):
    """Time steps of train.py: batches from a corpus on disk, forward, backward, clip, AdamW, sums of losses.

    outside_ms is what a step takes beyond its forward and backward passes alone, on tokens that stay. FLOPs are those
    executed, as train.py counts them; mfu is their share of what the card's maker promises, of_matmul of what the card
    reaches in a product of two large bfloat16 matrices. peak_MiB is the most memory allocated during a step once all
    kernels are compiled and chosen. --peer=FOLDER, a checkout of nanoGPT, adds a row "peer": its model of the same
    size in a loop like that of its own train.py, compiled where --compile=True. --kernels=N prints the N kernels that
    take most of each row's step, with their milliseconds and launches; kernel_ms is what all of them take: a step of
    more waits for the host.
    """

    widths: str = setting("128", "d_model of every model, with | between them")
    batches: str = setting("2x1|1x2", "batch_size x gradient_accumulation_steps, with | between them")
    n_layer: int = setting(2, "number of blocks")
    block_size: int = setting(128, "sequence length")
    compile: bool = setting(False, "torch.compile the models")
    cuda_graph: str = setting("auto", "let train.py replay steps as a CUDA graph: auto, True, False")
    tf32: bool = setting(False, "let float32 matmuls on the GPU round their inputs to TF32")
    compile_mode: str = setting("default", "as train.py's")
    kernels: int = setting(0, "the kernels that take longest to show of every row")
    peer: str = setting("", "folder with nanoGPT's model.py, to time beside ours")
    repeats: int = setting(3, "timings that the median is taken of")
    steps: int = setting(8, "steps in a timing")

    ALIASES: ClassVar[dict] = dict(structures="token_mixing_struct", d_model="widths")
    ON_CUDA: ClassVar[tuple] = (
        "--dtype=bfloat16", "--widths=256|768", "--batches=32x1|4x8", "--n_layer=6", "--block_size=1024", "--steps=30",
    )  # fmt: skip

    def run_settings(self, batch, folder):
        """The settings of a run of train.py on the corpus in `folder`; batch: (batch_size, micro-batches)."""
        own = dict(batch_size=batch[0], gradient_accumulation_steps=batch[1], data_dir=folder, dataset="corpus")
        return self.run_of(train, **own)


def rows(cfg, device):
    """For every width and batch one row a scoring function, after the peer's. First None: settings are good."""
    batches = parse_pairs(cfg.batches, "batches", "batch_size x gradient_accumulation_steps")
    shapes = list(product(parse_list(cfg.widths, "widths"), batches))
    wanted(cfg.cuda_graph, device, cfg.dtype, 1)  # which refuses what this device has not
    for width, batch in shapes:
        for variant in cfg.variants(d_model=width).values():
            variant.run_settings(batch, "").model_config()
    peer = load_peer(cfg.peer) if cfg.peer else None
    yield
    with tempfile.TemporaryDirectory() as folder:  # a run that is not started writes nothing there
        write_corpus(f"{folder}/corpus", cfg)
        for width, batch in shapes:
            theirs, timed = {}, {}
            if peer:
                timed["peer"] = time_peer, peer, device, width, batch, f"{folder}/corpus/train.bin"
            for name, variant in cfg.variants(d_model=width).items():
                timed[name] = time_run, variant.run_settings(batch, folder)
            for name, (measure, *args) in timed.items():
                row = afresh(measure, cfg, *args)
                if "ms" in row:
                    row["tokens_per_s"] = 1e3 / row["ms"] * batch[0] * batch[1] * cfg.block_size
                if "ms" in row and "ms" in theirs:
                    row["times_peer"] = theirs["ms"] / row["ms"]
                theirs = row if name == "peer" else theirs
                yield dict(d_model=width, batch="x".join(map(str, batch)), token_mixing_struct=name) | row


def write_corpus(folder, cfg):
    """Random symbols, in train and val alike."""
    rng = np.random.default_rng(cfg.seed)
    with CorpusWriter(folder, dict(CHARACTERS)) as writer:
        for split in ("train", "val"):
            writer.add(split, rng.integers(CHARACTERS["vocab_size"], size=max(TOKENS, 2 * cfg.block_size)))
        writer.finish()


def time_run(cfg, run):
    """Times of the step that train.py takes with these settings, and what they are made of."""
    started = Started(train, run, eval_iters=1)
    parts, device = started.parts, started.parts.process.device
    row = time_step(started.step, device, cfg.steps, cfg.repeats) | kernels_of(started.step, device, cfg.kernels)
    flops = 6 * parts.cost.macs * parts.sequences * 1e3 / row["ms"]
    alone = time_step(model_alone(parts), device, cfg.steps, cfg.repeats)
    peak, rate = peak_flops(device, run.dtype, run.tf32), matmul_tflops(device)
    shares = dict(mfu=peak and flops / peak, of_matmul=rate and flops / 1e12 / rate)
    return dict(row, TFLOP_per_s=flops / 1e12, **shares, outside_ms=row["ms"] - alone["ms"])


def kernels_of(step, device, number, calls=3):
    """The longest `number` kernels of a step, (name, ms, launches), and the time of all; on the CPU of operators."""
    if not number:
        return {}
    kind = "CUDA" if device.type == "cuda" else "CPU"
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profile:
        for _ in range(calls):
            step()
        synchronise(device)
    spent = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"  # microseconds
    found = [(e.key, getattr(e, spent) / calls / 1e3, e.count / calls) for e in profile.key_averages()]
    found = sorted((kernel for kernel in found if kernel[1]), key=lambda kernel: -kernel[1])
    return dict(kernels=found[:number], kernel_ms=sum(ms for _, ms, _ in found))


def model_alone(run):
    """The forward and backward passes of a step on inputs that stay, replayed where the run's steps are."""

    def passes(step, *inputs):
        for windows in inputs:
            with run.process.autocast():
                loss = train.losses(run.network, windows)["train/loss"]
            run.optimizer.backward(loss / len(inputs))
        run.optimizer.adamw.zero_grad(set_to_none=True)

    return partial(run.process.captured(passes), 0, *run.windows.at(0).unbind())


def load_peer(folder):
    """nanoGPT's model.py as a module, under a name of its own."""
    path = Path(folder) / "model.py"
    spec = importlib.util.spec_from_file_location("peer_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where its dataclasses look for it
    try:
        spec.loader.exec_module(module)
        return module.GPT, module.GPTConfig
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise BadInput(f"peer is {folder}, whose model.py is no nanoGPT's ({why}); give a checkout of it") from None


def time_peer(cfg, peer, device, width, batch, path):
    """Times of a step as nanoGPT's train.py takes it: its optimizer, the next batch asked for before the backward."""
    allow_tf32(cfg.tf32)
    torch.manual_seed(cfg.seed)
    GPT, GPTConfig = peer
    n_head = replace(cfg, d_model=width).heads()
    sizes = dict(n_layer=cfg.n_layer, n_head=n_head, n_embd=width, block_size=cfg.block_size)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its number of parameters
        model = GPT(GPTConfig(**sizes, vocab_size=CHARACTERS["vocab_size"], dropout=0.0, bias=False)).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    network = torch.compile(model) if cfg.compile else model
    size, micro_batches = batch
    following = peer_batch(path, size, cfg.block_size, device)

    def losses():
        nonlocal following
        for _ in range(micro_batches):
            with autocast(device, cfg.dtype):
                loss = network(*following)[1] / micro_batches
            following = peer_batch(path, size, cfg.block_size, device)
            yield loss

    step = plain_step(losses, model, optimizer, device, cfg.dtype, grad_clip=1.0)
    return time_step(step, device, cfg.steps, cfg.repeats) | kernels_of(step, device, cfg.kernels)


def peer_batch(path, size, length, device):
    """Inputs and targets, each window cut from the file on its own."""
    ids, pair = np.memmap(path, dtype=CHARACTERS["dtype"], mode="r"), []
    starts = torch.randint(len(ids) - length, (size,)).tolist()
    for later in (0, 1):
        tokens = torch.stack([torch.from_numpy(ids[i + later :][:length].astype(np.int64)) for i in starts])
        tokens = tokens.pin_memory() if device.type == "cuda" else tokens
        pair.append(tokens.to(device, non_blocking=True))
    return pair
