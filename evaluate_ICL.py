"""Measure a checkpoint of train_ICL.py on prompts unlike those it was trained on, beside methods that need no training.

    python evaluate_ICL.py --out_dir=out/icl --shift=all
    python evaluate_ICL.py --out_dir=out/icl --shift="half_subspace|scale_2" --examples="8|16|31" --out=shifts.json

Every number is the squared error on a query after so many examples, the mean over the first prompts of the evaluation
set, whatever the batch size. As in Garg et al. (2022) a prompt is made for each number of examples, the query last.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from data.icl_regression.baselines import BASELINES
from data.icl_regression.sampler import interleave
from data.icl_regression.shifts import SHIFTS, check_shift, shifted_prompts
from model import InContextRegressor
from train_ICL import Settings as TrainSettings
from training import devices
from training.checkpoint import load_run, load_weights
from training.configurator import configure, parse_list, require_at_least, restored, setting
from training.errors import BadInput, command, reading
from training.files import check_output

LOW_RANK = 1e-6  # singular values below this part of the largest are rounding errors of float32 inputs


@dataclass
class Settings:
    """Errors of a checkpoint under distribution shifts. Config files and flags, the later one winning."""

    out_dir: str = setting("out/icl", "folder of the run that train_ICL.py made")
    checkpoint: str = setting("last", "last (ckpt.pt) or best (best.pt: the lowest error at the last position)")
    shift: str = setting("all", f"all, or names with | between them: {', '.join(SHIFTS)}")
    examples: str = setting("", "numbers of examples, like 1|4|31; empty: powers of two, and the most there can be")
    prompts: int = setting(1_280, "prompts for each number, the first of the evaluation set")
    batch_size: int = setting(64, "prompts taken at a time; changes no result")
    out: str = setting("", "JSON file for the numbers")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps, or auto: the GPU if there is one")
    dtype: str = setting("float32", "precision of the model: float32, bfloat16 or float16")

    AT_LEAST: ClassVar[dict] = dict(prompts=1, batch_size=1)

    def __post_init__(self):
        require_at_least(self, self.AT_LEAST)

    def plan(self, trained):
        """[(shift, numbers of examples)]; raises BadInput for what the run's task or prompts cannot have."""
        names = list(SHIFTS) if self.shift == "all" else parse_list(self.shift, "shift", str)
        if self.shift == "all" and trained.training_task == "linear_classification":
            names = [name for name in names if not SHIFTS[name].targets]
        plan = []
        for name in names:
            check_shift(name, trained.training_task, trained.n_dims, 0)
            most = min(trained.points, trained.n_dims) - 1 if SHIFTS[name].below_n_dims else trained.points - 1
            counts = parse_list(self.examples, "examples") if self.examples else powers_of_two(most)
            for seen in counts:
                check_shift(name, trained.training_task, trained.n_dims, seen)
                if seen >= trained.points:
                    raise BadInput(f"{seen} examples and a query are more than the {trained.points} pairs of a prompt")
            plan.append((name, counts))
        return plan


def powers_of_two(most):
    """1, 2, 4, .. below `most`, and `most` itself."""
    return (*(2**i for i in range(most.bit_length()) if 2**i < most), most)


def load_model(out_dir, device="cpu", which="last"):
    """(model in evaluation mode, settings it was trained with, steps it was trained for) of a run of train_ICL.py."""
    saved, path = load_run(out_dir, "train_ICL.py", "training_task", which)
    with reading(path):
        trained = restored(TrainSettings, saved["settings"])
        model_cfg, layout = trained.model_config(block_size=trained.tokens), trained.layout
        model = InContextRegressor(model_cfg, trained.n_dims, layout.extra_inputs, layout.predicting).to(device)
        load_weights(model, saved["model"], path)
    return model.eval(), trained, saved["step"]


def baseline_residuals(x, y, ridge_alpha):
    """{name: float64 (B,)}: what the baselines miss the query by, the last point, from all the points before it.

    Least squares is the pseudo-inverse here: shifted inputs need not span the space.
    """
    x, y = x.cpu().double(), y.cpu().double()
    residuals = {name: f(x, y, ridge_alpha)[:, -1] for name, f in BASELINES.items() if name != "least_squares"}
    w = torch.linalg.lstsq(x[:, :-1], y[:, :-1, None], rcond=LOW_RANK, driver="gelsy").solution
    return {"least_squares": y[:, -1] - (x[:, -1:] @ w).flatten()} | residuals


@torch.no_grad()
def errors(model, trained, cfg, shift, seen):
    """{method: mean squared error on the query after `seen` examples}, the model first."""
    device, sums = next(model.parameters()).device, {}
    for first in range(0, cfg.prompts, cfg.batch_size):
        count = min(cfg.batch_size, cfg.prompts - first)
        x, y = shifted_prompts(shift, first=first, count=count, seen=seen, device=device, **trained.task())
        with devices.autocast(device, cfg.dtype):
            predicted = model(interleave(x, y))[:, -1]
        residuals = {"model": predicted.double() - y[:, -1], **baseline_residuals(x, y, trained.ridge_alpha)}
        for method, residual in residuals.items():
            sums[method] = sums.get(method, 0.0) + residual.square().sum().item()
    return {method: total / cfg.prompts for method, total in sums.items()}


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    device = devices.pick_device(cfg.device)
    devices.allow_tf32(False)
    model, trained, step = load_model(cfg.out_dir, device, cfg.checkpoint)
    plan = cfg.plan(trained)
    if cfg.out:
        check_output(cfg.out)
    kind = f"{trained.token_mixing_struct}, {trained.training_task}, n_dims {trained.n_dims}"
    print(f"{cfg.out_dir} after {step:,} steps: {kind}; {cfg.prompts:,} prompts on {devices.device_name(device)}")
    methods, found = ("model", *BASELINES), {}
    print(f"{'shift':<18}{'examples':>9}" + "".join(f"  {name.replace('_', ' '):>10}" for name in methods), flush=True)
    for shift, counts in plan:
        found[shift] = dict(examples=list(counts), **{method: [] for method in methods})
        for seen in counts:
            row = errors(model, trained, cfg, shift, seen)
            for method in methods:
                found[shift][method].append(row[method])
            print(f"{shift:<18}{seen:>9}" + "".join(f"  {row[m]:>{max(10, len(m))}.3g}" for m in methods), flush=True)
    if cfg.out:
        about = dict(command="evaluate_ICL.py", settings=dataclasses.asdict(cfg), device=devices.device_name(device))
        run = dict(settings=dataclasses.asdict(trained), step=step)
        Path(cfg.out).write_text(json.dumps(dict(**about, run=run, errors=found), indent=1) + "\n")
        print(cfg.out)


if __name__ == "__main__":
    main()
