"""What a narrow head cannot do, and what MLR attention costs and gains, in a few minutes on two CPU cores: `make demo`.

    python scripts/demo.py                 train the eight models below, then print the table and draw the pictures
    python scripts/demo.py --seed=2        the same with another seed

Noisy recall (config/icl_configs/recall.py), which is not the paper's in-context regression: standard attention of one
size with heads of width 4 to 32, and the bilinear forms with value heads of 4. Language modelling: Python's own
documentation and sources, character by character; standard attention takes twice MLR's steps, about its time. Two runs
at a time, one core each; finished runs are kept, started ones go on.
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

RECALL, LM = "config/icl_configs/recall", "config/struct_configs/tiny"
RUNS = {  # name: command; in the order that keeps both cores busy
    "lm_mlr": ["train.py", f"{LM}.py", f"{LM}_mlr.py"],
    "lm_standard": ["train.py", f"{LM}.py", "--max_iters=1_200"],
    "recall_mlr": ["train_ICL.py", f"{RECALL}.py", f"{RECALL}_mlr.py"],
    "recall_btt": ["train_ICL.py", f"{RECALL}.py", f"{RECALL}_btt.py"],
    "recall_8_heads": ["train_ICL.py", f"{RECALL}.py"],
    "recall_4_heads": ["train_ICL.py", f"{RECALL}.py", "--n_head=4"],
    "recall_2_heads": ["train_ICL.py", f"{RECALL}.py", "--n_head=2"],
    "recall_1_head": ["train_ICL.py", f"{RECALL}.py", "--n_head=1"],
}


@dataclass
class Settings:
    """Train the demo's eight models, print what they reached and draw it."""

    out_dir: str = setting("out/demo", "folder of the runs and the pictures")
    seed: int = setting(1337, "seed of all eight runs")


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
                arguments = [sys.executable, *RUNS[name], *flags]
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


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    os.chdir(ROOT)
    out_dir = Path(cfg.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    prepare()
    print("training eight small models, two at a time; this takes about four minutes", flush=True)
    train_all(out_dir, cfg.seed)
    print("\nwhat MLR attention writes after Python's documentation and sources:\n", flush=True)
    sample = ["sample.py", f"--out_dir={out_dir / 'lm_mlr'}", "--num_samples=1", "--max_new_tokens=300", "--start=def "]
    subprocess.run([sys.executable, *sample], check=True)
    recall, lm = ([load_run(out_dir / name) for name in RUNS if name.startswith(kind)] for kind in ("recall", "lm"))
    print(f"\n{demo.summary(recall, lm)}\n\npictures:", flush=True)
    demo.draw(recall, lm, out_dir)


if __name__ == "__main__":
    main()
