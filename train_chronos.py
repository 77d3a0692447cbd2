"""Train or fine-tune a Chronos T5, with its own self-attention or with MLR attention, and forecast ETT series with it.

    pip install -r requirements-chronos.txt
    python train_chronos.py config/ts_configs/chronos_tiny.py
    python train_chronos.py --pretrained=amazon/chronos-t5-tiny --token_mixing_struct=multi_level_low_rank

A window of look_back values becomes tokens, the model predicts those of the next horizon values. From top to bottom:
the settings, the windows of a step and their tokens, the loss, the evaluation, and the run: its series, model,
optimizer, step and loop. Tokens, model and quantile forecasts are chronos-forecasting's, MLR attention is in
chronos_mlr.py; what is due around a step (records, checkpoints, resumes, stops) is in training/loop.py.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import numpy as np
import torch

from data.kernel_synth import kernel_synth
from data.series import Windows
from training.configurator import configure, setting
from training.errors import BadInput, command
from training.loop import Loop, LossMeter, counted
from training.optimizer import Optimizer
from training.process import Process
from training.run import Run
from training.settings import RunSettings

STRUCTURES = ("low_rank", "multi_level_low_rank")
QUANTILES = tuple(q / 10 for q in range(1, 10))


@dataclass
class Settings(RunSettings):
    """Train or fine-tune a Chronos T5. Config files and flags, the later one winning."""

    pretrained: str = setting("", "weights to begin with: a folder or a name on the hub; empty: random ones")
    dataset: str = setting("ETTh1", "folder in data_dir that data/ett/prepare.py or data/csv/prepare.py made")
    data_dir: str = setting("data/ett", "where the prepared series are", free=True)
    features: str = setting("M", "channels, each its own series: M, all of them, or S, the target alone")
    target: str = setting("", "features S: the column; empty: the last", before="")
    synthetic: float = setting(0.1, "share of training windows that are draws from Gaussian processes (KernelSynth)")
    look_back: int = setting(512, "values of the past that the model reads")
    horizon: int = setting(64, "values of the future that it predicts")
    n_layer: int = setting(4, "random weights: number of blocks, of the encoder and of the decoder")
    d_model: int = setting(256, "random weights: model width")
    n_head: int = setting(4, "random weights: number of heads")
    d_head: int = setting(64, "random weights: width of a head")
    d_ff: int = setting(1024, "random weights: width of the MLPs")
    n_tokens: int = setting(4096, "random weights: size of the vocabulary; values get n_tokens - 3 bins")
    dropout: float = setting(0.1, "random weights: dropout probability")
    token_mixing_struct: str = setting("low_rank", "self-attention: low_rank (T5's own) or multi_level_low_rank")
    mlr_rank_list: str = setting("32|16|8|8", "rank of every level, coarse to fine; they add up to the head width")
    mlr_block_size_list: str = setting("default", "encoder: block length of every level; default: halved")
    mlr_decoder_block_size_list: str = setting("default", "decoder: block length of every level; default: halved")
    mlr_block_divide_by_num_levels: bool = setting(False, "scores times number of levels / number of levels shared")
    batch_size: int = setting(32, "windows in a step, of all processes together")
    max_iters: int = setting(200_000, "steps to train for; the rate falls to 0 there")
    init_lr: float = setting(1e-3, "peak learning rate, of all weights")
    warmup_iters: int = setting(0, "steps of linear warm-up")
    eval_interval: int = setting(1_000, "steps between two evaluations, each followed by a checkpoint", free=True)
    eval_windows: int = setting(64, "windows of a split, evenly spaced, that an evaluation forecasts; 0: all")
    eval_batch_size: int = setting(64, "series that are forecast at a time")
    num_samples: int = setting(20, "sampled futures that a forecast's quantiles are taken from")

    ALIASES: ClassVar[dict] = dict(n_embd="d_model", learning_rate="init_lr")
    POSITIVE: ClassVar[tuple] = ("init_lr",)
    AT_LEAST: ClassVar[dict] = dict(
        look_back=1, horizon=1, n_layer=1, d_model=1, n_head=1, d_head=1, d_ff=1, n_tokens=8, batch_size=1, max_iters=0,
        warmup_iters=0, eval_interval=1, eval_windows=0, eval_batch_size=1, num_samples=1, synthetic=0, dropout=0,
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.fsdp:
            raise BadInput("fsdp divides the models of model.py; a Chronos is whole in every process")
        if self.token_mixing_struct not in STRUCTURES:
            raise BadInput(f"token_mixing_struct is '{self.token_mixing_struct}', there are {', '.join(STRUCTURES)}")
        if self.features not in ("M", "S"):
            raise BadInput(f"features is '{self.features}', there are M (all channels) and S (the target alone)")
        if self.synthetic > 1:
            raise BadInput(f"synthetic is {self.synthetic}, a share is at most 1")
        if self.dropout >= 1:
            raise BadInput(f"dropout is {self.dropout}, it must be below 1")


def training_window(data, cfg, number):
    """Training window `number`, (look_back + horizon,): a channel of the series or a synthetic one.

    A pure function of (seed, number).
    """
    rng = np.random.Generator(np.random.Philox(key=[cfg.seed, 0], counter=[0, 0, 0, number]))
    if rng.random() < cfg.synthetic:
        return torch.from_numpy(kernel_synth(cfg.seed, number, cfg.look_back + cfg.horizon)).float()
    past, future = data.batch([rng.choice(data.first["train"])])
    return torch.cat([past, future], 1)[0, :, rng.integers(data.channels)].cpu()


def as_tokens(tokenizer, windows, cfg):
    """input_ids, attention_mask and labels of windows (B, look_back + horizon); labels are -100 where none is asked."""
    past, future = windows.split([cfg.look_back, cfg.horizon], 1)
    input_ids, attention_mask, scale = tokenizer.context_input_transform(past)
    labels, asked = tokenizer.label_input_transform(future, scale)
    return input_ids, attention_mask, labels.masked_fill(~asked, -100)


def losses(network, input_ids, attention_mask, labels):
    """Cross-entropy of the future's tokens in nats."""
    return {"train/loss": network(input_ids, attention_mask, labels)}


