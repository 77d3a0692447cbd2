"""Train a transformer to regress in context, with any scoring function.

    python train_ICL.py config/icl_configs/tiny.py config/icl_configs/tiny_bilinear_btt.py
    python train_ICL.py config/icl_configs/paper.py --n_dims=16 --d_model=128 --token_mixing_struct=bilinear_BTT

A prompt is x_1, y_1, x_2, y_2, ..; the model predicts every y_i from what came before it. In noisy_recall it is pairs
and a query, one token each, and the model predicts at the query alone (data/icl_regression/layouts.py). From top to
bottom: the settings, the loss, the evaluation, and the run: its prompts (data/icl_regression), model, optimizer, step
and loop. What is due around a step (records, checkpoints, resumes, stops) is in training/loop.py. On one GPU a step is
a CUDA graph (training/capture.py); on the CPU, in float16 and with several processes it is called as it is.
"""

import functools
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from data.icl_regression.baselines import baseline_errors, recall_errors
from data.icl_regression.curriculum import planned
from data.icl_regression.layouts import LAYOUTS
from data.icl_regression.sampler import evaluation_prompts, sample_prompts, training_examples
from data.icl_regression.stream import PromptStream
from data.icl_regression.tasks import QUERY_TASKS
from model import InContextRegressor
from training.configurator import configure, setting
from training.errors import BadInput, command
from training.loop import Loop, LossMeter, counted
from training.optimizer import Optimizer
from training.originals import IN_CONTEXT
from training.process import Process
from training.run import Run
from training.schedule import lr_factor
from training.settings import RunSettings, StructureSettings
from training.signals import say

TASK_OPTIONS = {  # task: its own settings
    "sparse_linear_regression": ("sparsity",),
    "relu_2nn_regression": ("hidden",),
    "decision_tree": ("depth",),
    "noisy_recall": ("query_noise",),
}


