"""Train on a prepared series of yours and forecast what comes after its end, with settings that fit it.

    python data/csv/prepare.py --input sales.csv
    python scripts/own_series.py --dataset=sales                  # out/ts_sales/forecast.csv and .png
    python scripts/own_series.py --dataset=sales --horizon=30 --forecaster=dlinear

It runs train_TS.py with config/ts_configs/csv.py, where it can for a season ahead (a day of hours, a year of months),
then forecast.py. More than 64 channels are left to DLinear, which is fast. Flags are those of train_TS.py. A run that
the folder holds is replaced.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import forecast
import train_TS
from data.series import load_series
from training.configurator import configure
from training.errors import command
from training.files import ROOT

CONFIG = str(ROOT / "config/ts_configs/csv.py")


def fitting(series, horizon=0):
    """Flags of train_TS.py for a Series: a horizon, unless one is given, the look_back, and the forecaster."""
    train, val, test = (int(rows) for rows in np.diff(series.borders))
    season = series.season if series.season > 1 else 24
    horizon = horizon or max(1, min(season, 96, 2 * min(val, test) // 3))
    look_back = max(8, min(max(96, 2 * season), 336, (train - horizon) // 2))
    flags = [f"--horizon={horizon}", f"--look_back={look_back}"]
    return [*flags, "--forecaster=dlinear"] if len(series.columns) > 64 else flags


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    asked = configure(train_TS.Settings, [CONFIG, *argv])
    horizon = asked.horizon if any(arg.startswith("--horizon") for arg in argv) else 0
    flags = fitting(load_series(Path(asked.data_dir) / asked.dataset), horizon)
    argv = [CONFIG, f"--out_dir=out/ts_{asked.dataset}", "--overwrite=True", *flags, *argv]
    train_TS.main(argv)
    out = configure(train_TS.Settings, argv).folder
    forecast.main([f"--out_dir={out}", f"--out={out / 'forecast.csv'}"])


if __name__ == "__main__":
    main()
