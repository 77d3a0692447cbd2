"""Copy the records of finished runs (--unfinished: all) to where git keeps them, small, without this machine's paths.

    python scripts/collect.py out/icl_regression results/icl_regression
    python scripts/collect.py out/a out/b results/icl_regression --progress=50

metrics.jsonl keeps every evaluation, or at most --evaluations of them at steps evenly spaced on a log scale, and at
most --progress progress lines; numbers have six digits. What evaluations repeat at length (the error by number of
examples, the baselines) only the last one keeps. A run may be collected again; another run is never replaced.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training.errors import BadInput, command  # noqa: E402
from training.files import check_folder  # noqa: E402
from training.records import find_runs, read_record  # noqa: E402

LONG = ("eval_pointwise/loss", "baselines")
PLACES = ("config", "data", "out")  # folders of the repository that a path is shortened to
BUDGET = 8 * 2**20  # bytes of all the records of a folder


def thin(lines, evaluations, progress):
    """Some of the lines of metrics.jsonl, in their order, with six digits."""
    evaluated = [i for i, line in enumerate(lines) if is_evaluation(line)]
    trained = [i for i, line in enumerate(lines) if not is_evaluation(line)]
    kept = {evaluated[place] for place in log_spaced([lines[i]["step"] for i in evaluated], evaluations)}
    kept |= {trained[int(place)] for place in np.linspace(0, len(trained) - 1, min(len(trained), progress)).round()}
    last = evaluated[-1] if evaluated else None
    return [rounded({k: v for k, v in lines[i].items() if i == last or k not in LONG}) for i in sorted(kept)]


def is_evaluation(line):
    return any(name in line for name in ("eval/last", "val/loss", "val/mse", "test/mse"))


def log_spaced(steps, most):
    """Places of at most `most` of the ascending steps, both ends among them, about even on a log scale."""
    if len(steps) <= most:
        return range(len(steps))
    at = np.log1p(steps)
    return sorted({0, len(steps) - 1, *(int(np.abs(at - x).argmin()) for x in np.linspace(at[0], at[-1], most))})


def rounded(value):
    """Floats to six digits, all the way down."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def without_paths(record, name):
    """The record with its folder called out/NAME and every other absolute path cut to the repository's."""
    settings = {k: shorten(v) for k, v in record["settings"].items()} | {"out_dir": f"out/{name}"}
    argv = [f"--out_dir=out/{name}" if a.startswith("--out_dir=") else shorten(a) for a in record["argv"][1:]]
    return record | dict(settings=settings, argv=[record["command"], *argv])


def shorten(value):
    """An absolute path, alone or in a flag, from the folder of the repository on, or its last part."""
    if not isinstance(value, str):
        return value
    flag, equals, path = value.rpartition("=")
    if not path.startswith("/"):
        return value
    parts = Path(path).parts
    start = next((i for i, part in enumerate(parts) if part in PLACES), len(parts) - 1)
    return f"{flag}{equals}{Path(*parts[start:])}"


def check_free(folder, record):
    """Raises BadInput if the folder holds another run than the one of this record."""
    path = folder / "run.json"
    if path.exists():
        there = read_record(folder)
        if any(there.get(name) != record.get(name) for name in ("started", "settings")):
            raise BadInput(f"{folder} holds another run, started {there.get('started')}; remove it or rename yours")
    elif folder.exists():
        raise BadInput(f"{folder} is there and holds no run")


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, or folders that hold such folders")
    parser.add_argument("to", type=Path, help="folder of the records")
    parser.add_argument("--evaluations", type=int, default=100, help="evaluations to keep, at least 2 [100]")
    parser.add_argument("--unfinished", action="store_true", help="also runs that have not ended, as far as they got")
    parser.add_argument("--progress", type=int, default=200, help="progress lines to keep [200]")
    args = parser.parse_args(argv)
    if args.evaluations < 2 or args.progress < 0:
        raise BadInput("--evaluations is at least 2, --progress at least 0")
    check_folder(args.to, "to")
    finished, records = {}, {}
    for run in find_runs(args.runs):
        name = run.folder.resolve().name
        if run.status != "finished" and not args.unfinished:
            print(f"{name} is left out: {run.status}")
        elif name in finished:
            raise BadInput(f"{finished[name].folder} and {run.folder} have the same name; rename one")
        else:
            finished[name], records[name] = run, without_paths(run.record, name)
            check_free(args.to / name, records[name])
    for name, run in finished.items():
        folder = args.to / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(records[name], indent=1) + "\n")
        lines = thin(run.metrics, args.evaluations, args.progress)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"{size(folder) / 1024:8.1f} KiB  {folder} ({len(lines)} of {len(run.metrics)} lines)")
    total = size(args.to)
    print(f"{total / 1024:8.1f} KiB  {args.to}, {len(finished)} runs collected")
    if total > BUDGET:
        print(f"more than {BUDGET / 2**20:.0f} MiB: choose fewer --evaluations and --progress lines")


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
