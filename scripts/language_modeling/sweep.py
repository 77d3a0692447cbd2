"""The language models of the paper's comparison, best learning rates included: printed, or run.

    python scripts/language_modeling/sweep.py > runs.txt; bash runs.txt     # one after the other
    python scripts/language_modeling/sweep.py --run=True --jobs=2           # here, two at a time on one device
    scripts/language_modeling/submit_language_modeling_greene.sh            # as one SLURM array

Part of it: `--only=d256`. More seeds: `--seed=2`, or `--seeds="1|2|3"`. A command given again goes on where its run
stopped, and does nothing if that is finished; `--todo=True` leaves finished runs out.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.grid import GridSettings, show
from training.configurator import configure, setting
from training.errors import command

CONFIG = "config/struct_configs"
RATES = {  # structure: {d_model: the best rate in the paper's runs}
    "standard": {256: 3e-3, 384: 3e-3, 512: 1.65e-3, 768: 1.65e-3},
    "mlr": {256: 3e-3, 384: 1.65e-2, 512: 3e-3, 768: 1.65e-2},
    "sliding_window": {256: 3e-3, 384: 3e-3, 512: 3e-3, 768: 3e-3},
    "gswa": {256: 3e-3, 384: 3e-3, 512: 3e-3, 768: 1.65e-2},
    "sequential_gswa": {256: 3e-3, 384: 3e-3, 512: 3e-3, 768: 3e-3},  # not known: the default
}


@dataclass
class Settings(GridSettings):
    """Print or run the commands of the language-modelling grid."""

    out_dir: str = setting("out/language_modeling", "folder of the runs' folders")


@command
def main(argv=None):
    cfg, runs = configure(Settings, argv), []
    for seed, (structure, rates) in itertools.product(cfg.all_seeds(), RATES.items()):
        configs = [f"{CONFIG}/train_struct_gpt2.py"]
        configs += [f"{CONFIG}/{structure}.py"] if structure != "standard" else []
        for d_model, lr in rates.items():
            flags = [f"--d_model={d_model}", f"--init_lr={lr}", f"--seed={seed}"]
            runs.append((f"{structure}_d{d_model}_seed{seed}", [*configs, *flags]))
    show(cfg, "train.py", runs)


if __name__ == "__main__":
    main()