@dataclass
class Settings(RunSettings, StructureSettings):
    """Train a transformer on in-context regression. Config files and flags, the later one winning."""

    n_dims: int = setting(16, "dimension d of x")
    n_positions: int = setting(-1, "pairs in a prompt, noisy_recall's query one of them; -1: 2 n_dims")
    block_size: int = setting(-1, "longest prompt, in tokens; -1: two for each pair (noisy_recall: one)")
    d_model: int = setting(128, "model width")
    n_head: int = setting(8, "number of heads; -1: d_model / d_head")
    d_head: int = setting(-1, "width of a head; -1: d_model / n_head")
    mlr_rank_list: str = setting("8|4|2|2", "rank of every level, coarse to fine; they add up to the head width")
    training_task: str = setting("linear_regression", f"one of {', '.join(LAYOUTS)}")
    task_sparsity: int = setting(3, "non-zero coefficients of sparse_linear_regression")
    task_hidden: int = setting(100, "hidden units of relu_2nn_regression")
    task_depth: int = setting(4, "depth of decision_tree")
    task_query_noise: float = setting(0.7, "how far noisy_recall's query is from its x, before it has length 1 again")
    noise_std: float = setting(0.0, "standard deviation of the noise on y")
    training_num_training_examples: int = setting(-1, "size of the pool of training prompts; -1: fresh ones each step")
    batch_size: int = setting(64, "prompts in a step, of all processes together")
    max_iters: int = setting(500_001, "steps to train for", free=True)
    training_learning_rate: float = setting(3e-4, "peak learning rate at fan-in 768; other widths follow by µP")
    warmup_iters: int = setting(1_000, "steps of linear warm-up; constant after it")
    grad_clip: float = setting(0.0, "largest gradient norm; 0: no clipping, as in the original")
    training_curriculum_adaptive_inc: bool = setting(True, "grow dims and points to full size within the warm-up ratio")
    training_curriculum_steps: int = setting(-1, "length of training that the growth is planned for; -1: max_iters")
    training_curriculum_warmup_ratio: float = setting(0.06, "share of these steps in which adaptive growth is to end")
    training_curriculum_dims_start: int = setting(-1, "dims at the start; -1: 4, or n_dims if that is less")
    training_curriculum_dims_end: int = setting(-1, "dims at the end; -1: n_dims")
    training_curriculum_dims_inc: int = setting(-1, "dims added every interval; -1: by the adaptive rule, or 1")
    training_curriculum_dims_interval: int = setting(2_000, "steps between two increases of dims")
    training_curriculum_points_start: int = setting(-1, "pairs at the start; -1: 8, or n_positions if that is less")
    training_curriculum_points_end: int = setting(-1, "pairs at the end; -1: n_positions")
    training_curriculum_points_inc: int = setting(-1, "pairs added every interval; -1: twice what dims grow by")
    training_curriculum_points_interval: int = setting(2_000, "steps between two increases of pairs")
    eval_interval: int = setting(2_500, "steps between two evaluations, each followed by a checkpoint", free=True)
    eval_prompts: int = setting(3_200, "prompts in an evaluation, none from the pool, always the same", free=True)
    eval_batch_size: int = setting(64, "prompts the evaluation takes at a time; changes no result", free=True)
    cuda_graph: str = setting("auto", "steps as a CUDA graph: True, False; auto: on one GPU, not float16", free=True)
    ridge_alpha: float = setting(0.1, "penalty of the ridge baseline")

    ALIASES: ClassVar[dict] = dict(
        training_train_steps="max_iters", training_batch_size="batch_size",
        learning_rate="training_learning_rate", n_embd="d_model",
        evaluation_interval="eval_interval", wandb_name="wandb_run_name", wandb_log_every_steps="log_interval",
    )  # fmt: skip
    ANSWERS: ClassVar[dict] = IN_CONTEXT
    POSITIVE: ClassVar[tuple] = ("training_learning_rate", "ridge_alpha")
    AT_LEAST: ClassVar[dict] = dict(
        n_dims=1, batch_size=1, max_iters=0, warmup_iters=0, eval_interval=1, eval_prompts=1, eval_batch_size=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.training_task not in LAYOUTS:
            raise BadInput(f"no task '{self.training_task}', there are {', '.join(LAYOUTS)}")
        if not 0 <= self.training_curriculum_warmup_ratio <= 1:
            ratio = self.training_curriculum_warmup_ratio
            raise BadInput(f"training_curriculum_warmup_ratio is {ratio}, a share is from 0 to 1")
        if self.training_curriculum_steps != -1 and self.training_curriculum_steps < 1:
            raise BadInput(f"training_curriculum_steps is {self.training_curriculum_steps}, it is at least 1, or -1")
        if self.points < 1:
            raise BadInput(f"n_positions is {self.n_positions}, a prompt has at least 1 pair")
        if self.tokens < (needed := self.layout.per_point * self.points):
            raise BadInput(f"block_size {self.block_size} does not hold {self.points} pairs, {needed} tokens")

    @property
    def points(self):
        return 2 * self.n_dims if self.n_positions == -1 else self.n_positions

    @property
    def layout(self):
        return LAYOUTS[self.training_task]

    @property
    def tokens(self):
        return self.layout.per_point * self.points if self.block_size == -1 else self.block_size

    def curriculum(self):
        """Growth of dims and points; BadInput where two settings contradict each other."""
        return planned(self)

    def pool(self):
        """The keywords that say which examples a step trains on."""
        pool_size = None if self.training_num_training_examples == -1 else self.training_num_training_examples
        return dict(seed=self.seed, batch_size=self.batch_size, pool_size=pool_size)

    def task(self):
        """The keywords that make prompts of this task."""
        options = {name: getattr(self, f"task_{name}") for name in TASK_OPTIONS.get(self.training_task, ())}
        return dict(task=self.training_task, n_dims=self.n_dims, noise_std=self.noise_std, **options)


def losses(network, layout, x, y, weight):
    """Squared error of the predictions, weighed by position, and that of predicting zero."""
    target = y[:, layout.predicted]
    error = (network(layout.tokens(x, y)).float() - target).square()
    return {"overall_loss": (error.mean(0) * weight).sum(), "zero": (target.square().mean(0) * weight).sum()}


def evaluate(network, cfg, process):
    """Squared error by number of examples seen, at full size, on prompts that are not in the pool."""
    layout, device = cfg.layout, process.device
    firsts = range(0, cfg.eval_prompts, cfg.eval_batch_size)
    shape = len(firsts), layout.count(cfg.points)
    errors = torch.zeros(shape, dtype=torch.float64, device=device)  # summed over prompts
    for i in process.world.part(len(firsts)):
        count = min(cfg.eval_batch_size, cfg.eval_prompts - firsts[i])
        x, y = evaluation_prompts(first=firsts[i], count=count, n_points=cfg.points, device=device, **cfg.task())
        with process.autocast():
            errors[i] = (network(layout.tokens(x, y)).double() - y[:, layout.predicted]).square().sum(0)
    error = (process.world.collect(errors).sum(0) / cfg.eval_prompts).tolist()
    baselines = simple_methods(cfg.eval_prompts, cfg.points, cfg.ridge_alpha, device, **cfg.task())
    return {"eval_pointwise/loss": error, "eval/last": error[-1], "baselines": baselines}


@functools.cache
def simple_methods(count, n_points, ridge_alpha, device, **task):
    """{name: errors} of methods that need no training, on the prompts of the evaluation: once for all runs."""
    parts = []
    for first in range(0, count, 64):
        n = min(64, count - first)
        parts.append(evaluation_prompts(first=first, count=n, n_points=n_points, device=device, **task))
    x, y = (torch.cat(same) for same in zip(*parts, strict=True))
    found = recall_errors(x, y) if task["task"] in QUERY_TASKS else baseline_errors(x, y, ridge_alpha)
    return {name: errors.tolist() for name, errors in found.items()}


def headline(metrics):
    last = {name: errors[-1] for name, errors in metrics["baselines"].items()}
    seen, best = len(next(iter(metrics["baselines"].values()))) - 1, next(iter(last))
    words = f"error after {seen} examples {metrics['eval/last']:.4f}"
    return f"{words} (zero {last['zero']:.3f}, {best.replace('_', ' ')} {last[best]:.2g})", metrics["eval/last"]


def rate_factor(cfg, step):
    """Share of the peak learning rate at a step: constant after the warm-up."""
    return lr_factor(step, cfg.warmup_iters)


def training(cfg, **one_of_several):
    """The run that the settings ask for, step by step: it yields before each, so that several can take turns.

    one_of_several: what training/together.py passes to `Run` then.
    """
    curriculum, layout, model_cfg = cfg.curriculum(), cfg.layout, cfg.model_config(block_size=cfg.tokens)
    examples = training_examples(step=0, **cfg.pool())  # refuses a pool that is too small; then a task that cannot be
    sample_prompts(seed=cfg.seed, examples=examples[:1], n_points=cfg.points, **cfg.task())

    process = Process(cfg, cuda_graph=cfg.cuda_graph, attention_backend=cfg.attention_backend)
    run = Run(cfg, "train_ICL.py", process.world, **one_of_several)
    process.join()
    model = process.initialised(
        lambda: InContextRegressor(model_cfg, cfg.n_dims, layout.extra_inputs, layout.predicting), cfg.mup
    )
    network = process.network(model)
    optimizer = Optimizer(model, cfg.training_learning_rate, cfg, process.device, mup=cfg.mup)
    meter = LossMeter(process.world, overflows=cfg.dtype == "float16")
    # Compiled and recorded steps take prompts of full length, so that nothing is compiled or recorded again: the points
    # that the curriculum has not reached weigh 0, and no position before them sees them. The loss is that of the
    # shorter prompt to rounding, and the counters count the shorter prompt.
    prompts = PromptStream(
        curriculum, cfg.pool(), cfg.task(), cfg.max_iters, rows=process.share.rows, device=process.device,
        full_points=cfg.points if process.fixed_shapes else None, predicted=layout.predicted,
    )  # fmt: skip

    def train_step(step, x, y, weight):
        with process.micro_batch(network, step, 0):
            with process.autocast():
                found = losses(network, layout, x, y, weight)
            optimizer.backward(found["overall_loss"])
        meter.add(found, step, 1)
        meter.add_gradient_norm(optimizer.clip(cfg.grad_clip), step)
        optimizer.step()

    def summary(means):
        dims, points = curriculum.at(loop.step - 1)
        loss = means["overall_loss"]
        return dict(overall_loss=loss, excess_loss=loss / means["zero"], n_dims=dims, n_points=points)

    cost, full = functools.cache(model.compute), model.compute(cfg.tokens)

    def step_cost(step):
        """The paper charges a token of a shorter prompt what one of a full prompt costs (DESIGN 7)."""
        B, T = cfg.batch_size, layout.per_point * curriculum.at(step)[1]
        found = counted(cost(T), B, T)
        found["paper_compute"] = B * T * full.paper / cfg.tokens
        return found

    loop = Loop(
        cfg, process, run, model, optimizer, meter, evaluate=lambda: evaluate(network, cfg, process),
        headline=headline, cost=step_cost, summary=summary, state=lambda: dict(curriculum=asdict(curriculum)),
    )  # fmt: skip
    if run.saved and run.saved["curriculum"] != asdict(curriculum):
        raise BadInput(
            f"{run.folder} was trained on another curriculum, planned for another number of steps; "
            f"resume it with the --training_curriculum_steps (-1: --max_iters) that it began with"
        )
    if (full_from := curriculum.full_from()) >= cfg.max_iters > 0:
        say(f"note: prompts reach their full size at step {full_from}, this run ends at {cfg.max_iters}")
    take_step = process.captured(train_step)
    with loop:
        for step in loop:
            yield
            optimizer.set_rate(rate_factor(cfg, step))
            take_step(step, *prompts.at(step))


@command
def main(argv=None):
    for _ in training(configure(Settings, argv)):
        pass


if __name__ == "__main__":
    main()
