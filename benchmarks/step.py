"""`bench.py step`: training steps of train.py as users run them, for every scoring function, and a nanoGPT's beside."""

import contextlib
import importlib.util
import io
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

import train
from benchmarks.measure import ModelBenchSettings, Started, attempt, clear, kernel_times, matmul_tflops, time_step
from data.corpus import CHARACTERS, CorpusWriter
from training.capture import StaticStep, wanted
from training.configurator import parse_list, require_at_least, setting
from training.devices import allow_tf32, autocast, peak_flops
from training.errors import BadInput
from training.settings import StructureSettings

TOKENS = 2**20  # of each split of the corpus, random ones
COLUMNS = {  # key: (width, format)
    "d_model": (7, "d"), "batch": (6, "s"), "token_mixing_struct": (29, "s"), "ms": (9, ".2f"),
    "tokens_per_s": (12, ",.0f"), "TFLOP_per_s": (11, ".3g"), "mfu": (6, ".1%"), "of_matmul": (9, ".1%"),
    "outside_ms": (10, ".2f"), "kernel_ms": (9, ".2f"), "peak_MiB": (9, ",.0f"), "times_peer": (10, ".2f"),
}  # fmt: skip


@dataclass
class StepSettings(ModelBenchSettings):
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
    AT_LEAST_1: ClassVar[tuple] = ("repeats", "steps")
    ON_CUDA: ClassVar[tuple] = (
        "--dtype=bfloat16", "--widths=256|768", "--batches=32x1|4x8", "--n_layer=6", "--block_size=1024", "--steps=30",
    )  # fmt: skip

    def run_settings(self, batch, folder):
        """The settings of a run of train.py on the corpus in `folder`; batch: (batch_size, micro-batches)."""
        shape = {f.name: getattr(self, f.name) for f in fields(StructureSettings)}
        return train.Settings(
            **shape, batch_size=batch[0], gradient_accumulation_steps=batch[1], data_dir=folder, dataset="corpus",
            out_dir=f"{folder}/run", seed=self.seed, device=self.device, dtype=self.dtype, compile=self.compile,
            compile_mode=self.compile_mode, cuda_graph=self.cuda_graph, tf32=self.tf32,
        )  # fmt: skip


def parse_batches(text):
    """"32x1|4x8" -> [(32, 1), (4, 8)]."""
    batches = [tuple(part.split("x")) for part in parse_list(text, "batches", str)]
    if not all(len(batch) == 2 and all(n.isdecimal() and int(n) for n in batch) for batch in batches):
        example = 'batch_size x gradient_accumulation_steps with | between them, like "32x1|4x8"'
        raise BadInput(f"batches is {text!r}; write {example}")
    return [tuple(map(int, batch)) for batch in batches]


def rows(cfg, device):
    """For every width and batch one row a scoring function, after the peer's."""
    shapes = list(product(parse_list(cfg.widths, "widths"), parse_batches(cfg.batches)))
    wanted(cfg.cuda_graph, device, cfg.dtype, 1)  # which refuses what this device has not
    require_at_least(cfg, dict(kernels=0))
    for width, batch in shapes:
        cfg.model_configs(d_model=width)
        cfg.run_settings(batch, "")
    return measured(cfg, device, shapes, load_peer(cfg.peer) if cfg.peer else None)


def measured(cfg, device, shapes, peer):
    """shapes: (width, batch) each; peer: nanoGPT's module or None."""
    rate = matmul_tflops(device)
    with tempfile.TemporaryDirectory() as folder:  # a run that is not started writes nothing there
        write_corpus(f"{folder}/corpus", cfg)
        for width, batch in shapes:
            about, theirs = dict(d_model=width, batch="x".join(map(str, batch))), {}
            if peer:
                path = f"{folder}/corpus/train.bin"
                theirs = attempt(partial(time_peer, peer, cfg, device, width, batch, path), device)
                theirs |= per_second(theirs, cfg, batch)
                yield about | dict(token_mixing_struct="peer") | theirs
            for name, variant in cfg.variants(d_model=width).items():
                ours = attempt(partial(time_run, variant.run_settings(batch, folder), cfg, rate), device)
                ours |= per_second(ours, cfg, batch)
                if "ms" in ours and "ms" in theirs:
                    ours["times_peer"] = theirs["ms"] / ours["ms"]
                yield about | dict(token_mixing_struct=name) | ours


