"""Train a language model, of characters or of BPE tokens, with any scoring function.

    python train.py config/struct_configs/tiny_mlr.py
    python train.py config/struct_configs/train_struct_gpt2.py --d_model=256 --token_mixing_struct=multi_level_low_rank

From top to bottom: the settings, the loss, the evaluation, the learning rate, and the run: its data, model, optimizer,
step and loop. What is due around a step (records, checkpoints, resumes, stops) is in training/loop.py. On one GPU a
step, all its micro-batches, is a CUDA graph (training/capture.py); on the CPU, in float16 and with several processes
it is called as it is.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from data.corpus import find_corpus, load_corpus
from data.windows import IGNORED, WindowStream, draw_windows, text_windows, to_device
from model import GPT
from training.configurator import configure, setting
from training.errors import BadInput, command, reading
from training.loop import Loop, LossMeter, counted
from training.optimizer import Optimizer
from training.originals import LANGUAGE_MODEL
from training.pretrained import architecture, load_pretrained
from training.process import Process
from training.run import Run
from training.schedule import lr_factor
from training.settings import STARTS, RunSettings, StructureSettings

EVAL_WINDOWS = 32  # windows that one of eval_iters stands for, whatever the batch size
NANOGPT = "a config file of nanoGPT's comes after config/nanogpt.py, which has its defaults"


@dataclass
class Settings(RunSettings, StructureSettings):
    """Train a language model. Config files and flags, the later one winning."""

    dataset: str = setting("openwebtext_small", "folder in data_dir that holds train.bin, val.bin and meta.json")
    data_dir: str = setting("data", "where the prepared datasets are, or the dataset's own folder", free=True)
    vocab_size: int = setting(-1, "tokens that the model knows; -1: those of the dataset", before=-1)
    tie_weights: bool = setting(False, "the output head is the table of token embeddings, as in GPT-2", before=False)
    pretrained: str = setting("", "start from gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder with one", before="")
    batch_size: int = setting(4, "sequences in a micro-batch")
    gradient_accumulation_steps: int = setting(8, "micro-batches in a step, of all processes together")
    max_iters: int = setting(100_000, "steps to train for", free=True)
    init_lr: float = setting(3e-3, "peak learning rate at fan-in 768; other widths follow by µP")
    warmup_iters: int = setting(2_000, "steps of linear warm-up")
    warmup_constant: bool = setting(True, "False: without a decay no warm-up either, as in nanoGPT", before=True)
    decay_lr: bool = setting(False, "cosine decay after the warm-up; otherwise constant")
    lr_decay_iters: int = setting(100_000, "step at which a decaying rate reaches min_lr")
    min_lr: float = setting(0.0, "rate at which the decay ends")
    eval_interval: int = setting(1_000, "steps between two evaluations, each followed by a checkpoint", free=True)
    eval_iters: int = setting(200, "evaluations read 32 times as many windows, spread over the text, or all", free=True)
    cuda_graph: str = setting("auto", "steps as a CUDA graph: True, False; auto: on one GPU, not float16", free=True)
    eval_only: bool = setting(False, "evaluate once, print the loss and stop; nothing is written", free=True)
    always_save_checkpoint: bool = setting(True, "save after every evaluation, not only the best and last", free=True)

    ALIASES: ClassVar[dict] = dict(n_embd="d_model", learning_rate="init_lr")  # nanoGPT's names
    ANSWERS: ClassVar[dict] = LANGUAGE_MODEL
    NEEDS: ClassVar[dict] = dict(lr_decay_iters=("decay_lr", NANOGPT), min_lr=("decay_lr", NANOGPT))
    POSITIVE: ClassVar[tuple] = ("init_lr", "lr_decay_iters")
    AT_LEAST: ClassVar[dict] = dict(
        batch_size=1, gradient_accumulation_steps=1, block_size=1,
        max_iters=0, warmup_iters=0, eval_interval=1, eval_iters=1, min_lr=0,
    )

    def __post_init__(self):
        if self.init_from not in STARTS:  # nanoGPT's way of naming weights
            self.pretrained, self.init_from = self.init_from, "scratch"
        super().__post_init__()
        if self.vocab_size < 1 and self.vocab_size != -1:
            raise BadInput(f"vocab_size is {self.vocab_size}, it must be at least 1, or -1")
        if self.decay_lr and self.min_lr > self.init_lr:
            raise BadInput(f"min_lr {self.min_lr} is above init_lr {self.init_lr}: the rate would rise")


def losses(network, windows):
    """Cross-entropy of every token but the first of the windows (B, block_size + 1), in nats per token."""
    windows = windows.long()
    return {"train/loss": network(windows[:, :-1], windows[:, 1:])[1]}


def validation_windows(corpus, cfg):
    """`text_windows` in batches of batch_size; the last one is filled up with windows that do not count."""
    inputs, targets = text_windows(corpus.val, cfg.block_size, EVAL_WINDOWS * cfg.eval_iters)
    room = ((0, -len(inputs) % cfg.batch_size), (0, 0))
    inputs, targets = np.pad(inputs, room), np.pad(targets, room, constant_values=IGNORED)
    shape = -1, cfg.batch_size, cfg.block_size
    return inputs.reshape(shape), targets.reshape(shape)


def evaluate(network, windows, process):
    """Mean loss over the validation text, the same windows for every run whatever its seed and batch size."""
    inputs, targets = windows
    counts = [int((part != IGNORED).sum()) for part in targets]
    means = torch.zeros(len(counts), device=process.device)
    for i in process.world.part(len(counts)):
        x, y = to_device(inputs[i], process.device).long(), to_device(targets[i], process.device)
        with process.autocast():
            means[i] = network(x, y)[1]
    total = sum(loss * n for loss, n in zip(process.world.collect(means).tolist(), counts, strict=True))
    return {"val/loss": total / sum(counts), "val/tokens": sum(counts)}


def headline(metrics):
    return f"val loss {metrics['val/loss']:.4f}", metrics["val/loss"]


def rate_factor(cfg, step):
    """Share of the peak learning rate at a step."""
    if not (cfg.decay_lr or cfg.warmup_constant):
        return 1.0
    floor = cfg.min_lr / cfg.init_lr if cfg.decay_lr else 1.0
    return lr_factor(step, cfg.warmup_iters, cfg.lr_decay_iters, floor)


def training(cfg, **one_of_several):
    """The run that the settings ask for, step by step: it yields before each, so that several can take turns.

    one_of_several: what training/together.py passes to `Run` then.
    """
    if cfg.pretrained:
        cfg = replace(cfg, **architecture(cfg))
    model_cfg, folder = cfg.model_config(), find_corpus(cfg.data_dir, cfg.dataset)
    corpus = load_corpus(folder, cfg.block_size, None if cfg.vocab_size == -1 else cfg.vocab_size)
    process = Process(
        cfg, micro_batches=cfg.gradient_accumulation_steps, cuda_graph=cfg.cuda_graph,
        attention_backend=cfg.attention_backend,
    )  # fmt: skip
    run = Run(cfg, "train.py", process.world, **one_of_several)
    process.join()
    model = process.initialised(lambda: GPT(model_cfg, corpus.vocab_size, cfg.tie_weights), cfg.mup)
    if cfg.pretrained and not run.saved:
        load_pretrained(model, cfg.pretrained)
    network = process.network(model)
    optimizer = Optimizer(model, cfg.init_lr, cfg, process.device, mup=cfg.mup)
    meter = LossMeter(process.world, overflows=cfg.dtype == "float16")
    mine = process.share

    def draw(steps):
        """This process's random windows of consecutive steps: (steps, micro-batches, rows, block_size + 1)."""
        indices = [step * cfg.gradient_accumulation_steps + micro for step in steps for micro in mine.micro_batches]
        batch = dict(seed=cfg.seed, batch_size=cfg.batch_size, rows=mine.rows)
        windows = draw_windows(corpus.train, cfg.block_size + 1, indices=indices, **batch)
        return windows.reshape(len(steps), len(mine.micro_batches), *windows.shape[1:])

    def train_step(step, *windows):
        weight = 1 / len(windows)
        for micro, part in zip(mine.micro_batches, windows, strict=True):
            with process.micro_batch(network, step, micro):
                with process.autocast():
                    found = losses(network, part)
                optimizer.backward(found["train/loss"] * weight)
            meter.add(found, step, weight)
        meter.add_gradient_norm(optimizer.clip(cfg.grad_clip), step)
        optimizer.step()

    validation, cost = validation_windows(corpus, cfg), model.compute(cfg.block_size)
    sequences = cfg.batch_size * cfg.gradient_accumulation_steps
    loop = Loop(
        cfg, process, run, model, optimizer, meter,
        evaluate=lambda: evaluate(network, validation, process),
        headline=headline,
        cost=lambda step: counted(cost, sequences, cfg.block_size),
        state=lambda: dict(corpus=corpus.meta),  # sample.py decodes with it
        always_save=cfg.always_save_checkpoint,
    )  # fmt: skip
    if run.saved:
        with reading(run.folder / "ckpt.pt"):
            same = run.saved["corpus"]["sha256"] == corpus.meta["sha256"]
        if not same:
            raise BadInput(f"{folder} is not the corpus that {run.folder} was trained on")
    if cfg.eval_only:
        print(f"step {loop.step}: {headline(loop.evaluation())[0]}")
        process.world.leave()
        return
    windows, take_step = WindowStream(draw, cfg.max_iters, process.device), process.captured(train_step)
    with loop:
        for step in loop:
            yield
            optimizer.set_rate(rate_factor(cfg, step))
            take_step(step, *windows.at(step).unbind())


@command
def main(argv=None):
    for _ in training(configure(Settings, argv)):
        pass


if __name__ == "__main__":
    main()