def errors(model, data, cfg, process, split):
    """Errors of the library's quantile forecasts: MSE and MAE of the median, and the mean weighted quantile loss.

    The last is 2 sum(pinball loss) / sum |y|, averaged over the quantiles 0.1 to 0.9. A batch of series has its own
    random numbers, those of its place: neither the training nor the number of processes moves them.
    """
    rows, device = data.first[split], process.device
    rows = rows[:: max(1, len(rows) // cfg.eval_windows)][: cfg.eval_windows] if cfg.eval_windows else rows
    series = [(row, channel) for row in rows for channel in range(data.channels)]
    batches = range(0, len(series), cfg.eval_batch_size)
    sums = torch.zeros(len(batches), 4, dtype=torch.float64)
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), process.autocast():
        for i in process.world.part(len(batches)):
            torch.manual_seed(i)
            chosen = torch.tensor(series[batches[i] : batches[i] + cfg.eval_batch_size])
            past, future = data.batch(chosen[:, 0])  # (B, look_back, channels)
            past, future = (x.cpu()[range(len(chosen)), :, chosen[:, 1]] for x in (past, future))
            quantiles, _ = model.pipeline.predict_quantiles(past, cfg.horizon, list(QUANTILES))
            error = future[..., None].double() - quantiles.double()  # (B, horizon, quantiles)
            median = error[..., QUANTILES.index(0.5)]
            pinball = torch.maximum(levels * error, (levels - 1) * error)
            sums[i] = torch.stack([x.sum() for x in (median.square(), median.abs(), 2 * pinball, future.abs())])
    squared, absolute, pinball, size = process.world.collect(sums).sum(0).tolist()
    count = len(series) * cfg.horizon
    return dict(mse=squared / count, mae=absolute / count, wql=pinball / len(QUANTILES) / size)


def evaluate(model, data, cfg, process):
    val, test = (errors(model, data, cfg, process, split) for split in ("val", "test"))
    return {"val/mse": val["mse"], "val/wql": val["wql"], **{f"test/{name}": value for name, value in test.items()}}


def headline(metrics):
    """The evaluation of lowest weighted quantile loss counts as best."""
    return ", ".join(f"{name.replace('/', ' ')} {value:.4f}" for name, value in metrics.items()), metrics["val/wql"]


def rate_factor(cfg, step):
    """Share of the peak learning rate at a step: it falls to 0 at the last one."""
    return min((step + 1) / (cfg.warmup_iters + 1), 1 - step / cfg.max_iters)


def training(cfg):
    """The run that the settings ask for, step by step.

    The finished model is left in out_dir/chronos, for chronos_mlr.load_pipeline. With T5's own attention
    ChronosPipeline.from_pretrained loads it, too; with MLR attention once chronos_mlr is imported, and it refuses the
    folder before.
    """
    from chronos_mlr import Chronos, pipeline_for  # which need requirements-chronos.txt

    data = Windows(cfg)
    process = Process(cfg)
    run = Run(cfg, "train_chronos.py", process.world)
    process.join()
    model = process.initialised(lambda: Chronos(pipeline_for(cfg)))
    network = process.network(model)
    optimizer = Optimizer(model, cfg.init_lr, cfg, process.device)
    meter = LossMeter(process.world, overflows=cfg.dtype == "float16")
    data.to(process.device)

    def inputs(step):
        numbers = range(step * cfg.batch_size, (step + 1) * cfg.batch_size)[process.share.rows]
        windows = torch.stack([training_window(data, cfg, number) for number in numbers])
        return (x.to(process.device) for x in as_tokens(model.pipeline.tokenizer, windows, cfg))

    def train_step(step, *tokens):
        with process.micro_batch(network, step, 0):
            with process.autocast():
                found = losses(network, *tokens)
            optimizer.backward(found["train/loss"])
        meter.add(found, step, 1)
        meter.add_gradient_norm(optimizer.clip(cfg.grad_clip), step)
        optimizer.step()

    cost = model.compute(model.block_size)
    loop = Loop(
        cfg, process, run, model, optimizer, meter, headline=headline,
        evaluate=lambda: evaluate(model, data, cfg, process),
        cost=lambda step: counted(cost, cfg.batch_size, model.block_size),
        state=lambda: dict(sha256=data.sha256),
    )  # fmt: skip
    if run.saved is None:
        model.load_state_dict(model.initial)
    elif run.saved["sha256"] != data.sha256:
        raise BadInput(f"{cfg.data_dir}/{cfg.dataset} is not the series that {run.folder} was trained on")
    with loop:
        for step in loop:
            yield
            optimizer.set_rate(rate_factor(cfg, step))
            train_step(step, *inputs(step))
    if process.world.rank == 0:
        model.t5.save_pretrained(run.folder / "chronos")


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    missing = [name for name in ("chronos", "transformers") if find_spec(name) is None]
    if missing:
        raise BadInput(f"no package {' and '.join(missing)}: pip install -r requirements-chronos.txt")
    from transformers.utils import logging

    logging.disable_progress_bar()
    for _ in training(cfg):
        pass


if __name__ == "__main__":
    main()