def write_corpus(folder, cfg):
    """Random symbols, in train and val alike."""
    rng = np.random.default_rng(cfg.seed)
    with CorpusWriter(folder, dict(CHARACTERS)) as writer:
        for split in ("train", "val"):
            writer.add(split, rng.integers(CHARACTERS["vocab_size"], size=max(TOKENS, 2 * cfg.block_size)))
        writer.finish()


def per_second(row, cfg, batch):
    return dict(tokens_per_s=1e3 / row["ms"] * batch[0] * batch[1] * cfg.block_size) if "ms" in row else {}


def time_run(run, cfg, rate):
    """Times of the step that train.py takes with these settings, and what they are made of."""
    clear()
    started = Started(train, run, eval_iters=1)
    parts, device = started.parts, started.parts.process.device
    timed = time_step(started.step, device, cfg.steps, cfg.repeats)
    kernels = longest(started.step, device, cfg.kernels)
    flops = 6 * parts.cost.macs * parts.sequences * 1e3 / timed["ms"]
    alone = time_step(model_alone(parts), device, cfg.steps, cfg.repeats)
    peak = peak_flops(device, run.dtype, run.tf32)
    return dict(
        timed,
        TFLOP_per_s=flops / 1e12,
        mfu=peak and flops / peak,
        of_matmul=rate and flops / 1e12 / rate,
        outside_ms=timed["ms"] - alone["ms"],
        **kernels,
    )


def longest(step, device, number):
    """What a row says of the kernels of its step, if `number` of them are asked for."""
    if not number:
        return {}
    found = kernel_times(step, device)
    return dict(kernels=found[:number], kernel_ms=sum(ms for _, ms, _ in found))


def model_alone(run):
    """The forward and backward passes of a step on inputs that stay, replayed where the run's steps are."""

    def passes(*inputs):
        for windows in inputs:
            with run.process.autocast():
                loss = train.losses(run.network, windows)["train/loss"]
            run.optimizer.backward(loss / len(inputs))
        run.optimizer.adamw.zero_grad(set_to_none=True)

    inputs = run.windows.at(0).unbind()
    return partial(StaticStep(passes, run.process.device) if run.process.records else passes, *inputs)


def load_peer(folder):
    """nanoGPT's model.py as a module, under a name of its own."""
    path = Path(folder) / "model.py"
    if not path.is_file():
        raise BadInput(f"peer is {folder}, where there is no model.py; give a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("peer_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where its dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"{path} cannot be imported: {type(error).__name__}: {error}") from None
    for name in ("GPT", "GPTConfig"):
        if not hasattr(module, name):
            raise BadInput(f"{path} has no {name}; give a checkout of nanoGPT")
    return module


def time_peer(module, cfg, device, width, batch, path):
    clear()
    step = peer_step(module, cfg, device, width, batch, path)
    return time_step(step, device, cfg.steps, cfg.repeats) | longest(step, device, cfg.kernels)


def peer_step(module, cfg, device, width, batch, path):
    """A step as nanoGPT's train.py takes it: its optimizer, the next batch asked for before the backward pass."""
    allow_tf32(cfg.tf32)
    torch.manual_seed(cfg.seed)
    n_head = replace(cfg, d_model=width).heads()
    sizes = dict(n_layer=cfg.n_layer, n_head=n_head, n_embd=width, block_size=cfg.block_size)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its number of parameters
        model = module.GPT(module.GPTConfig(**sizes, vocab_size=CHARACTERS["vocab_size"], dropout=0.0, bias=False))
        model.to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    network = torch.compile(model) if cfg.compile else model
    size, micro_batches = batch
    following = peer_batch(path, size, cfg.block_size, device)

    def step():
        nonlocal following
        for _ in range(micro_batches):
            with autocast(device, cfg.dtype):
                loss = network(*following)[1] / micro_batches
            following = peer_batch(path, size, cfg.block_size, device)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_batch(path, size, length, device):
    """Inputs and targets, each window cut from the file on its own."""
    ids, pair = np.memmap(path, dtype=CHARACTERS["dtype"], mode="r"), []
    starts = torch.randint(len(ids) - length, (size,)).tolist()
    for later in (0, 1):
        tokens = torch.stack([torch.from_numpy(ids[i + later :][:length].astype(np.int64)) for i in starts])
        tokens = tokens.pin_memory() if device.type == "cuda" else tokens
        pair.append(tokens.to(device, non_blocking=True))
    return pair
