"""Train a language model, of characters or of BPE tokens, with any scoring function.

    python train.py config/struct_configs/tiny_mlr.py
    python train.py config/struct_configs/train_struct_gpt2.py --d_model=256 --token_mixing_struct=multi_level_low_rank

From top to bottom: the settings, where batches come from, what a loss and an evaluation are. The loop itself is in
training/loop.py. On one GPU a step, all its micro-batches, is a CUDA graph (training/capture.py); on the CPU, in
float16 and with several processes it is run as it is.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from data.corpus import load_corpus
from data.windows import IGNORED, WindowStream, draw_windows, text_windows, to_device
from model import GPT
from training.configurator import configure, setting
from training.errors import BadInput, command
from training.loop import Experiment
from training.schedule import lr_factor
from training.settings import RunSettings, StructureSettings

EVAL_WINDOWS = 32  # windows that one of eval_iters stands for, whatever the batch size


@dataclass
class Settings(RunSettings, StructureSettings):
    """Train a language model. Config files and flags, the later one winning."""

    dataset: str = setting("openwebtext_small", "folder in data_dir that holds train.bin, val.bin and meta.json")
    data_dir: str = setting("data", "where the prepared datasets are", free=True)
    batch_size: int = setting(4, "sequences in a micro-batch")
    gradient_accumulation_steps: int = setting(8, "micro-batches in a step, of all processes together")
    max_iters: int = setting(100_000, "steps to train for", free=True)
    init_lr: float = setting(3e-3, "peak learning rate at fan-in 768; other widths follow by µP")
    warmup_iters: int = setting(2_000, "steps of linear warm-up")
    decay_lr: bool = setting(False, "cosine decay after the warm-up; otherwise constant")
    lr_decay_iters: int = setting(100_000, "step at which a decaying rate reaches min_lr")
    min_lr: float = setting(0.0, "rate at which the decay ends")
    eval_interval: int = setting(1_000, "steps between two evaluations, each followed by a checkpoint", free=True)
    eval_iters: int = setting(200, "evaluations read 32 times as many windows, spread over the text, or all", free=True)
    cuda_graph: str = setting("auto", "steps as a CUDA graph: True, False; auto: on one GPU, not float16", free=True)
    eval_only: bool = setting(False, "evaluate once, print the loss and stop; nothing is written", free=True)
    always_save_checkpoint: bool = setting(True, "save after every evaluation, not only after the best", free=True)

    ALIASES: ClassVar[dict] = dict(n_embd="d_model", learning_rate="init_lr")  # nanoGPT's names
    POSITIVE: ClassVar[tuple] = ("init_lr",)
    AT_LEAST: ClassVar[dict] = dict(
        batch_size=1, gradient_accumulation_steps=1, block_size=1,
        max_iters=0, warmup_iters=0, eval_interval=1, eval_iters=1,
    )


class LanguageModelling(Experiment):
    """Next-token prediction; losses in nats per token."""

    def __init__(self, cfg):
        model_cfg = cfg.model_config()
        self.corpus = load_corpus(Path(cfg.data_dir) / cfg.dataset, cfg.block_size)
        super().__init__(cfg, "train.py", lambda: GPT(model_cfg, self.corpus.vocab_size), cfg.init_lr)
        self.stream = WindowStream(self.step_windows, cfg.max_iters, self.device)
        if self.run.saved and self.run.saved["corpus"]["sha256"] != self.corpus.meta["sha256"]:
            raise BadInput(f"{cfg.data_dir}/{cfg.dataset} is not the corpus that {self.run.folder} was trained on")

    def step_windows(self, steps):
        """This process's random windows of consecutive steps, inputs and targets in one.

        (steps, micro-batches, rows, block_size + 1)
        """
        cfg, share = self.cfg, self.share
        indices = [step * self.micro_batches + micro for step in steps for micro in share.micro_batches]
        batch = dict(seed=cfg.seed, batch_size=cfg.batch_size, rows=share.rows)
        windows = draw_windows(self.corpus.train, cfg.block_size + 1, indices=indices, **batch)
        return windows.reshape(len(steps), len(share.micro_batches), *windows.shape[1:])

    def inputs(self, step):
        return self.stream.at(step).unbind()

    def losses(self, network, windows):
        windows = windows.long()
        return {"train/loss": network(windows[:, :-1], windows[:, 1:])[1]}

    def evaluate(self):
        """Mean loss over the validation text, the same windows for every run whatever its seed and batch size."""
        inputs, targets = self.validation
        counts = [int((part != IGNORED).sum()) for part in targets]
        losses = torch.zeros(len(counts), device=self.device)
        for i in self.world.part(len(counts)):
            x, y = to_device(inputs[i], self.device).long(), to_device(targets[i], self.device)
            with self.context():
                losses[i] = self.network(x, y)[1]
        total = sum(loss * n for loss, n in zip(self.world.collect(losses).tolist(), counts, strict=True))
        return {"val/loss": total / sum(counts), "val/tokens": sum(counts)}

    @functools.cached_property
    def validation(self):
        """`text_windows` in batches of batch_size; the last one is filled up with windows that do not count."""
        n, most = self.cfg.batch_size, EVAL_WINDOWS * self.cfg.eval_iters
        inputs, targets = text_windows(self.corpus.val, self.cfg.block_size, most)
        room = ((0, -len(inputs) % n), (0, 0))
        inputs, targets = np.pad(inputs, room), np.pad(targets, room, constant_values=IGNORED)
        return inputs.reshape(-1, n, self.cfg.block_size), targets.reshape(-1, n, self.cfg.block_size)

    def headline(self, metrics):
        return f"val loss {metrics['val/loss']:.4f}", metrics["val/loss"]

    def summary(self, means):
        return means

    def lr_factor(self, step):
        cfg = self.cfg
        floor = cfg.min_lr / cfg.init_lr if cfg.decay_lr else 1.0
        return lr_factor(step, cfg.warmup_iters, cfg.lr_decay_iters, floor)

    def step_cost(self, step):
        cfg, cost = self.cfg, self.cost(self.cfg.block_size)
        n = cfg.batch_size * cfg.gradient_accumulation_steps
        return Counter(
            tokens=n * cfg.block_size,
            compute=6 * n * cost.macs,
            non_emb_compute=6 * n * cost.non_emb,
            paper_compute=n * cost.paper,
        )

    def state(self):
        return dict(super().state(), corpus=self.corpus.meta)  # sample.py decodes with it


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    experiment = LanguageModelling(cfg)
    if cfg.eval_only:
        experiment.model.eval()
        with torch.no_grad():
            print(f"step {experiment.step}: {experiment.headline(experiment.evaluate())[0]}")
        experiment.world.leave()
    else:
        experiment.fit()


if __name__ == "__main__":
    main()
