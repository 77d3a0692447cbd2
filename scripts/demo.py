"""Both effects of the paper in a few minutes on two CPU cores: what `make demo` runs.

    python scripts/demo.py                 train the five models below, then print the table and draw the pictures
    python scripts/demo.py --seed=2        the same with another seed

In-context regression: prompts of four-dimensional x, heads of width 2. Language modelling: Python's own documentation
and sources, character by character. Two runs at a time, one core each; finished runs are kept, started ones go on.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plots import demo  # noqa: E402
from plots.records import load_run  # noqa: E402
from training.configurator import configure, setting  # noqa: E402
from training.errors import command  # noqa: E402

ICL, LM = "config/icl_configs/tiny", "config/struct_configs/tiny"
RUNS = {  # name: (what the table calls it, command); in the order that keeps both cores busy
    "lm_mlr": ("MLR", ["train.py", f"{LM}.py", f"{LM}_mlr.py"]),
    "icl_standard": ("standard", ["train_ICL.py", f"{ICL}.py"]),
    "icl_bilinear_btt": ("bilinear BTT", ["train_ICL.py", f"{ICL}.py", f"{ICL}_bilinear_btt.py"]),
    "icl_bilinear_mlr": ("bilinear MLR", ["train_ICL.py", f"{ICL}.py", f"{ICL}_bilinear_mlr.py"]),
    "lm_standard": ("standard", ["train.py", f"{LM}.py"]),
}


@dataclass
class Settings:
    """Train the demo's five models, print what they reached and draw it."""

    out_dir: str = setting("out/demo", "folder of the runs and the pictures")
    seed: int = setting(1337, "seed of all five runs")


def prepare():
    """Make the corpus, unless it is there."""
    if not Path("data/pydocs/meta.json").exists():
        print("preparing data/pydocs from this Python's standard library", flush=True)
        subprocess.run([sys.executable, "data/pydocs/prepare.py"], check=True, stdout=subprocess.DEVNULL)


def train_all(out_dir, seed):
    """Run every command, two at a time on a core each; stop all if one fails."""
    waiting, running, started, said = list(RUNS), {}, time.monotonic(), 0
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < 2:
                name = waiting.pop(0)
                (out_dir / name).mkdir(exist_ok=True)
                log = open(out_dir / name / "output.txt", "w")  # noqa: SIM115  closed with the process
                flags = [f"--out_dir={out_dir / name}", f"--seed={seed}", "--init_from=auto", "--device=cpu"]
                arguments = [sys.executable, *RUNS[name][1], *flags]
                running[name] = subprocess.Popen(arguments, env=env, stdout=log, stderr=subprocess.STDOUT)
            time.sleep(1)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        sys.exit(f"{name} failed:\n{(out_dir / name / 'output.txt').read_text()[-2000:]}")
            seconds = time.monotonic() - started
            if running and seconds - said > 5:
                words = [f"{name} {last_line(out_dir / name / 'output.txt')}" for name in running]
                print(f"[{seconds:3.0f} s] " + " | ".join(words), flush=True)
                said = seconds
    finally:
        for process in running.values():
            process.terminate()


def last_line(log):
    """The step and the loss a run reported last."""
    steps = [line for line in log.read_text().splitlines() if line.startswith("step ")]
    return steps[-1].split(", lr")[0].split(" (zero")[0] if steps else "is starting"


def table(runs):
    """What every run reached, beside what it cost."""
    rows = [("task", "attention", "measure", "value", "steps", "steps/s")]
    for name, run in runs.items():
        last = [m for m in run.metrics if "eval/last" in m or "val/loss" in m][-1]
        if "eval/last" in last:
            task, measure, value = "in-context regression", "squared error, 0 predicts 1.0", last["eval/last"]
        else:
            task, measure, value = "language modelling", "val loss, nats a character", last["val/loss"]
        rate = last["step"] / last["seconds"]
        rows.append((task, RUNS[name][0], measure, f"{value:.3f}", str(last["step"]), f"{rate:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    os.chdir(ROOT)
    out_dir = Path(cfg.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    prepare()
    print("training five small models, two at a time; this takes four to five minutes", flush=True)
    train_all(out_dir, cfg.seed)
    print("\nwhat MLR attention writes after Python's documentation and sources:\n", flush=True)
    sample = ["sample.py", f"--out_dir={out_dir / 'lm_mlr'}", "--num_samples=1", "--max_new_tokens=300", "--start=def "]
    subprocess.run([sys.executable, *sample], check=True)
    print()
    runs = {name: load_run(out_dir / name) for name in sorted(RUNS)}
    table(runs)
    print("\npictures:", flush=True)
    icl, lm = ([run for name, run in runs.items() if name.startswith(kind)] for kind in ("icl", "lm"))
    demo.draw(icl, lm, out_dir)


if __name__ == "__main__":
    main()
