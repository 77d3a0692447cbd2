"""What a narrow head cannot do, and what MLR attention costs and gains, in a few minutes on two CPU cores: `make demo`.

    python scripts/demo.py                 train the eight models below, then print the table and draw the pictures
    python scripts/demo.py --seed=2        the same with another seed

Noisy recall (config/icl_configs/recall.py), which is not the paper's in-context regression: standard attention of one
size with heads of width 4 to 32, and the bilinear forms with value heads of 4. Language modelling: Python's own
documentation and sources, character by character; standard attention takes twice MLR's steps, about its time. Two runs
at a time, one core each; finished runs are kept, started ones resume.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.grid import commands, run_here, to_do  # noqa: E402
from training.configurator import configure, setting  # noqa: E402
from training.errors import command  # noqa: E402

RECALL, LM = "config/icl_configs/recall", "config/struct_configs/tiny"
RUNS = {  # name: script, config files and flags; in the order that keeps both cores busy
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
    """Make what is left of the runs, two at a time on a core each."""
    runs = commands(RUNS, out_dir, extra=f"--seed={seed} --device=cpu")
    run_here(to_do(list(runs.values()), here=True), jobs=2, cores=1, every=15)


@command
def main(argv=None):
    cfg = configure(Settings, argv)
    os.chdir(ROOT)
    out_dir = Path(cfg.out_dir)
    prepare()
    print("training eight small models, two at a time; this takes about four minutes", flush=True)
    train_all(out_dir, cfg.seed)
    print("\nwhat MLR attention writes after Python's documentation and sources:\n", flush=True)
    sample = ["sample.py", f"--out_dir={out_dir / 'lm_mlr'}", "--num_samples=1", "--max_new_tokens=300", "--start=def "]
    subprocess.run([sys.executable, *sample], check=True)
    print(flush=True)
    drawn = subprocess.run([sys.executable, "plots/demo.py", str(out_dir), "--out", str(out_dir)])
    if drawn.returncode:  # plots/demo.py has said why
        sys.exit(drawn.returncode)


if __name__ == "__main__":
    main()
