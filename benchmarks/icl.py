"""`bench.py icl`: training steps of train_ICL.py as users run them, beside the plain way of doing the same."""

import random
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import torch

import train_ICL
from benchmarks.measure import BenchSettings, Started, afresh, chosen, parse_pairs, plain_step, time_step
from data.icl_regression.sampler import interleave
from model import InContextRegressor
from structured.functional import low_rank_scores, mix, visible
from structured.scorings.base import Scoring
from training.capture import wanted
from training.configurator import setting
from training.devices import allow_tf32, autocast
from training.mup import initialise, param_groups
from training.together import many_programs

POOL = 32_000_064  # training prompts of the paper
STRUCTURES = ("low_rank", "bilinear_MLR", "bilinear_BTT")
COLUMNS = {  # key: format
    "n_dims": "d", "d_model": "d", "token_mixing_struct": "20s", "loop": "10s", "ms": ".2f", "steps_per_s": ".2f",
    "peak_MiB": ",.0f", "times_reference": ".2f",
}  # fmt: skip


@dataclass
class Settings(BenchSettings):
    """Time training steps in context: prompts, forward, backward, clip, AdamW, sums of losses; beside the plain way.

    The row "train_ICL" is the loop that train_ICL.py runs, without evaluations. The row "reference" is eager: prompts
    drawn one by one on the host, dense T x T scores, AdamW with foreach, the loss read at every step. The row "n at
    once" is n runs in one process (training/together.py), with all their steps counted. peak_MiB is the
    most memory allocated during a step once all kernels are compiled and chosen.
    """

    sizes: str = setting("8x64", "n_dims x d_model of every model, with | between them")
    token_mixing_struct: str = setting("all", f"scoring functions with | between them, or all: {', '.join(STRUCTURES)}")
    n_layer: int = setting(6, "number of blocks")
    n_head: int = setting(8, "number of heads")
    batch_size: int = setting(64, "prompts of 2 n_dims pairs")
    compile: bool = setting(False, "torch.compile the model of train_ICL")
    keep: float = setting(1.0, "compile: share of the activations that train_ICL keeps")
    cuda_graph: str = setting("auto", "let train_ICL replay steps as a CUDA graph: auto, True, False")
    tf32: bool = setting(False, "let float32 matmuls on the GPU round their inputs to TF32")
    repeats: int = setting(1, "timings that the median is taken of")
    together: int = setting(1, "also time so many runs in one process, all their steps counted")
    steps: int = setting(64, "steps in a timing, an eighth of them for the reference")

    ON_CUDA: ClassVar[tuple] = ("--sizes=16x128|32x256|64x256", "--compile=True", "--repeats=5")

    def run_settings(self, n_dims, d_model, structure):
        """The settings of a run of train_ICL.py at full size, its ranks 8|4|2|2 scaled to the width of a head."""
        width = d_model // self.n_head
        ranks = [width // 2, width // 4, width // 8]
        return self.run_of(
            train_ICL, n_dims=n_dims, d_model=d_model, token_mixing_struct=structure,
            mlr_rank_list="|".join(map(str, [*ranks, width - sum(ranks)])), training_num_training_examples=POOL,
            training_curriculum_dims_start=n_dims, training_curriculum_points_start=2 * n_dims,
        )  # fmt: skip


def rows(cfg, device):
    """Rows of a size and scoring function: the reference, train_ICL, several runs. First None: settings are good."""
    sizes = parse_pairs(cfg.sizes, "sizes", "n_dims x d_model")
    names = chosen(cfg.token_mixing_struct, STRUCTURES, "token_mixing_struct")
    wanted(cfg.cuda_graph, device, cfg.dtype, 1)  # which refuses what this device has not
    runs = [cfg.run_settings(*size, name) for size, name in product(sizes, names)]
    for run in runs:
        run.model_config(block_size=run.tokens)
    yield
    for run in runs:
        plain = {}
        for count, build in ((1, reference), (1, train_icl), (cfg.together, train_icl))[: 2 + (cfg.together > 1)]:
            loop = "reference" if build is reference else "train_ICL" if count == 1 else f"{count} at once"
            row = afresh(time_loop, cfg, device, run, build, count)
            if "ms" in row and "ms" in plain:
                row["times_reference"] = plain["ms"] / row["ms"]
            plain = row if build is reference else plain
            about = dict(n_dims=run.n_dims, d_model=run.d_model, token_mixing_struct=run.token_mixing_struct)
            yield dict(about, loop=loop, **row)


def time_loop(cfg, device, run, build, count):
    """Time and peak memory of a step of the function that `build` gives, which takes `count` of them in a call."""
    allow_tf32(cfg.tf32)
    steps = max(1, cfg.steps // 8) if build is reference else cfg.steps
    with many_programs:
        timed = time_step(build(run, device, count), device, steps, cfg.repeats)
    ms = timed["ms"] / count
    return dict(timed, ms=ms, steps_per_s=1e3 / ms)


def train_icl(run, device, count):
    """A step of train_ICL.py, or of each of several runs of it, on streams of their own (training/together.py)."""
    runs = []
    for k in range(count):
        stream = torch.cuda.Stream(device) if count > 1 and device.type == "cuda" else None
        with torch.cuda.stream(stream):
            runs.append((Started(train_ICL, replace(run, seed=run.seed + k), eval_prompts=1), stream))

    def step():
        for started, stream in runs:
            with torch.cuda.stream(stream):
                started.step()

    return step


def reference(run, device, count):
    """The step as the definition reads."""
    torch.manual_seed(run.seed)
    model = InContextRegressor(run.model_config(block_size=run.tokens), run.n_dims)
    for block in model.trunk.h:
        block.attn.scoring = DenseScores(block.attn.scoring)
    initialise(model.to(device))
    groups = param_groups(model, run.training_learning_rate)
    optimizer = torch.optim.AdamW(groups, betas=(run.beta1, run.beta2), eps=1e-20, foreach=True)

    def losses():
        x, y = (part.to(device) for part in draw_one_by_one(run))
        with autocast(device, run.dtype):
            loss = (model(interleave(x, y)).float() - y).square().mean()
        yield loss

    step = plain_step(losses, model, optimizer, device, run.dtype, run.grad_clip)
    return lambda: step().item()


class DenseScores(Scoring):
    """A scoring function whose T x T scores, mask and softmax are tensors of their own."""

    def __init__(self, scoring):
        super().__init__(scoring.cfg)
        self.scoring = scoring

    def forward(self, x, v):
        q, k = self.scoring.queries_and_keys(x)
        return mix(low_rank_scores(q, k, self.scoring.scores_scale), v, visible(q, True))


def draw_one_by_one(run):
    """A batch of linear regression, x (B, points, n_dims) and y (B, points): each from its own seed, on the CPU."""
    generator, prompts = torch.Generator(), []
    for seed in random.sample(range(run.training_num_training_examples), run.batch_size):
        generator.manual_seed(seed)
        x = torch.randn(run.points, run.n_dims, generator=generator) * run.n_dims**-0.5
        prompts.append((x, x @ torch.randn(run.n_dims, generator=generator)))
    return tuple(torch.stack(parts) for parts in zip(*prompts, strict=True))
